"""The seam between where records come from and what becomes of them.

A `Dataset` is a list of parts, mostly one a file. The main process reads a part in chunks, as little decoded as the
kind of file allows; a worker makes records of a chunk. Which bytes are a chunk depends on the file alone, so that the
number of workers shows in no result, and reading can begin again after any of them.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.schema.dataset import DatasetConfig, SplitBy
from data_prep.records import AnyRecord, Reject

SPLITS = ("train", "validation", "test")


@dataclass
class Source:
    """Something that is read: a file, a folder, a hub data set."""

    path: str
    """As the config named it."""
    name: str
    """Of the mixture's source, or of the data set."""
    bytes: int = 0
    """Size as stored."""


@dataclass(frozen=True)
class Preview:
    """The first rows of a source, read but neither cleaned nor rendered."""

    source: Source
    split: str | None
    """Split that all its rows are for; None: each row's is decided by the row."""
    recognised: str
    """What it is read as and why, e.g. ``alpaca (columns 'instruction' and 'output')``."""
    items: list[AnyRecord | Reject]
    bytes_read: int
    """Bytes of the source that `items` take, about; with `Source.bytes` it tells how many rows there are."""


@dataclass(frozen=True, slots=True)
class Holdout:
    """How rows without a split of their own are held out."""

    by: SplitBy
    validation: float
    """Share of rows."""
    test: float
    seed: int = 0

    @property
    def needs_survey(self) -> bool:
        """Whether a row's split depends on other rows."""
        return self.by in (SplitBy.group, SplitBy.random)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a part between two chunks, in the part's own terms (bytes or rows), with the lines before it."""

    offset: int = 0
    line: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some rows of a part. Only the payload goes to a worker."""

    payload: Any
    end: Mark
    stored: int
    """Bytes of the source, as stored, from its beginning to the end of this chunk, about."""
    size: int = 0
    """Bytes of the payload, about, where it may be much larger than others."""


@dataclass(slots=True)
class Row:
    """What a raw row became."""

    item: AnyRecord | Reject
    split: str | None = None
    """None: as the part or its holdout says."""
    key: str | None = None
    """Value of the split key as text, where the holdout goes by one."""


class Part(ABC):
    """Rows of one source.

    Args:
        source: what is read.
        split: of all its rows; None: `holdout` decides, or each row.
        holdout: None: rows without a split are for training.
    """

    def __init__(self, source: Source, *, split: str | None = None, holdout: Holdout | None = None) -> None:
        self.source, self.split, self.holdout = source, split, holdout

    @abstractmethod
    def stamp(self) -> list[Any]:
        """What changes when the content does and is known without reading it (size, time); JSON values.

        Raises:
            DataError: the source is gone.
        """

    @abstractmethod
    def sha256(self) -> str:
        """Hash of the content.

        Raises:
            DataError: it cannot be read.
        """

    @abstractmethod
    def chunks(self, after: Mark = Mark()) -> Iterator[Chunk]:  # noqa: B008 (frozen)
        """The chunks from a mark on; called in the main process. Memory stays bounded.

        Raises:
            DataError: the source cannot be read, or not to its end.
        """

    @abstractmethod
    def rows(self, payload: Any) -> Iterator[Row]:
        """The rows of a chunk; called in a worker, which has this object as it was when the workers began."""


class Dataset(ABC):
    """Records, each for a split. To add one: a subclass, a schema with its `_target_`, a YAML.

    Args:
        cfg: the dataset group of the config.
        seed: the root config's seed, for data sets that choose among their rows.
    """

    def __init__(self, cfg: DatasetConfig, *, seed: int = 0) -> None:
        self.name, self.license, self.seed = cfg.name, cfg.license, seed
        self.notes: list[str] = []
        """What a reader of the manifest should know: what was recognised, what was left out by choice."""
        self.cleaned: Counter[str] = Counter()
        """What cleaning changed before the rows came here (`corpus`)."""
        self.duplicates: Mapping[str, int] | None = None
        """The manifest's entry, where duplicates were taken out before the rows came here (`corpus`)."""

    @abstractmethod
    def parts(self) -> list[Part]:
        """What will be read, the parts of one source name one after the other; the same objects on every call.

        Raises:
            DataError: there is nothing there.
        """

    @abstractmethod
    def open(self) -> None:
        """Looks into the sources so that the parts know how to read them; called once, before any chunk is read.

        Raises:
            DataError: a source cannot be read, or what it holds cannot be told.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Whatever of the config, besides the sources' content, decides what the rows become; JSON values."""

    @abstractmethod
    def preview(self, rows: int) -> list[Preview]:
        """The first `rows` rows of each source, without reading more than these need.

        Raises:
            DataError: a source cannot be read, or what it holds cannot be told.
        """


class RowsDataset(Dataset):
    """A data set of one source that is held in memory, or made row by row; see `rows`."""

    @abstractmethod
    def source(self) -> tuple[Source, str]:
        """What is read, and the hash of its content.

        Raises:
            DataError: there is nothing there, or it cannot be read.
        """

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, AnyRecord | Reject]]:
        """Pairs of (split, record or reject), in an order that depends on the content alone.

        Raises:
            DataError: nothing is left.
        """

    def parts(self) -> list[Part]:
        """See `Dataset.parts`."""
        return [_RowsPart(self)]

    def open(self) -> None:
        """See `Dataset.open`."""
        self.source()

    def preview(self, rows: int) -> list[Preview]:
        """See `Dataset.preview`."""
        source, found = self.source()[0], [row for _, row in self.rows()]
        items = found[:rows]
        return [Preview(source, None, self.name, items, source.bytes * len(items) // max(1, len(found)))]


class _RowsPart(Part):
    """The rows of a `RowsDataset`. They are made anew on each reading; a mark counts them."""

    _ROWS = 512

    def __init__(self, dataset: RowsDataset) -> None:
        self._dataset = dataset
        super().__init__(dataset.source()[0])

    def stamp(self) -> list[Any]:
        return [self.sha256()]

    def sha256(self) -> str:
        return self._dataset.source()[1]

    def chunks(self, after: Mark = Mark()) -> Iterator[Chunk]:  # noqa: B008 (frozen)
        rows = itertools.islice(self._dataset.rows(), after.offset, None)
        done = after.offset
        while batch := list(itertools.islice(rows, self._ROWS)):
            done += len(batch)
            yield Chunk(batch, Mark(done), self.source.bytes)

    def rows(self, payload: list[tuple[str, AnyRecord | Reject]]) -> Iterator[Row]:
        return (Row(item, split) for split, item in payload)


def file_sha256(path: Path, shown: str | None = None) -> str:
    """Hash of a file's content.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(shown or str(path), f"cannot be read: {error.strerror}") from error
