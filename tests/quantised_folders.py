"""Quantised copies of tiny model folders, as the makers of models publish them.

The quantisers are written value by value from the formats' definitions and share nothing with `train.models`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny_tokenizer
from tests.tiny_families import VOCABULARY, save

FP4_STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
Parts = dict[str, torch.Tensor]


def fp8(weight: torch.Tensor, block: int = 128, *, powers: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek's way: e4m3 and a scale per block; `powers`: only powers of two, in e8m0."""
    rows, cols = weight.shape
    codes = torch.zeros(rows, cols, dtype=torch.float8_e4m3fn)
    scales = torch.zeros(-(-rows // block), -(-cols // block))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)
            scale = weight[place].float().abs().max() / 448
            if powers:
                scale = 2.0 ** torch.ceil(torch.log2(scale))
            scales[i, j] = scale
            codes[place] = (weight[place].float() / scale).to(torch.float8_e4m3fn)
    return codes, e8m0(scales) if powers else scales


def e8m0(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two in a byte: the exponent plus 127."""
    return (torch.log2(scales).round().int() + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def int4(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Kimi's way: -8 to 7 in words of 32 bits, the first value lowest; a bf16 scale per group of a row."""
    rows, cols = weight.shape
    scales = (weight.float().unflatten(1, (cols // group, group)).abs().amax(2) / 7).bfloat16()
    codes = (weight.float() / scales.float().repeat_interleave(group, 1)).round().clamp(-8, 7).long() + 8
    words = torch.zeros(rows, -(-cols // 8), dtype=torch.int64)
    for col in range(cols):
        words[:, col // 8] |= codes[:, col] << (4 * (col % 8))
    return torch.where(words >= 2**31, words - 2**32, words).int(), scales


def fp4(weight: torch.Tensor, group: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """The MX way: e2m1, two in a byte, the first in the low half; a power of two for 32 values of a row."""
    rows, cols = weight.shape
    scales = 2.0 ** torch.ceil(torch.log2(weight.float().unflatten(1, (cols // group, group)).abs().amax(2) / 6))
    scaled = weight.float() / scales.repeat_interleave(group, 1)
    nearest = (scaled.abs()[..., None] - torch.tensor(FP4_STEPS)).abs().argmin(-1)
    codes = nearest + 8 * (scaled < 0)
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).to(torch.uint8), e8m0(scales)


def _v3(name: str, weight: torch.Tensor) -> Parts | None:
    if not re.search(r"_proj(_with_mqa)?\.weight$", name):
        return None
    codes, scales = fp8(weight)
    return {name: codes, f"{name}_scale_inv": scales}


def _kimi(name: str, weight: torch.Tensor) -> Parts | None:
    if ".mlp.experts." not in name:
        return None
    codes, scales = int4(weight)
    return {f"{name}_packed": codes, f"{name}_scale": scales, f"{name}_shape": torch.tensor(weight.shape)}


def _v4(name: str, weight: torch.Tensor) -> Parts | None:
    stem = name.removesuffix("weight")
    if ".ffn.experts." in name:
        codes, scales = fp4(weight)
        return {name: codes.view(torch.int8), f"{stem}scale": scales}
    if re.search(r"\.(attn\.w\w+|shared_experts\.w\d)\.weight$", name):
        codes, scales = fp8(weight, powers=True)
        return {name: codes, f"{stem}scale": scales}
    return None


def _gpt_oss(name: str, weight: torch.Tensor) -> Parts | None:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return None
    made = [fp4(expert.T.contiguous()) for expert in weight]
    blocks = torch.stack([codes.unflatten(1, (-1, 16)) for codes, _ in made])
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.stack([s.view(torch.uint8) for _, s in made])}


@dataclass(frozen=True)
class Format:
    """A way of publishing, and the model that is published so."""

    family: str
    changes: dict[str, Any]
    config: dict[str, Any]
    quantise: Callable[[str, torch.Tensor], Parts | None]


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_INT4_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4_WEIGHTS}},
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
}
# Sizes that are no multiples of a block, and more than one block in each direction.
FORMATS = {
    "fp8": Format("deepseek_v3", {"hidden_size": 160, "intermediate_size": 200}, _FP8, _v3),
    "int4": Format("kimi_k25", {"moe_intermediate_size": 96}, _INT4, _kimi),
    "fp4": Format("deepseek_v4", {"moe_intermediate_size": 96}, {**_FP8, "scale_fmt": "ue8m0"}, _v4),
    "mxfp4": Format("gpt_oss", {}, {"quant_method": "mxfp4"}, _gpt_oss),
}


def save_quantised(form: str, folder: Path) -> Path:
    """A folder of two files, with scales in another one than their weights; the whole model lies in ``whole``."""
    kind = FORMATS[form]
    if kind.family == "gpt_oss":
        _save_gpt_oss(folder)
    else:
        save(kind.family, folder, dtype=torch.bfloat16, **kind.changes)
    whole = load_file(folder / "model.safetensors")
    files: list[Parts] = [{}, {}]
    for number, (name, tensor) in enumerate(sorted(whole.items())):
        for i, (part, value) in enumerate((kind.quantise(name, tensor) or {name: tensor}).items()):
            files[(number + i) % 2][part] = value.contiguous()
    (folder / "whole").mkdir()
    (folder / "model.safetensors").rename(folder / "whole" / "model.safetensors")
    write_files(folder, files)
    config = json.loads((folder / "config.json").read_text())
    (config["text_config"] if form == "int4" else config)["quantization_config"] = kind.config
    if form == "fp4":
        config["expert_dtype"] = "fp4"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_files(folder: Path, files: list[Parts]) -> None:
    """Safetensors and their index."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _save_gpt_oss(folder: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.08,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    GptOssForCausalLM(config).bfloat16().save_pretrained(folder)
    save_tiny_tokenizer(folder)
