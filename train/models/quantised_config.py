"""What config.json says of a model's quantisation: the method and its blocks (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ModelError
from train.models.dequantise import Coding

QUANTISATION = ("quantization_config", "compression_config")
"""Keys of config.json, or of a part of it such as ``text_config``."""
METHODS = ("fp8", "compressed-tensors", "mxfp4")
FORMATS = ("pack-quantized", "float-quantized", "int-quantized", "naive-quantized")
"""Of compressed-tensors."""
WHOLE = 2**62
"""Rows or columns of a block that has all of them."""


@dataclass(frozen=True)
class Scheme:
    """How weights may be quantised in a folder."""

    method: str
    blocks: tuple[tuple[int, int], ...] = ((128, 128),)
    """Rows and columns that share a scale, as the config says."""
    bits: tuple[int, ...] = ()
    """Of numbers packed in words."""

    def blocks_of(self, coding: Coding) -> tuple[tuple[int, int], ...]:
        """The blocks that scales of such a weight may have, the config's first."""
        named = () if coding is Coding.fp4 else self.blocks
        # FP4, and FP8 in the MX way, have a scale for 32 values whatever the config says of the other weights.
        in_rows = ((1, 32),) if coding in (Coding.fp4, Coding.e4m3, Coding.e5m2) else ()
        return (*named, *in_rows, (1, WHOLE), (WHOLE, WHOLE))


def scheme_of(config: Mapping[str, Any], folder: Path) -> Scheme | None:
    """The scheme of a model's config, or of a part of it; None: it names none.

    Raises:
        ModelError: a method or a format that is not known here.
    """
    said = _find(config)
    if said is None:
        return None
    where = str(folder / "config.json")
    method = said.get("quant_method") or ("compressed-tensors" if "config_groups" in said else None)
    if method not in METHODS:
        raise _unknown(where, f"quant_method '{method}'", METHODS)
    if method == "compressed-tensors":
        return _compressed(said, where)
    if method == "mxfp4":
        return Scheme(method)
    block = said.get("weight_block_size", (128, 128))
    return Scheme(method, ((int(block[0]), int(block[1])),) if block else ())


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model in bf16."""
    return {**_whole(config), "dtype": "bfloat16"}


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for key, value in config.items():
        if key in (*QUANTISATION, "expert_dtype"):
            continue
        if key in ("dtype", "torch_dtype"):
            whole[key] = "bfloat16"
        else:
            whole[key] = _whole(value) if isinstance(value, dict) else value
    return whole


def _find(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for key in QUANTISATION:
        if config.get(key):
            said: Mapping[str, Any] = config[key]
            return said
    parts = (value for value in config.values() if isinstance(value, dict))
    return next((found for part in parts if (found := _find(part)) is not None), None)


def _compressed(said: Mapping[str, Any], where: str) -> Scheme:
    sparsity = (said.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unknown(where, f"sparsity_config.format '{sparsity}'", ("dense",))
    blocks, bits = [], []
    for group in (said.get("config_groups") or {}).values():
        weights = group.get("weights")
        if not weights:
            continue
        form = group.get("format") or said.get("format")
        if form not in FORMATS:
            raise _unknown(where, f"compressed-tensors format '{form}'", FORMATS)
        if form == "pack-quantized":
            if weights.get("num_bits") not in (4, 8):
                raise _unknown(where, f"num_bits {weights.get('num_bits')} in words of 32", ("4", "8"))
            bits.append(weights["num_bits"])
        if structure := weights.get("block_structure"):
            blocks.append((int(structure[0]), int(structure[1])))
        elif (size := weights.get("group_size") or 0) > 0:
            blocks.append((1, int(size)))
    return Scheme("compressed-tensors", tuple(dict.fromkeys(blocks)), tuple(dict.fromkeys(bits)))


def _unknown(where: str, found: str, allowed: tuple[str, ...]) -> ModelError:
    return ModelError(
        where,
        f"the weights are quantised in a way that is not known here: {found}",
        allowed=", ".join(allowed),
        remedy="take the model's bf16 original, or dequantise it with the tool that made it",
    )
