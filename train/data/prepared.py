"""Reads a folder of prepared data, memory-mapped: memory does not grow with the data set.

Costs 8 bytes a sample (its length and its number of supervised tokens) in RAM; token ids stay on disk.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from configs.errors import DataError

FORMAT_VERSION = 1
PREPARE_AGAIN = "prepare the data again"


@dataclass(frozen=True)
class Sample:
    """One tokenised record."""

    id: str
    input_ids: np.ndarray
    """``[t]`` int32."""
    spans: np.ndarray
    """``[n x 2]`` int32: half-open ranges of token indices that are supervised. Index 0 never is."""


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
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[n]`` int32, tokens of each sample."""
        return self._per_sample(lambda t: _list_lengths(t["input_ids"]))

    @cached_property
    def supervised(self) -> np.ndarray:
        """``[n]`` int32, supervised tokens of each sample."""
        return self._per_sample(_supervised)

    def _per_sample(self, figure: Any) -> np.ndarray:
        parts = [figure(table) for table in self._tables]
        return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)


class PreparedData:
    """A folder made by `crosstune prep`."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, path: Path) -> PreparedData:
        """Opens the folder.

        Raises:
            DataError: it is not prepared data, is unfinished, or of another format version.
        """
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            version, splits = manifest["format_version"], manifest["splits"]
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                str(path), "no manifest.json: not a folder of prepared data", remedy="crosstune prep"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(str(path / "manifest.json"), f"damaged: {error!r}", remedy=PREPARE_AGAIN) from None
        if version != FORMAT_VERSION:
            raise DataError(str(path), f"format {version}", allowed=str(FORMAT_VERSION), remedy=PREPARE_AGAIN)
        assert isinstance(splits, dict)
        return cls(path, manifest)

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
        return PreparedSplit(self.path, [shard["file"] for shard in splits[name]["shards"]])


def _map_shard(path: Path) -> pa.Table:
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(str(path), f"does not open: {error}", remedy=PREPARE_AGAIN) from None


def _row(column: pa.ChunkedArray, row: int) -> np.ndarray:
    """The numbers of one list, without a copy."""
    values: np.ndarray = column[row].values.to_numpy(zero_copy_only=True)
    return values


def _list_lengths(column: pa.ChunkedArray) -> np.ndarray:
    parts = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def _supervised(table: pa.Table) -> np.ndarray:
    """Sum of end - start over the spans of each row."""
    parts = []
    for chunk in table["spans"].chunks:
        offsets = chunk.offsets.to_numpy()
        flat = chunk.values.to_numpy()
        running = np.concatenate([[0], np.cumsum(flat[1::2] - flat[0::2])])
        parts.append(running[offsets[1:] // 2] - running[offsets[:-1] // 2])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
