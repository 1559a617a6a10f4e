"""metrics.jsonl: one line per step, written as the run goes.

Steps after which the validation split was measured also have ``validation_loss``, steps that changed no weight
``skipped`` (see `train.loop.Record`). An objective may add figures of its own, such as ``indexer_kl``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import IO, Any

from configs.errors import StorageError
from configs.files import write_whole
from train.loop import Hook, Record


def read_metrics(path: Path) -> list[Record]:
    """All whole lines in order; [] if there is no file. A last line torn by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


class MetricsHook(Hook):
    """Appends every record of the loop, flushed line by line so that a crash loses none.

    Args:
        path: metrics.jsonl of the run.
        keep_until: the step that the run goes on from. Later lines come from steps that will be taken again and are
            removed, so that no step is missing and none is there twice.
    """

    def __init__(self, path: Path, keep_until: int) -> None:
        self.path, self.keep_until = path, keep_until
        self._file: IO[str] | None = None

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Opens the file.

        Raises:
            StorageError: it cannot be written.
        """
        self._open(self.keep_until)

    def on_step(self, record: Record) -> None:
        """Writes a step's line."""
        self._write(record)

    def on_rollback(self, step: int) -> None:
        """Removes the lines of steps that will be taken again.

        Raises:
            StorageError: the file cannot be written.
        """
        self.on_end()
        self._open(step)

    def on_save(self, step: int) -> None:
        """Makes the lines as durable as the checkpoint will be, so that a power cut leaves no gap before it."""
        if self._file:
            os.fsync(self._file.fileno())

    def on_end(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()
            self._file = None

    def _open(self, keep_until: int) -> None:
        kept = [record for record in read_metrics(self.path) if record["step"] <= keep_until]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(str(self.path), f"cannot be written: {error.strerror}") from None

    def _write(self, record: Record) -> None:
        assert self._file is not None, "on_start comes first"
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(str(self.path), f"cannot be written: {error.strerror}") from None
