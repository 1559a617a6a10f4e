"""Records out of files, globs, folders and hub data sets.

`locate.py` says which files a path means and for which split, `readers.py` and `hub.py` yield raw rows, `formats/`
makes records of them. Here these are put together, a row at a time.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.errors import DataError
from configs.schema.dataset import FilesDatasetConfig, RecordFormat
from data_prep.dataset import SPLITS, Dataset, Source, file_sha256
from data_prep.formats import Format
from data_prep.formats.detect import SAMPLE_ROWS, choose
from data_prep.hub import HubDataset, is_hub
from data_prep.locate import LocalFile, locate
from data_prep.readers import RawRow, kind_of_file, read_rows
from data_prep.records import AnyRecord, Origin, Reject, RowFault, content_json, kind_of

__all__ = ["Dataset", "FilesDataset", "Source"]


@dataclass
class _Input:
    """A source with the split its rows belong to; None: `path` without a fixed split, so fractions apply."""

    where: LocalFile | HubDataset
    split: str | None
    source: Source

    def raw_rows(self) -> Iterator[RawRow]:
        if isinstance(self.where, HubDataset):
            return self.where.rows()
        return read_rows(self.where.path, self.where.shown)

    @property
    def is_plain_text(self) -> bool:
        return isinstance(self.where, LocalFile) and kind_of_file(self.where.path) == "txt"


class FilesDataset(Dataset):
    """See `FilesDatasetConfig`."""

    def __init__(self, cfg: FilesDatasetConfig, *, seed: int = 0) -> None:
        super().__init__(cfg, seed=seed)
        self._cfg = cfg
        self._found: list[_Input] | None = None
        self._fractions = {"validation": cfg.validation_fraction, "test": cfg.test_fraction}
        """Of the records of no split; 0 once a split is known to have files of its own."""

    def settings(self) -> dict[str, Any]:
        """See `Dataset.settings`. Without the seed: which records are held out must not change with a run's seed."""
        cfg = self._cfg
        return {
            "splits": [[i.split, i.source.path] for i in self._inputs()],
            "format": cfg.format.value,
            "columns": dict(sorted(cfg.columns.items())),
            "system": cfg.system,
            "fractions": [cfg.validation_fraction, cfg.test_fraction],
        }

    def sources(self) -> list[Source]:
        """See `Dataset.sources`."""
        return [i.source for i in self._inputs()]

    def rows(self) -> Iterator[tuple[str, AnyRecord | Reject]]:
        """See `Dataset.rows`."""
        for each in self._inputs():
            yield from self._rows_of(each)

    def _inputs(self) -> list[_Input]:
        if self._found is None:
            self._found = self._find()
        return self._found

    def _find(self) -> list[_Input]:
        explicit = {"validation": self._cfg.validation_path, "test": self._cfg.test_path}
        found: list[tuple[LocalFile | HubDataset, str | None]] = []
        for where, split in self._open("dataset.path", self._cfg.path):
            if split in explicit and explicit[split] is not None:
                self.notes.append(f"{where.shown}: not read, dataset.{split}_path stands in its place")
            else:
                found.append((where, None if split == "train" else split))
        for name, path in explicit.items():
            if path is not None:
                found += [(where, name) for where, _ in self._open(f"dataset.{name}_path", path)]
        self._check_disjoint(found)
        for name, fraction in self._fractions.items():
            if fraction and any(split == name for _, split in found):
                self._fractions[name] = 0.0
                self.notes.append(f"dataset.{name}_fraction is not used: files of their own are the {name} split")
        return [_Input(w, s, Source(w.shown, _sha256(w))) for w, s in found]

    def _open(self, key: str, path: str) -> list[tuple[LocalFile | HubDataset, str | None]]:
        if is_hub(path):
            return [(HubDataset(path), None)]
        files, notes = locate(key, path)
        self.notes += notes
        return [(file, file.split) for file in files]

    def _check_disjoint(self, found: list[tuple[LocalFile | HubDataset, str | None]]) -> None:
        seen: dict[str, str | None] = {}
        for where, split in found:
            if not where.shown.isascii() and where.shown.encode(errors="ignore").decode() != where.shown:
                raise DataError(ascii(where.shown), "the file's name is not UTF-8", remedy="rename it")
            identity = where.shown if isinstance(where, HubDataset) else str(where.path.resolve())
            if identity in seen:
                names = " and ".join(sorted({seen[identity] or "train", split or "train"}))
                raise DataError(
                    where.shown, f"the same file is read twice, for {names}", remedy="give each split its own"
                )
            seen[identity] = split

    def _rows_of(self, each: _Input) -> Iterator[tuple[str, AnyRecord | Reject]]:
        raw = each.raw_rows()
        head = list(itertools.islice(raw, SAMPLE_ROWS))
        samples = [row.value for row in head if isinstance(row.value, dict)]
        chosen = self._choose(each, samples) if samples else None
        for row in itertools.chain(head, raw):
            each.source.rows += 1
            origin = Origin(each.source.path, row.line, row.part)
            if chosen is None:
                chosen = self._choose(each, [row.value]) if isinstance(row.value, dict) else None
            try:
                record = _record(chosen, row, origin)
            except RowFault as fault:
                yield each.split or "train", Reject(origin, fault.reason, fault.detail)
            else:
                yield each.split or self._split_of(record), record

    def _choose(self, each: _Input, samples: list[dict[str, Any]]) -> Format:
        wanted, columns = self._cfg.format, self._cfg.columns
        if each.is_plain_text:
            if wanted not in (RecordFormat.auto, RecordFormat.text):
                raise DataError(each.source.path, f"a .txt file holds plain text, not {wanted.value}")
            wanted, columns = RecordFormat.text, {}
        chosen, why = choose(each.source.path, samples, wanted, columns, self._cfg.system)
        self.notes.append(f"{each.source.path}: read as {why}")
        return chosen

    def _split_of(self, record: AnyRecord) -> str:
        """By a hash of the content: neither order nor other records matter, and equal records stay together."""
        validation, test = self._fractions["validation"], self._fractions["test"]
        if not validation and not test:
            return SPLITS[0]
        digest = hashlib.sha256(content_json(record).encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        return "test" if point < test else "validation" if point < test + validation else "train"


def _record(chosen: Format | None, row: RawRow, origin: Origin) -> AnyRecord:
    if isinstance(row.value, RowFault):
        raise row.value
    if not isinstance(row.value, dict):
        raise RowFault("a row is not an object", kind_of(row.value))
    assert chosen is not None
    return chosen.read(row.value, origin)


def _sha256(where: LocalFile | HubDataset) -> str:
    return where.sha256() if isinstance(where, HubDataset) else file_sha256(where.path, where.shown)
