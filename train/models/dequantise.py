"""Weights of few bits back to bf16: pure functions of tensors, on the CPU.

A value is ``code x scale``, multiplied in fp32 and rounded once, as the makers' own converters do. Codes go through a
table of 256 entries: torch's conversion from fp8 is several times slower on a CPU.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import numpy as np
import torch

CHUNK = 2**18
"""Values that are decoded at a time: few enough to stay in a processor's cache."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of an FP4 code without its sign, which is the highest bit."""


class Coding(Enum):
    """How the values of a weight lie in its bytes. Several in a byte or word: the first one in the lowest bits."""

    e4m3 = "fp8 e4m3"
    e5m2 = "fp8 e5m2"
    fp4 = "fp4 e2m1"
    """Two in a byte."""
    int8 = "int8"
    """With a sign, one in a byte."""
    packed_int4 = "int4 in int32 words"
    """Eight in a word, each plus 8."""
    packed_int8 = "int8 in int32 words"
    """Four in a word, each plus 128."""

    @property
    def per_byte(self) -> int:
        """Values in a byte."""
        return 2 if self in (Coding.fp4, Coding.packed_int4) else 1


@cache
def _table(coding: Coding) -> np.ndarray:
    """Value, or pair of values, of each byte; a pair is seen as one number of 8 bytes."""
    byte = torch.arange(256, dtype=torch.uint8)
    if coding is Coding.e4m3:
        return byte.view(torch.float8_e4m3fn).float().numpy()
    if coding is Coding.e5m2:
        return byte.view(torch.float8_e5m2).float().numpy()
    if coding is Coding.int8:
        return byte.view(torch.int8).float().numpy()
    if coding is Coding.packed_int8:
        return byte.float().sub_(128).numpy()
    if coding is Coding.packed_int4:
        of_code = torch.arange(16.0) - 8
    else:
        of_code = torch.tensor([*E2M1, *(-value for value in E2M1)])
    pairs = torch.stack([of_code[(byte & 15).long()], of_code[(byte >> 4).long()]], dim=1)
    return pairs.numpy().view(np.int64)[:, 0].copy()


def decode(codes: torch.Tensor, coding: Coding) -> torch.Tensor:
    """Values of `codes` (rows, bytes or words) in fp32: (rows, values), padding of the last word included."""
    in_bytes = codes.contiguous().view(torch.uint8).numpy()
    # Every byte has an entry, so clipping changes nothing; it spares numpy the check.
    values = np.take(_table(coding), in_bytes, mode="clip").view(np.float32)
    return torch.from_numpy(values)


def decode_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales in fp32. One byte each: a power of two, ``2 ** (byte - 127)``; 255 is no number."""
    if scales.dtype not in (torch.uint8, torch.float8_e8m0fnu):
        return scales.float()
    return scales.view(torch.float8_e8m0fnu).float()


def dequantise(
    codes: torch.Tensor,
    scales: torch.Tensor,
    coding: Coding,
    *,
    cols: int,
    block: tuple[int, int],
    first_row: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some rows of a matrix, in bf16.

    Args:
        codes: of these rows: (rows, bytes or words).
        scales: of the whole matrix, in fp32: (block rows, block columns); the last ones may cover partial blocks.
        coding: of `codes`.
        cols: values in a row.
        block: rows and columns that share a scale.
        first_row: number of the first of these rows in the matrix.
        out: where to write, of any strides: (rows, cols) in bf16. None: a new tensor.
    """
    rows = codes.shape[0]
    made = torch.empty(rows, cols, dtype=torch.bfloat16) if out is None else out
    step = max(1, CHUNK // max(1, cols))
    for start in range(0, rows, step):
        values = decode(codes[start : start + step], coding)[:, :cols]
        at = torch.arange(first_row + start, first_row + start + values.shape[0])
        _multiply(values, scales[at // block[0]], block[1])
        made[start : start + step] = values
    return made


def _multiply(values: torch.Tensor, scales: torch.Tensor, width: int) -> None:
    """In place: each row's values (rows, cols) by its scales (rows, block columns), `width` columns a scale."""
    whole = values.shape[1] // width
    if whole:
        values[:, : whole * width].view(-1, whole, width).mul_(scales[:, :whole, None])
    if whole * width < values.shape[1]:
        values[:, whole * width :].mul_(scales[:, whole:])
