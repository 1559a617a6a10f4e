"""Records out of files, globs, folders and hub data sets.

`locate.py` says which files a path means and for which split, `readers.py` and `hub.py` read them in chunks, `formats/`
makes records of raw rows. Here these are put together.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.errors import ConfigError, DataError, nearest
from configs.schema.dataset import FilesDatasetConfig, RecordFormat, SplitBy
from data_prep.dataset import Chunk, Dataset, Holdout, Mark, Part, Preview, Row, Source, file_sha256
from data_prep.formats import FORMATS, Format
from data_prep.formats.detect import SAMPLE_ROWS, choose
from data_prep.hub import HubDataset, is_hub
from data_prep.locate import LocalFile, locate
from data_prep.raw import Block, RawRow
from data_prep.readers import kind_of_file, read_chunks
from data_prep.records import Origin, Reject, RowFault, kind_of

__all__ = ["Dataset", "FilesDataset", "Source"]

_Where = LocalFile | HubDataset

_NO_OBJECT_ROWS = 10_000
"""A file whose first rows, as many as this, hold no object is not looked through to its end for one."""


class FilePart(Part):
    """A file, or a split of a hub data set.

    Args:
        where: what is read.
        name: of the source it belongs to.
        cfg: how it is read.
        split: see `Part`.
        holdout: see `Part`.
    """

    def __init__(
        self, where: _Where, name: str, cfg: FilesDatasetConfig, *, split: str | None, holdout: Holdout | None
    ) -> None:
        self._where, self._cfg = where, cfg
        self._paths = where.files if isinstance(where, HubDataset) else [where.path]
        super().__init__(Source(where.shown, name, sum(s[1] for s in self.stamp())), split=split, holdout=holdout)
        self._key = cfg.split_key if holdout is not None else None
        self.format: Format | None = None
        self.recognised = "nothing: it holds no object"

    def stamp(self) -> list[Any]:
        """See `Part.stamp`: path, size and times of change of each file."""
        try:
            stats = [(str(path.resolve()), path.stat()) for path in self._paths]
        except OSError as error:
            raise DataError(self._where.shown, f"cannot be read: {error.strerror}") from error
        return [[path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]

    def sha256(self) -> str:
        """See `Part.sha256`."""
        where = self._where
        return where.sha256() if isinstance(where, HubDataset) else file_sha256(where.path, where.shown)

    def chunks(self, after: Mark = Mark()) -> Iterator[Chunk]:  # noqa: B008 (frozen)
        """See `Part.chunks`."""
        where = self._where
        return where.chunks(after) if isinstance(where, HubDataset) else read_chunks(where.path, where.shown, after)

    def head(self) -> list[dict[str, Any]]:
        """The objects among the first rows, or the first object that comes.

        Raises:
            DataError: it cannot be read, or no object is near its beginning.
        """
        rows = (row for chunk in self.chunks() for row in chunk.payload.rows())
        found = [row.value for row in itertools.islice(rows, SAMPLE_ROWS) if isinstance(row.value, dict)]
        if found:
            return found
        for row in itertools.islice(rows, _NO_OBJECT_ROWS):
            if isinstance(row.value, dict):
                return [row.value]
        if next(rows, None) is not None:
            raise DataError(self.source.path, f"none of its first {_NO_OBJECT_ROWS:,} rows is a JSON object")
        return []

    def choose(self, head: list[dict[str, Any]], elsewhere: set[str]) -> None:
        """Decides how rows are read.

        Args:
            head: objects of this file.
            elsewhere: columns of the other files.

        Raises:
            ConfigError: a setting does not fit the format.
            DataError: the format cannot be told, or a column is missing.
        """
        if not head:
            return
        cfg, shown = self._cfg, self.source.path
        wanted, columns = cfg.format, _present(cfg.columns, {str(c) for row in head for c in row}, elsewhere)
        if isinstance(self._where, LocalFile) and kind_of_file(self._where.path) == "txt":
            if wanted not in (RecordFormat.auto, RecordFormat.text):
                raise DataError(shown, f"a .txt file holds plain text, not {wanted.value}")
            wanted, columns = RecordFormat.text, {}
        self.format, self.recognised = choose(
            shown, head, wanted, columns, cfg.system, roles=cfg.roles, preference=cfg.preference, learn=cfg.learn
        )
        if wanted is not cfg.format:
            self.recognised = "text (a .txt file)"
        if gone := sorted(set(cfg.columns) - set(columns)) if wanted is not RecordFormat.text else []:
            self.recognised += f", without {', '.join(cfg.columns[c] for c in gone)}, which other files have"

    def rows(self, payload: Block) -> Iterator[Row]:
        """See `Part.rows`."""
        for raw in payload.rows():
            origin = Origin(self.source.path, raw.line, raw.part)
            try:
                row = self._row(raw, origin)
            except RowFault as fault:
                row = Row(Reject(origin, fault.reason, fault.detail))
            yield row

    def _row(self, raw: RawRow, origin: Origin) -> Row:
        value = raw.value
        if isinstance(value, RowFault):
            raise value
        if not isinstance(value, dict):
            raise RowFault("a row is not an object", kind_of(value))
        assert self.format is not None
        record = self.format.read(value, origin)
        if self._key is None:
            return Row(record)
        key = _key_of(value.get(self._key))
        if not key:
            raise RowFault("no split key", f"column {self._key}")
        return Row(record, key=key)

    def preview(self, rows: int) -> Preview:
        """See `Dataset.preview`."""
        found: list[Row] = []
        begin = end = before = 0
        for chunk in self.chunks():
            begin, end, before = end, chunk.stored, len(found)
            found += self.rows(chunk.payload)
            if len(found) >= rows:
                break
        share = (min(rows, len(found)) - before) / max(1, len(found) - before)
        read = begin + round((end - begin) * share)
        return Preview(self.source, self.split, self.recognised, [row.item for row in found[:rows]], read)


class FilesDataset(Dataset):
    """See `FilesDatasetConfig`.

    Args:
        cfg: what to read.
        seed: for ``split_by`` group and random.
        place: of `cfg` in the whole config, for messages.
    """

    def __init__(self, cfg: FilesDatasetConfig, *, seed: int = 0, place: str = "dataset") -> None:
        super().__init__(cfg, seed=seed)
        self._cfg, self._place = cfg, place
        self._parts: list[FilePart] | None = None

    def settings(self) -> dict[str, Any]:
        """See `Dataset.settings`. The seed is in it only where it is used: held-out records should stay held out."""
        cfg = self._cfg
        by_seed = cfg.split_by in (SplitBy.group, SplitBy.random)
        return {
            "splits": [[part.split, part.source.path] for part in self.parts()],
            "format": cfg.format.value,
            "columns": dict(sorted(cfg.columns.items())),
            "roles": dict(sorted(cfg.roles.items())),
            "system": cfg.system,
            "learn": cfg.learn.value,
            "preference": cfg.preference.value,
            "fractions": [cfg.validation_fraction, cfg.test_fraction],
            "split_by": [cfg.split_by.value, cfg.split_key, self.seed if by_seed else None],
        }

    def parts(self) -> list[Part]:
        """See `Dataset.parts`."""
        return list(self._files())

    def open(self) -> None:
        """See `Dataset.open`."""
        heads = [part.head() for part in self._files()]
        columns = [{str(column) for row in head for column in row} for head in heads]
        everywhere = set().union(*columns)
        self._check_split_key(everywhere)
        for part, head in zip(self._files(), heads, strict=True):
            self._choose(part, head, everywhere)
        for why, same in itertools.groupby(self._files(), key=lambda part: part.recognised):
            first, *more = same
            others = f" and the next {len(more)}" if more else ""
            self.notes.append(f"{first.source.path}{others}: read as {why}")

    def _check_split_key(self, columns: set[str]) -> None:
        key = self._cfg.split_key
        if not key or not columns or key in columns or not any(part.holdout for part in self._files()):
            return
        near = nearest(key, columns)
        raise ConfigError(
            f"{self._place}.split_key",
            f"no column '{key}' in the first rows of {self._cfg.path}",
            allowed=", ".join(sorted(columns)),
            remedy=near and f"did you mean {near}?",
        )

    def preview(self, rows: int) -> list[Preview]:
        """See `Dataset.preview`."""
        self.open()
        return [part.preview(rows) for part in self._files()]

    def _choose(self, part: FilePart, head: list[dict[str, Any]], everywhere: set[str]) -> None:
        try:
            part.choose(head, everywhere)
        except ConfigError as fault:
            where = f"{self._place}.{fault.where.removeprefix('dataset.')}"
            raise ConfigError(where, fault.found, allowed=fault.allowed, remedy=fault.remedy) from None

    def _files(self) -> list[FilePart]:
        if self._parts is None:
            found = self._find()
            holdout = self._holdout({split for _, split in found})
            self._parts = [FilePart(w, self.name, self._cfg, split=s, holdout=None if s else holdout) for w, s in found]
            check_disjoint(self._parts)
        return self._parts

    def _find(self) -> list[tuple[_Where, str | None]]:
        """What is read and for which split; None: `path` without a fixed split, so the holdout decides."""
        explicit = {"validation": self._cfg.validation_path, "test": self._cfg.test_path}
        found: list[tuple[_Where, str | None]] = []
        for where, split in self._open(f"{self._place}.path", self._cfg.path):
            if split in explicit and explicit[split] is not None:
                self.notes.append(f"{where.shown}: not read, {self._place}.{split}_path stands in its place")
            else:
                found.append((where, None if split == "train" else split))
        for name, path in explicit.items():
            if path is not None:
                found += [(where, name) for where, _ in self._open(f"{self._place}.{name}_path", path)]
        return found

    def _open(self, key: str, path: str) -> Sequence[tuple[_Where, str | None]]:
        if is_hub(path):
            return [(HubDataset(path), None)]
        files, notes = locate(key, path)
        self.notes += notes
        return [(file, file.split) for file in files]

    def _holdout(self, splits: set[str | None]) -> Holdout | None:
        shares = {"validation": self._cfg.validation_fraction, "test": self._cfg.test_fraction}
        for name in shares:
            if shares[name] and name in splits:
                shares[name] = 0.0
                self.notes.append(f"{self._place}.{name}_fraction is not used: files of their own are the {name} split")
        return Holdout(self._cfg.split_by, **shares, seed=self.seed) if any(shares.values()) else None


def check_disjoint(parts: Sequence[FilePart]) -> None:
    """Refuses what is read twice.

    Raises:
        DataError: a file is in two sources or two splits, or its name cannot be written down.
    """
    seen: dict[str, FilePart] = {}
    for part in parts:
        path = part.source.path
        if path.encode(errors="ignore").decode() != path:
            raise DataError(ascii(path), "the file's name is not UTF-8", remedy="rename it")
        identity = part.stamp()[0][0] if part.stamp() else path
        if (other := seen.setdefault(identity, part)) is part:
            continue
        if other.source.name != part.source.name:
            names = " and ".join(sorted({other.source.name, part.source.name}))
            raise DataError(path, f"is read by two sources, {names}", remedy="give each source files of its own")
        names = " and ".join(sorted({other.split or "train", part.split or "train"}))
        raise DataError(path, f"the same file is read twice, for {names}", remedy="give each split its own")


def _key_of(value: Any) -> str:
    """A split key as text, empty for none: 17, "17" and 17.0, as exports of one column write it, are one key."""
    if value is None or value != value:  # NaN, which tables have for null
        return ""
    if isinstance(value, dict | list):
        return json.dumps(value, sort_keys=True, default=str)
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _present(columns: Mapping[str, str], here: set[str], everywhere: set[str]) -> dict[str, str]:
    """The mapping without what no format needs and this file lacks, if other files have it."""
    needed = {column for known in FORMATS.values() for column in known.required}
    return {
        ours: theirs for ours, theirs in columns.items() if ours in needed or theirs in here or theirs not in everywhere
    }
