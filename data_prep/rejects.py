"""The rows left out: each on a line of ``rejects.jsonl``, counted by reason; too many stop the preparation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType

from configs.errors import DataError
from data_prep.records import Reject

_SHOWN = 5


class RejectLog:
    """Writes rejects as they come; a context manager.

    Args:
        path: the file to write.
        max_rejects: more faults of rows than this stop the preparation; -1: no limit. Rows that only exceed a limit of
            the config (too long) are written and counted, but are no fault.
    """

    def __init__(self, path: Path, max_rejects: int) -> None:
        self._max = max_rejects
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self.by_reason: Counter[str] = Counter()
        self._first: list[Reject] = []
        self._first_faults: list[Reject] = []
        self._faults = 0

    def __enter__(self) -> RejectLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, reject: Reject, split: str | None = None) -> None:
        """Writes one.

        Raises:
            DataError: it is one too many.
        """
        split = reject.split or split
        line = {"file": reject.origin.file, "line": reject.origin.line, "reason": reject.reason}
        line |= {"detail": reject.detail} if reject.detail else {}
        line |= {"split": split} if split else {}
        self._file.write(json.dumps(line) + "\n")
        self.by_reason[reject.reason] += 1
        self._faults += reject.counts
        for shown in [self._first, self._first_faults] if reject.counts else [self._first]:
            if len(shown) < _SHOWN:
                shown.append(reject)
        if 0 <= self._max < self._faults:
            raise DataError(
                reject.origin.file,
                f"more than dataset.max_rejects={self._max} rows are at fault; the first:\n{self.first()}",
                remedy="mend the rows, or raise dataset.max_rejects (-1: no limit) to leave them out",
            )

    @property
    def total(self) -> int:
        """Rows left out so far."""
        return self.by_reason.total()

    def first(self) -> str:
        """The first few, a line each, as ``file:line: reason``: faults of rows if there are any."""
        return "\n".join(f"    {reject}" for reject in self._first_faults or self._first)

    def summary(self) -> dict[str, object]:
        """For the manifest: the total, and counts by reason with the commonest first."""
        ordered = sorted(self.by_reason.items(), key=lambda item: (-item[1], item[0]))
        return {"total": self.total, "by_reason": dict(ordered)}
