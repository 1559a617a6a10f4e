"""Small files, written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from configs.errors import StorageError


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that nothing half-written is ever seen under its name.

    It is not synced: what must outlive a power cut is a checkpoint's.

    Raises:
        StorageError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(str(path), f"cannot be written: {error.strerror}") from None
