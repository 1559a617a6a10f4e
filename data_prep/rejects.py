"""The rows left out: each on a line of ``rejects.jsonl``, counted by reason; too many stop the preparation."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import DataError
from data_prep.journal import cut
from data_prep.records import Reject

_SHOWN = 5
_REMEDIES = {
    "invalid UTF-8": "write the file as UTF-8: iconv -f GB18030 -t UTF-8 FILE > NEW (Western: -f WINDOWS-1252)",
    "longer than max_length": "raise max_length; or too_long=truncate_right, truncate_left or, for documents, chunk",
    "unknown role": "say what the roles mean: 'dataset.roles={THEIRS: user}'",
}


def remedy_for(reasons: Mapping[str, Any]) -> str | None:
    """What to do when rows were left out mostly for the first of these reasons, where one setting or command helps."""
    return _REMEDIES.get(next(iter(reasons), ""))


class RejectLog:
    """Writes rejects as they come.

    Args:
        path: the file to write.
        max_rejects: more faults of rows than this stop the preparation; -1: no limit. Rows that only exceed a limit of
            the config (too long) are written and counted, but are no fault.
        state: what `state` returned in an earlier process; rejects that came after it are forgotten.
    """

    def __init__(self, path: Path, max_rejects: int, state: dict[str, Any] | None = None) -> None:
        self._max = max_rejects
        state = state or {"bytes": 0, "reasons": {}, "faults": {}, "sources": {}, "first": []}
        self.by_reason = Counter[str](state["reasons"])
        self._faults = Counter[str](state["faults"])
        self._by_source = Counter[str](state["sources"])
        self._first: list[tuple[bool, str]] = [(bool(counts), text) for counts, text in state["first"]]
        """The first few faults of rows, and the first few of the others."""
        if state["bytes"]:
            cut(path, state["bytes"])
        self._file = path.open("ab" if state["bytes"] else "wb")

    def add(self, reject: Reject, split: str | None, source: str) -> None:
        """Writes one.

        Raises:
            DataError: it is one too many.
        """
        split = reject.split or split
        line = {"file": reject.origin.file, "line": reject.origin.line}
        line |= {"part": reject.origin.part} if reject.origin.part > 1 else {}
        line |= {"reason": reject.reason}
        line |= {"detail": reject.detail} if reject.detail else {}
        line |= {"split": split} if split else {}
        self._file.write(json.dumps(line).encode() + b"\n")
        self.by_reason[reject.reason] += 1
        self._by_source[source] += 1
        if sum(counts == reject.counts for counts, _ in self._first) < _SHOWN:
            self._first.append((reject.counts, str(reject)))
        if reject.counts:
            self._faults[reject.reason] += 1
            self.check(reject.origin.file)

    def check(self, where: str) -> None:
        """Stops if there are too many, as there may be from the beginning when `max_rejects` was lowered since.

        Raises:
            DataError: there are.
        """
        if 0 <= self._max < self._faults.total():
            raise self._too_many(where)

    def state(self) -> dict[str, Any]:
        """What another process needs to go on from here, once it is on the disk; JSON values."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {
            "bytes": self._file.tell(),
            "reasons": self.by_reason,
            "faults": self._faults,
            "sources": self._by_source,
            "first": self._first,
        }

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    @property
    def total(self) -> int:
        """Rows left out so far."""
        return self.by_reason.total()

    def first(self) -> str:
        """The first few, a line each, as ``file:line: reason``: faults of rows if there are any."""
        faults = [text for counts, text in self._first if counts]
        return "\n".join(f"    {text}" for text in faults or [text for _, text in self._first])

    def summary(self) -> dict[str, Any]:
        """For the manifest: all, those that are faults, and counts by reason and by source with the commonest first."""
        return {
            "total": self.total,
            "faults": self._faults.total(),
            "by_reason": _commonest_first(self.by_reason),
            "by_source": _commonest_first(self._by_source),
        }

    def _too_many(self, file: str) -> DataError:
        faults = _commonest_first(self._faults)
        reasons = "\n".join(f"    {count:,} {reason}" for reason, count in faults.items())
        mend = remedy_for(faults) or "mend the rows"
        return DataError(
            file,
            f"more than dataset.max_rejects={self._max} rows are at fault:\n{reasons}\n  the first:\n{self.first()}",
            remedy=f"{mend}; or raise dataset.max_rejects (-1: no limit) to leave them out",
        )


def _commonest_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
