"""Reads a folder of prepared data, memory-mapped: memory does not grow with the data set.

Costs 8 bytes a sample (its length and its number of supervised tokens) in RAM; token ids stay on disk. Of the kinds of
data, only samples are read; of the others it is said what they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from configs.errors import DataError
from train.data.mix import Share

FORMAT_VERSION = 2
PREPARE_AGAIN = "prepare the data again"


class DataKind(Enum):
    """What a row of a folder is."""

    samples = "samples"
    """A text of which spans are learned."""
    pairs = "pairs"
    """Two answers to one prompt, of which one was chosen."""
    votes = "votes"
    """An answer that was liked or not."""


_AS_SAMPLES = {
    DataKind.pairs: "prepare the data again with dataset.preference=chosen, which learns the chosen answers",
    DataKind.votes: "prepare data whose answers are all to be learned, in another dataset.format than vote",
}
"""What to do with data of a kind where samples are needed."""


@dataclass(frozen=True)
class ImageRef:
    """An image that a sample shows."""

    sha256: str
    """Of its bytes; names its file in the prepared folder."""
    grid: tuple[int, int, int]
    """Patches: frames (1), rows, columns."""


@dataclass(frozen=True)
class Sample:
    """One tokenised record."""

    id: str
    input_ids: np.ndarray
    """``[t]`` int32."""
    spans: np.ndarray
    """``[n x 2]`` int32: half-open ranges of token indices that are supervised. Index 0 never is."""
    images: tuple[ImageRef, ...] = ()
    """In the order of their tokens."""


class PreparedSplit:
    """One split: lengths in memory, samples on demand."""

    def __init__(self, folder: Path, shards: list[str]) -> None:
        self._tables = [_map_shard(folder / shard) for shard in shards]
        self._starts = np.cumsum([0] + [len(t) for t in self._tables])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        table, row = self._tables[shard], index - int(self._starts[shard])
        return Sample(
            id=table["id"][row].as_py(),
            input_ids=_row(table["input_ids"], row),
            spans=_row(table["spans"], row).reshape(-1, 2),
            images=_images(table, row),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[n]`` int32, tokens of each sample."""
        return self._per_sample(lambda t: _list_lengths(t["input_ids"]))

    @cached_property
    def supervised(self) -> np.ndarray:
        """``[n]`` int32, supervised tokens of each sample."""
        return self._per_sample(_supervised)

    def _per_sample(self, figure: Callable[[pa.Table], np.ndarray]) -> np.ndarray:
        parts = [figure(table) for table in self._tables]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


class PreparedData:
    """A folder made by `crosstune prep`."""

    def __init__(self, path: Path, manifest: dict[str, Any], kind: DataKind) -> None:
        self.path, self.manifest, self.kind = path, manifest, kind

    @classmethod
    def open(cls, path: Path) -> PreparedData:
        """Opens the folder.

        Raises:
            DataError: it is not prepared data, is unfinished, or of another format version.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
            version = manifest["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(str(path), f"format {version}", allowed=str(FORMAT_VERSION), remedy=PREPARE_AGAIN)
            if not isinstance(manifest["splits"], dict):
                raise TypeError("splits")
            return cls(path, manifest, DataKind(manifest["kind"]))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                str(path), "no manifest.json: not a folder of prepared data", remedy="crosstune prep"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(str(path / "manifest.json"), f"damaged: {error!r}", remedy=PREPARE_AGAIN) from None

    def require(self, kind: DataKind, user: str) -> PreparedData:
        """This data, if it is of the kind that its user needs.

        Args:
            kind: what is needed.
            user: who needs it, in words.

        Raises:
            DataError: it is of another kind.
        """
        if self.kind is kind:
            return self
        remedy = _AS_SAMPLES.get(self.kind) if kind is DataKind.samples else f"prepare data of kind {kind.value}"
        raise DataError(str(self.path), f"holds {self.kind.value}, and {user} needs {kind.value}", remedy=remedy)

    @property
    def has_images(self) -> bool:
        """Whether any sample shows an image."""
        return "images" in self.manifest

    def split_names(self) -> list[str]:
        """The splits that are there."""
        return sorted(self.manifest["splits"])

    def split(self, name: str) -> PreparedSplit:
        """Maps one split.

        Raises:
            DataError: there is no such split.
        """
        splits = self.manifest["splits"]
        if name not in splits:
            raise DataError(str(self.path), f"no split '{name}'", allowed=", ".join(self.split_names()))
        shards = splits[name]["shards"]
        split = PreparedSplit(self.path, [shard["file"] for shard in shards])
        if len(split) != (rows := sum(shard["rows"] for shard in shards)):
            found = f"the shards of '{name}' hold {len(split)} rows, the manifest says {rows}"
            raise DataError(str(self.path), found, remedy=PREPARE_AGAIN)
        return split

    def mix(self) -> tuple[Share, ...]:
        """How often an epoch shows each source of the training split; empty: it shows every sample once.

        Raises:
            DataError: the manifest does not say so of one of them.
        """
        mix = self.manifest.get("mix")
        if not mix:
            return ()
        ranges: dict[str, list[tuple[int, int]]] = {}
        at = 0
        try:
            for shard in self.manifest["splits"]["train"]["shards"]:
                ranges.setdefault(shard["source"], []).append((at, at + shard["rows"]))
                at += shard["rows"]
            shares = tuple(Share(name, float(mix[name]["epochs"]), tuple(found)) for name, found in ranges.items())
            if not all(0 < share.epochs < math.inf for share in shares):
                raise ValueError("epochs")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(str(self.path / "manifest.json"), f"damaged mix: {error!r}", remedy=PREPARE_AGAIN) from None
        return shares


def _map_shard(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(str(path), f"does not open: {error}", remedy=PREPARE_AGAIN) from None


def _images(table: pa.Table, row: int) -> tuple[ImageRef, ...]:
    """Shards without images have no columns for them."""
    if "images" not in table.column_names:
        return ()
    hashes, flat = table["images"][row].as_py(), table["image_grids"][row].as_py()
    grids = zip(flat[::3], flat[1::3], flat[2::3], strict=True)
    return tuple(ImageRef(sha256, grid) for sha256, grid in zip(hashes, grids, strict=True))


def _row(column: pa.ChunkedArray, row: int) -> np.ndarray:
    """The numbers of one list, without a copy."""
    return _numbers(column[row].values)


def _numbers(array: pa.Array) -> np.ndarray:
    """The array itself, read-only. Its own `to_numpy` imports pandas, half a second of every rank's start."""
    values: np.ndarray = np.from_dlpack(array)
    return values


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    parts = [np.diff(_numbers(chunk.offsets)) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _supervised(table: pa.Table) -> np.ndarray:
    """Sum of end - start over the spans of each row."""
    parts = []
    for chunk in table["spans"].chunks:
        offsets, flat = _numbers(chunk.offsets), _numbers(chunk.values)
        running = np.concatenate([[0], np.cumsum(flat[1::2] - flat[0::2])])
        parts.append(running[offsets[1:] // 2] - running[offsets[:-1] // 2])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
