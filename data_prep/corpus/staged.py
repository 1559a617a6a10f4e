"""Rows that tasks left in a work folder, as a data set for the ordinary engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.schema.dataset import DatasetConfig, SplitBy
from data_prep.corpus.layout import Layout
from data_prep.dataset import SPLITS, Chunk, Dataset, Mark, Part, Preview, Row
from data_prep.records import Origin, Reject, from_json, to_json
from data_prep.survey import Survey
from data_prep.work import Rulings

_CHUNK_BYTES = 2**20


def encode_rows(rows: Iterable[Row]) -> bytes:
    """Rows as JSON lines, without loss."""
    return b"".join(json.dumps(_encoded(row)).encode() + b"\n" for row in rows)


def _encoded(row: Row) -> dict[str, Any]:
    made: dict[str, Any] = {"split": row.split} if row.split is not None else {}
    if row.key is not None:
        made["key"] = row.key
    item = row.item
    if isinstance(item, Reject):
        origin = [item.origin.file, item.origin.line, item.origin.part]
        return {**made, "reject": [origin, item.reason, item.detail, item.split, item.counts]}
    return {**made, "record": to_json(item)}


def _decoded(line: bytes) -> Row:
    value = json.loads(line)
    if "reject" in value:
        origin, *rest = value["reject"]
        return Row(Reject(Origin(*origin), *rest), value.get("split"), value.get("key"))
    return Row(from_json(value["record"]), value.get("split"), value.get("key"))


class StagedPart(Part):
    """A part whose rows were read and cleaned elsewhere. A mark counts bytes of its files, and rows.

    Args:
        original: the part that was read; it still tells what the source is.
        files: its rows, in order.
        first_row: number of its first row among those of all parts.
        survey: what was decided of all rows; None: nothing depended on other rows.
    """

    def __init__(self, original: Part, files: Sequence[Path], first_row: int, survey: Survey | None) -> None:
        holdout = original.holdout
        if holdout is not None and holdout.needs_survey:  # the rows come with their splits now
            holdout = replace(holdout, by=SplitBy.content)
        super().__init__(original.source, split=original.split, holdout=holdout)
        self._original, self._files, self._first_row, self._survey = original, files, first_row, survey
        self._sizes = [file.stat().st_size for file in files]

    def stamp(self) -> list[Any]:
        """See `Part.stamp`: that of the source."""
        return self._original.stamp()

    def sha256(self) -> str:
        """See `Part.sha256`: that of the source."""
        return self._original.sha256()

    def chunks(self, after: Mark = Mark()) -> Iterator[Chunk]:  # noqa: B008 (frozen)
        """See `Part.chunks`."""
        begin, row, total = 0, after.line, max(1, sum(self._sizes))
        for path, size in zip(self._files, self._sizes, strict=True):
            end = begin + size
            if after.offset < end:
                with path.open("rb") as file:
                    file.seek(max(0, after.offset - begin))
                    while data := file.read(_CHUNK_BYTES):
                        data += file.readline()
                        offset, rows = begin + file.tell(), data.count(b"\n")
                        rulings = self._rulings(row, row + rows)
                        row += rows
                        stored = self.source.bytes * offset // total
                        yield Chunk((data, rulings), Mark(offset, row), stored, len(data))
            begin = end

    def rows(self, payload: tuple[bytes, Rulings | None]) -> Iterator[Row]:
        """See `Part.rows`."""
        data, rulings = payload
        for number, line in enumerate(data.splitlines()):
            row = _decoded(line)
            if rulings is not None and not isinstance(row.item, Reject):
                row.split = SPLITS[rulings.codes[number]]
                if number in rulings.duplicates:
                    reason, kept = rulings.duplicates[number]
                    row.item = Reject(row.item.origin, reason, f"of {kept}", counts=False)
            yield row

    def _rulings(self, begin: int, end: int) -> Rulings | None:
        if self._survey is None:
            return None
        return self._survey.between(self._first_row + begin, self._first_row + end)


class StagedDataset(Dataset):
    """What tasks left of a data set; its sources are still those of that.

    Args:
        cfg: the dataset group of the config.
        original: the data set that was read, opened.
        layout: of the work folder.
        surveyed: whether rows were decided on by looking at other rows.
    """

    def __init__(self, cfg: DatasetConfig, original: Dataset, layout: Layout, *, surveyed: bool) -> None:
        super().__init__(cfg, seed=original.seed)
        self.name, self.license, self.notes = original.name, original.license, original.notes
        self._original = original
        reports = layout.reports()
        self.cleaned = sum((Counter(report["cleaned"]) for report in reports), Counter[str]())
        parts = original.parts()
        part_rows = [sum(report["rows"].get(str(number), 0) for report in reports) for number in range(len(parts))]
        survey = Survey.saved(layout.decided) if surveyed else None
        if survey is not None:
            self.duplicates = dict(survey.duplicates)
        self._parts: list[Part] = []
        for number, part in enumerate(parts):
            files = [layout.rows(task, number) for task in range(layout.tasks)]
            there = [file for file in files if file.exists()]
            self._parts.append(StagedPart(part, there, sum(part_rows[:number]), survey))

    def parts(self) -> list[Part]:
        """See `Dataset.parts`."""
        return self._parts

    def open(self) -> None:
        """See `Dataset.open`: it is."""

    def settings(self) -> dict[str, Any]:
        """See `Dataset.settings`."""
        return self._original.settings()

    def preview(self, rows: int) -> list[Preview]:
        """See `Dataset.preview`."""
        return self._original.preview(rows)
