"""The seam between where records come from and what becomes of them."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.schema.dataset import DatasetConfig
from data_prep.records import AnyRecord, Reject

SPLITS = ("train", "validation", "test")


@dataclass
class Source:
    """Something that was read: a file, a folder, a hub data set."""

    path: str
    """As the config named it."""
    sha256: str
    """Of the content."""
    rows: int = 0
    """Rows read so far, rejects included."""
    name: str = ""
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
    """Bytes of the source that `items` take; with `Source.bytes` it tells about how many rows there are."""


class Dataset(ABC):
    """Yields records, each for a split. To add one: a subclass, a schema with its `_target_`, a YAML.

    `sources` is asked first (its hashes decide whether there is anything to do), then `rows` once.

    Args:
        cfg: the dataset group of the config.
        seed: the root config's seed, for data sets that choose among their rows.
    """

    def __init__(self, cfg: DatasetConfig, *, seed: int = 0) -> None:
        self.name, self.license, self.seed = cfg.name, cfg.license, seed
        self.notes: list[str] = []
        """What a reader of the manifest should know: what was recognised, what was left out by choice."""

    @abstractmethod
    def sources(self) -> list[Source]:
        """What will be read, with content hashes; the same objects on every call.

        Raises:
            DataError: there is nothing there, or it cannot be read.
        """

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, AnyRecord | Reject]]:
        """Pairs of (split, record or reject), in an order that depends on the content alone; memory stays bounded.

        Raises:
            DataError: a source cannot be read at all.
        """

    def preview(self, rows: int) -> list[Preview]:
        """The first `rows` rows of each source, without reading more than these need.

        Raises:
            DataError: a source cannot be read, or what it holds cannot be told.
        """
        items = [row for _, row in itertools.islice(self.rows(), rows)]
        (source,) = self.sources()
        return [Preview(source, None, self.name, items, source.bytes * len(items) // max(1, source.rows))]

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Whatever of the config, besides the sources' content, decides what `rows` yields; JSON values."""


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
