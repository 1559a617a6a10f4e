"""A weight in few bits, and how it is read back in bf16: piece by piece, straight from the file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from configs.errors import ModelError
from train.export.tensors import Stored
from train.models.dequantise import Coding, decode_scales, dequantise

PIECE = 2**25
"""Bytes of codes that are read at a time."""
REOPEN = 2**26
"""Bytes that are read from a file before it is mapped anew: pages that were read count as memory until then."""
DAMAGED = "fetch the file again: the download is damaged"


@dataclass(frozen=True)
class Quantised:
    """A weight in few bits, with the scales of its blocks."""

    name: str
    """Of the whole weight."""
    shape: tuple[int, ...]
    """Of the whole weight: one matrix, or a stack of them."""
    codes: Stored
    scales: Stored
    coding: Coding
    block: tuple[int, int]
    """Rows and columns of the stored matrix that share a scale."""
    turned: bool = False
    """The stored matrices are the weight's, transposed."""

    def read(self, shards: Shards) -> torch.Tensor:
        """All of it in bf16; beside it a piece of the file is in memory.

        Raises:
            ModelError: a scale is no finite number.
        """
        out = torch.empty(self.shape, dtype=torch.bfloat16)
        for at in range(math.prod(self.shape[:-2])):
            stack = (at,) if len(self.shape) > 2 else ()
            target = out[stack].T if self.turned else out[stack]
            scales = self._scales(shards, stack)
            for start, codes in self._pieces(shards, stack, target.shape[0]):
                dequantise(
                    codes,
                    scales,
                    self.coding,
                    cols=target.shape[1],
                    block=self.block,
                    first_row=start,
                    out=target[start : start + codes.shape[0]],
                )
        return out

    def _scales(self, shards: Shards, stack: tuple[int, ...]) -> torch.Tensor:
        """Those of one matrix: (block rows, block columns)."""
        one_for_all = math.prod(self.scales.shape) == 1
        scales = decode_scales(shards.read(self.scales, () if one_for_all else stack))
        if not scales.isfinite().all():
            raise ModelError(str(self.scales.file), f"{self.scales.name} holds NaN or infinity", remedy=DAMAGED)
        rows = self.shape[-1] if self.turned else self.shape[-2]
        return scales.reshape(math.ceil(rows / self.block[0]), -1)

    def _pieces(self, shards: Shards, stack: tuple[int, ...], rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        row_bytes = math.prod(self.codes.shape[len(stack) + 1 :]) * self.codes.dtype.itemsize
        step = max(1, PIECE // max(1, row_bytes))
        for start in range(0, rows, step):
            codes = shards.read(self.codes, (*stack, slice(start, min(rows, start + step))))
            yield start, codes.flatten(1)


class Shards:
    """Reads from the files of a model, one file mapped at a time, and never for long."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._opened: Any = None
        self._bytes = 0

    def read(self, stored: Stored, part: tuple[int | slice, ...] = ()) -> torch.Tensor:
        """A tensor, or the `part` of it."""
        if stored.file != self._file or self._bytes > REOPEN:
            self._opened = None  # unmapped before the next one is mapped
            self._opened, self._file, self._bytes = safe_open(stored.file, "pt"), stored.file, 0
        tensor: torch.Tensor
        tensor = self._opened.get_slice(stored.name)[part] if part else self._opened.get_tensor(stored.name)
        self._bytes += tensor.nbytes
        return tensor
