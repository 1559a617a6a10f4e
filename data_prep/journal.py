"""How far an unfinished preparation is, so that another process can go on with it; a kill costs a few seconds' work.

Whatever is written grows at its end. The journal says how long each file was at one moment between two chunks; what
came after it is cut off and made again.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Between two entries."""

_NAME = "journal.json"


class JournalError(Exception):
    """What was left of an interrupted preparation cannot be used."""


def cut(path: Path, size: int) -> None:
    """Cuts a file to the size it had when the journal was written.

    Raises:
        JournalError: it has not even that.
    """
    try:
        if path.stat().st_size >= size:
            os.truncate(path, size)
            return
    except OSError as error:
        raise JournalError(f"{path.name}: {error.strerror}") from None
    raise JournalError(f"{path.name} is shorter than its journal says")


class Journal:
    """The journal of a work folder. Only the latest entry is kept.

    Args:
        folder: the work folder.
        binding: what decides the result, as a hash; an entry with another one is of no use.
    """

    def __init__(self, folder: Path, binding: str) -> None:
        self._path, self._binding = folder / _NAME, binding
        self._written = time.monotonic()

    @property
    def exists(self) -> bool:
        """Whether something was written."""
        return self._path.is_file()

    def read(self) -> dict[str, Any]:
        """The latest entry.

        Raises:
            JournalError: it cannot be used, and why.
        """
        try:
            entry = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise JournalError(f"its journal cannot be read: {error}") from None
        if not isinstance(entry, dict) or entry.get("binding") != self._binding:
            raise JournalError("the data or the settings have changed")
        return entry

    @property
    def is_due(self) -> bool:
        """Whether it is time for an entry."""
        return time.monotonic() - self._written >= SECONDS

    def write(self, entry: dict[str, Any]) -> None:
        """Replaces the entry, all or nothing, on the disk when it returns."""
        new = self._path.with_suffix(".new")
        with new.open("w", encoding="utf-8") as file:
            json.dump({"binding": self._binding, **entry}, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Takes it away: the folder is finished."""
        self._path.unlink(missing_ok=True)
