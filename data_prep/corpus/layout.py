"""Where things are in the work folder of a corpus, and how it is cut into tasks. All tasks see the same."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import Mark, Part
from data_prep.dedup import Meetings


@dataclass(frozen=True)
class Piece:
    """A stretch of a part, read by one task."""

    part: int
    begin: Mark
    end: Mark | None
    """None: the part's end."""
    size: int
    """Bytes as stored, about."""


@dataclass(frozen=True)
class Layout:
    """A work folder. Rows are in ``rows/<task>-<part>.jsonl``, arrays of the survey in ``survey/<task>/``."""

    folder: Path
    tasks: int

    def marks(self, part: int) -> Path:
        """Where a part can be cut: JSON, [[offset, line, bytes stored before], ...]."""
        return self.folder / "marks" / f"{part:06d}.json"

    def rows(self, task: int, part: int) -> Path:
        """Rows that a task made of a part."""
        return self.folder / "rows" / f"{task:05d}-{part:06d}.jsonl"

    def survey(self, task: int) -> Path:
        """Folder of `survey.SurveyFiles` of a task."""
        return self.folder / "survey" / f"{task:05d}"

    def report(self, task: int) -> Path:
        """What a task read: JSON, {"rows": {part: rows}, "cleaned": {what: how often}}."""
        return self.folder / "read" / f"{task:05d}.json"

    def meetings(self, task: int) -> Path:
        """Which records meet in the bands of a task: .npz of `rows` and `groups`."""
        return self.folder / "meet" / f"{task:05d}.npz"

    def reports(self) -> list[dict[str, Any]]:
        """What all tasks read."""
        return [read_json(self.report(task)) for task in range(self.tasks)]

    @property
    def gathered(self) -> Path:
        """Folder of the arrays of all tasks, end to end."""
        return self.folder / "gathered"

    @property
    def decided(self) -> Path:
        """Folder of what was decided for all rows."""
        return self.folder / "decided"

    def fault(self, stage: str, task: int) -> Path:
        """The fault that ended a task, as JSON."""
        return self.folder / "faults" / f"{stage}-{task:05d}.json"

    def large(self, parts: Sequence[Part]) -> list[int]:
        """The parts that are larger than a task's share, and therefore cut."""
        share = sum(part.source.bytes for part in parts) / self.tasks
        return [number for number, part in enumerate(parts) if part.source.bytes > share]

    def pieces(self, parts: Sequence[Part], task: int) -> list[Piece]:
        """What a task reads: pieces one after the other, so that the order of tasks is the order of rows."""
        total = sum(part.source.bytes for part in parts)
        large = set(self.large(parts))
        found: list[Piece] = []
        before = 0
        for number, part in enumerate(parts):
            ends = [(Mark(*m[:2]), m[2]) for m in read_json(self.marks(number))] if number in large else []
            begin, done = Mark(), 0
            for end, stored in [*ends[:-1], (None, part.source.bytes)]:
                place = before + (done + stored) / 2
                if min(self.tasks - 1, int(place * self.tasks / max(1, total))) == task:
                    found.append(Piece(number, begin, end, stored - done))
                if end is not None:
                    begin, done = end, stored
            before += part.source.bytes
        return _joined(found)


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbours of one part as one."""
    made: list[Piece] = []
    for piece in pieces:
        if made and made[-1].part == piece.part:
            last = made.pop()
            piece = Piece(piece.part, last.begin, piece.end, last.size + piece.size)
        made.append(piece)
    return made


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(json.dumps(value), encoding="utf-8")
    new.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def save_meetings(path: Path, met: Sequence[Meetings]) -> None:
    """Writes the meetings of several bands as one."""
    rows, groups, number = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for each in met:
        rows.append(each.rows)
        groups.append(each.groups + number)
        number += int(each.groups.max(initial=-1)) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, rows=np.concatenate(rows), groups=np.concatenate(groups))


def load_meetings(path: Path) -> Meetings:
    """What `save_meetings` wrote."""
    with np.load(path, allow_pickle=False) as found:
        return Meetings(found["rows"], found["groups"])
