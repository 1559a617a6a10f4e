"""Hashes of the sources. They name prepared data, but reading gigabytes twice before the first row would be slow.

Little data is hashed at once. The hashes of more are remembered by path, size and times of change; where they are not
known they are computed in a thread, while rows are prepared already. A source that changes meanwhile is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import DataError
from data_prep.dataset import Part

AT_ONCE_BYTES = 64 * 2**20
_SETTLED_SECONDS = 2.0
"""A file changed so lately may change again within the same tick of its file system's clock."""


class SourceHashes:
    """SHA-256 of each part of a data set.

    Args:
        parts: of the data set.
        folder: where hashes are remembered.

    Raises:
        DataError: a source cannot be read.
    """

    def __init__(self, parts: Sequence[Part], folder: Path) -> None:
        self._parts, self._folder = parts, folder
        self._stamps = [part.stamp() for part in parts]
        self._fault: BaseException | None = None
        self._thread: threading.Thread | None = None
        if sum(part.source.bytes for part in parts) <= AT_ONCE_BYTES:
            self._found: list[str | None] = [part.sha256() for part in parts]
        else:
            self._found = [self._remembered(stamp) for stamp in self._stamps]

    @property
    def stamps(self) -> list[list[Any]]:
        """`Part.stamp` of each part, as it was in the beginning."""
        return self._stamps

    @property
    def known(self) -> bool:
        """Whether `result` has nothing to wait for."""
        return None not in self._found or (self._thread is not None and not self._thread.is_alive())

    def start(self) -> None:
        """Begins to compute what is not known, in a thread."""
        if not self.known:
            self._thread = threading.Thread(target=self._compute, daemon=True)
            self._thread.start()

    def result(self) -> list[str]:
        """The hashes, once they are there.

        Raises:
            DataError: a source cannot be read.
        """
        if self._thread is not None:
            self._thread.join()
        if self._fault is not None:
            raise self._fault
        found = [sha256 for sha256 in self._found if sha256 is not None]
        assert len(found) == len(self._parts)
        return found

    def check_unchanged(self) -> None:
        """Makes sure that what was read is what was hashed.

        Raises:
            DataError: a source has changed since the beginning.
        """
        for part, stamp in zip(self._parts, self._stamps, strict=True):
            if part.stamp() != stamp:
                raise DataError(
                    part.source.path, "has changed while it was read", remedy="run again when nothing writes to it"
                )

    def _compute(self) -> None:
        try:
            for number, part in enumerate(self._parts):
                if self._found[number] is None:
                    self._found[number] = sha256 = part.sha256()
                    self._remember(self._stamps[number], sha256)
        except BaseException as error:
            self._fault = error  # raised where the result is asked for

    def _place(self, stamp: list[Any]) -> Path:
        return self._folder / hashlib.sha256(json.dumps(stamp).encode()).hexdigest()

    def _remembered(self, stamp: list[Any]) -> str | None:
        try:
            found = self._place(stamp).read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        return found if len(found) == 64 else None

    def _remember(self, stamp: list[Any], sha256: str) -> None:
        newest = max((times for *_, times in stamp if isinstance(times, int)), default=0)
        if time.time() - newest / 1e9 < _SETTLED_SECONDS:
            return
        place = self._place(stamp)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            new = place.with_suffix(f".{os.getpid()}")
            new.write_text(sha256, encoding="ascii")
            new.replace(place)
        except OSError:
            pass  # it is computed again another time
