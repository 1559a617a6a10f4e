"""Useful tokens/s of one LoRA step, packed against padded rows, on uneven samples; padding does not count as useful.

A Llama of SmolLM2-135M's width with a third of its layers and random weights. Then forward and backward of a tiny model
of each kind of mixer, packed and one sample at a time, against padding.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from configs.schema.objective import CausalLMConfig
from configs.schema.tuning import LoraConfig
from tests.tiny import samples_of, tiny_model
from tests.tiny_families import build
from tests.unit.packing_kit import packable
from train.data.collate import collate
from train.data.plan import RowKind, layout
from train.models.families import family_of
from train.objectives.causal_lm import CausalLM
from train.ops.packed_attention import PACKED_ATTENTION, register
from train.tuning.lora import LoraTuning

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
}
ROUNDS = 7


KINDS = (
    "deepseek_v3",
    "qwen3_5_text",
    "kimi_linear",
    "minimax",
    "deepseek_v4",
    "minimax_m3_vl",
    "deepseek_v32",
    "glm5_next",
)
"""A family of each kind of mixer."""
SPREADS = {"even": [120, 110, 128, 116] * 3, "one long, many short": [480] + [60] * 12}
KIND_ROUNDS = 3


def main() -> None:
    """Prints medians and their ratios."""
    _llama()
    for name in KINDS:
        for spread, lengths in SPREADS.items():
            packed, single = _against_padding(name, np.array(lengths, np.int32))
            print(f"packing: {name}, {spread}: packed {packed:.2f}, one at a time {single:.2f} of padded", flush=True)


def _against_padding(name: str, lengths: np.ndarray) -> tuple[float, float]:
    """Speed of packed rows and of rows of one sample, relative to padded rows of as many tokens."""
    samples = samples_of(lengths.tolist(), vocab_size=300)
    objective, seconds = CausalLM(CausalLMConfig()), {kind: [] for kind in RowKind}
    models = {kind: packable(name) if kind is RowKind.packed else build(name) for kind in RowKind}
    for _ in range(KIND_ROUNDS):
        for kind, model in models.items():
            [batches] = layout(np.arange(len(samples)), lengths, world_size=1, micro_batch_tokens=1024, kind=kind)
            started = time.perf_counter()
            for batch in batches:
                tensors = collate(batch, samples.__getitem__, kind=kind, device=torch.device("cpu"))
                objective.loss_sum(model, tensors).backward()
            seconds[kind].append(time.perf_counter() - started)
    packed, padded, single = (statistics.median(seconds[k]) for k in (RowKind.packed, RowKind.padded, RowKind.single))
    return padded / packed, padded / single


def _llama() -> None:
    register()
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.7, 24).astype(np.int32), 8, 512)
    samples = samples_of(lengths.tolist(), vocab_size=int(SHAPE["vocab_size"]))
    model = tiny_model("llama", **SHAPE)
    module = LoraTuning(LoraConfig()).apply(model, family_of(model.config)).train()
    objective, speeds = CausalLM(CausalLMConfig()), {RowKind.packed: [], RowKind.padded: []}
    for _ in range(ROUNDS):
        for kind, speed in speeds.items():
            model.set_attn_implementation(PACKED_ATTENTION if kind is RowKind.packed else "sdpa")
            [batches] = layout(np.arange(len(samples)), lengths, world_size=1, micro_batch_tokens=2048, kind=kind)
            started = time.perf_counter()
            for batch in batches:
                tensors = collate(batch, samples.__getitem__, kind=kind, device=torch.device("cpu"))
                objective.loss_sum(module, tensors).backward()
            speed.append(lengths.sum() / (time.perf_counter() - started))
    packed, padded = (statistics.median(speeds[kind]) for kind in (RowKind.packed, RowKind.padded))
    print(f"packing: packed {packed:.0f}, padded {padded:.0f} useful tokens/s, ratio {packed / padded:.2f}")
