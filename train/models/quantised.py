"""Which weights of a model folder are quantised, and how: from config.json and the headers of the safetensors.

What decides is the tensors: a weight in few bits with its scales beside it. The config only tells the method and the
size of the blocks. Names are those of the makers: DeepSeek, GLM and MiniMax (``quant_method=fp8``), Kimi
(``compressed-tensors``), gpt-oss (``mxfp4``).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import ModelError, first_line
from train.export.tensors import DTYPES, Stored, stored_tensors
from train.models.dequantise import Coding
from train.models.quantised_config import QUANTISATION, Scheme, scheme_of
from train.models.quantised_weight import DAMAGED, Quantised, Shards

_CODED = {torch.float8_e4m3fn: Coding.e4m3, torch.float8_e5m2: Coding.e5m2}
_SCALES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8,
)  # fmt: skip
_PACKED, _SHAPE, _BLOCKS = "weight_packed", "weight_shape", "_blocks"
_REFUSED = {
    "weight_zero_point": "zero points (asymmetric quantisation)",
    "weight_g_idx": "groups in an order of their own (actorder)",
    "weight_global_scale": "a global scale beside the block scales (NVFP4)",
}
_DROPPED = ("activation_scale", "input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
"""Scales of activations and of the key-value cache; training has no use for them."""
_ORPHANS = ("_scale_inv", "weight_scale", "qscale_weight")


@dataclass(frozen=True)
class Original:
    """A model folder some of whose weights are quantised."""

    folder: Path
    method: str
    weights: dict[str, Quantised]
    """By the name of the whole weight, in the order of the files."""
    others: dict[str, Stored]
    """Tensors that stay as they are."""
    left_out: list[str]
    """Tensors that training has no use for."""

    @property
    def codings(self) -> str:
        """What there is, in words: ``192 in fp8 e4m3, 6 in fp4 e2m1``."""
        counts = Counter(weight.coding.value for weight in self.weights.values())
        return ", ".join(f"{count:,} in {coding}" for coding, count in counts.most_common())


def quantised_original(folder: Path) -> Original | None:
    """What is quantised in a model folder; None: nothing is.

    Raises:
        ModelError: a method, a number format or a layout that is not known here; scales that are missing or do not
            fit their weights; files that cannot be read.
    """
    config = _read_config(folder / "config.json")
    scheme = scheme_of(config, folder)
    tensors = stored_tensors(folder)
    if scheme is None:
        if not any(stored.dtype in _CODED for stored in tensors.values()):
            return None
        scheme = Scheme("fp8")  # the numbers say so
    found = _Pairing(folder, scheme, tensors).pair()
    if not found.weights:
        raise ModelError(
            str(folder / "config.json"),
            f"says {scheme.method}, but none of the weights is quantised",
            remedy=f"remove {' and '.join(QUANTISATION)} from it: the weights are whole",
        )
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(str(path), f"cannot be read: {first_line(error)}", remedy=DAMAGED) from None
    return config


class _Pairing:
    """Finds the scales of each weight."""

    def __init__(self, folder: Path, scheme: Scheme, tensors: Mapping[str, Stored]) -> None:
        self.folder, self.scheme, self.tensors = folder, scheme, tensors
        self._shapes = _read_shapes(tensors)
        self._used: set[str] = set()

    def pair(self) -> Original:
        weights: dict[str, Quantised] = {}
        for name, stored in self.tensors.items():
            last = name.rpartition(".")[2]
            if last in _REFUSED:
                raise self._fault(f"{name}: {_REFUSED[last]}, which is not known here", remedy=_OTHER_ORIGINAL)
            weight = self._weight(stored)
            if weight is None:
                continue
            if weight.name in weights or (weight.name != name and weight.name in self.tensors):
                raise self._fault(f"{weight.name} is there twice, whole and as {name}", remedy=DAMAGED)
            weights[weight.name] = weight
            self._used |= {name, weight.scales.name}
        rest = {name: stored for name, stored in self.tensors.items() if name not in self._used}
        left_out = [n for n in rest if n.rpartition(".")[2] in _DROPPED]
        others = {n: stored for n, stored in rest.items() if n not in left_out}
        self._refuse_leftovers(others)
        return Original(self.folder, self.scheme.method, weights, others, left_out)

    def _weight(self, stored: Stored) -> Quantised | None:
        name = stored.name
        if name.endswith(_PACKED):
            return self._packed(stored)
        if name.endswith(_BLOCKS) and stored.dtype == torch.uint8:
            return self._blocks(stored)
        coding = _CODED.get(stored.dtype)
        if (
            coding is None
            and stored.dtype in (torch.int8, torch.uint8)
            and (name.endswith("weight") or self._scales_of(name) is not None)
        ):
            coding = Coding.int8 if self.scheme.method == "compressed-tensors" else Coding.fp4
        if coding is None or name.endswith(_ORPHANS):
            return None
        scales = self._scales_of(name)
        if scales is None:
            raise self._missing(stored)
        *stack, rows, cols = self._matrix(stored)
        shape = (*stack, rows, cols * coding.per_byte)
        return self._made(name, shape, stored, scales, coding)

    def _packed(self, stored: Stored) -> Quantised:
        """Of compressed-tensors: whole numbers in words of 32 bits, padded at the end of a row."""
        stem = stored.name.removesuffix(_PACKED)
        scales, shape = self.tensors.get(f"{stem}weight_scale"), self._shapes.get(f"{stem}{_SHAPE}")
        if scales is None or shape is None:
            raise self._missing(stored, "weight_scale" if scales is None else _SHAPE)
        if stored.dtype != torch.int32:
            raise self._fault(f"{stored.name} in {_format(stored)}", allowed="I32", remedy=_OTHER_ORIGINAL)
        packed = self._matrix(stored)
        fitting = [b for b in self.scheme.bits if (*shape[:-1], math.ceil(shape[-1] * b / 32)) == packed]
        if len(fitting) != 1:
            raise self._fault(
                f"{stored.name} has shape {list(packed)}, which does not hold {list(shape)} numbers of "
                f"{' or '.join(map(str, self.scheme.bits)) or '?'} bits",
                remedy=DAMAGED,
            )
        self._used.add(f"{stem}{_SHAPE}")
        coding = Coding.packed_int4 if fitting[0] == 4 else Coding.packed_int8
        return self._made(f"{stem}weight", shape, stored, scales, coding)

    def _blocks(self, stored: Stored) -> Quantised:
        """Of gpt-oss: experts x rows x blocks x 16 bytes; the model has its experts transposed."""
        name = stored.name.removesuffix(_BLOCKS)
        scales = self.tensors.get(f"{name}_scales")
        if scales is None:
            raise self._missing(stored, f"{name}_scales")
        if len(stored.shape) != 4 or stored.shape[3] != 16 or scales.shape != stored.shape[:3]:
            raise self._mismatch(stored, scales, "experts x rows x blocks x 16, and a scale a block")
        experts, rows, blocks, _ = stored.shape
        return Quantised(name, (experts, blocks * 32, rows), stored, scales, Coding.fp4, (1, 32), turned=True)

    def _made(self, name: str, shape: tuple[int, ...], stored: Stored, scales: Stored, coding: Coding) -> Quantised:
        if scales.dtype not in _SCALES:
            raise self._fault(f"{scales.name} in {_format(scales)}", allowed="F32, BF16, F16, F8_E8M0, U8")
        *stack, rows, cols = shape
        grid = _grid(scales.shape, stack)
        for block in self.scheme.blocks_of(coding):
            if grid == (math.ceil(rows / block[0]), math.ceil(cols / block[1])):
                return Quantised(name, shape, stored, scales, coding, block)
        named = " or ".join(f"{rows}x{cols}" for rows, cols in self.scheme.blocks)
        raise self._mismatch(stored, scales, f"one scale in all, one a row, or one a block of {named or '1x32'}")

    def _matrix(self, stored: Stored) -> tuple[int, ...]:
        if len(stored.shape) not in (2, 3):
            raise self._fault(f"{stored.name} has shape {list(stored.shape)}", allowed="a matrix, or a stack of them")
        return stored.shape

    def _scales_of(self, name: str) -> Stored | None:
        names = [f"{name}_scale_inv", f"{name}_scale"]
        if name.endswith(".weight"):  # DeepSeek V4, Mistral Large 4
            names += [f"{name.removesuffix('weight')}{last}" for last in ("scale", "qscale_weight")]
        return next((self.tensors[each] for each in names if each in self.tensors), None)

    def _refuse_leftovers(self, others: Mapping[str, Stored]) -> None:
        for name, stored in others.items():
            if name.endswith(_ORPHANS) or (name.endswith("_scales") and stored.dtype == torch.uint8):
                raise self._fault(f"{name} are scales without their weight", remedy=DAMAGED)
            if stored.dtype in _CODED or stored.dtype == torch.float8_e8m0fnu:
                raise self._missing(stored)

    def _missing(self, stored: Stored, last: str = "scales") -> ModelError:
        return self._fault(
            f"{stored.name} is quantised ({_format(stored)}), and its {last} are in none of the files",
            allowed="weight_scale_inv, weight_scale, scale or _scales beside every quantised weight",
            remedy=DAMAGED,
        )

    def _mismatch(self, stored: Stored, scales: Stored, allowed: str) -> ModelError:
        return self._fault(
            f"{stored.name} has shape {list(stored.shape)}, and its scales {scales.name} have {list(scales.shape)}",
            allowed=allowed,
            remedy="the files and config.json must belong together",
        )

    def _fault(self, found: str, *, allowed: str | None = None, remedy: str | None = None) -> ModelError:
        return ModelError(str(self.folder), found, allowed=allowed, remedy=remedy)


_OTHER_ORIGINAL = "take the model's bf16 original, or dequantise it with the tool that made it"


def _grid(shape: tuple[int, ...], stack: list[int]) -> tuple[int, int] | None:
    """Block rows and block columns of one matrix; None: the scales lie in no such way."""
    if math.prod(shape) == 1:
        return (1, 1)
    if list(shape[: len(stack)]) != stack:
        return None
    inner = shape[len(stack) :]
    if len(inner) > 2:
        return None
    rows, cols = (*inner, 1, 1)[:2]
    return rows, cols


def _format(stored: Stored) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == stored.dtype)


def _read_shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Values of all ``weight_shape``, file by file: there are hundreds of thousands in a large model."""
    shards = Shards()
    return {name: tuple(shards.read(stored).tolist()) for name, stored in tensors.items() if name.endswith(_SHAPE)}
