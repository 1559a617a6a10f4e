"""Floating-point operations that a model asks for per token, and the share of a device's peak that a run reaches.

Counted as in PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B), which follows Kaplan et al. 2020
(arXiv:2001.08361, section 2.1): a weight that takes part in a matrix product costs 2 FLOPs per token forward, 2 for
the gradient of its input and 2 for its own; attention costs 12 L H Q T per token forward and backward, without a
discount for the causal half. A frozen weight has no gradient of its own, so LoRA costs 4 per base weight and 6 per
adapter weight. What activation checkpointing computes again is not counted, nor are norms, rotary and softmax.

Not covered: mixtures of experts and convolutions, whose weights do not meet every token once (None is returned), and
attention that is not softmax attention over the whole sample, such as a sliding window (counted as if it were).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def flops_per_token(model: nn.Module, *, length: float, supervised_share: float = 1.0) -> float | None:
    """FLOPs of a training step per token, forward and backward.

    Args:
        model: a transformers causal LM, also under peft or spread by ZeRO-3; `requires_grad` says what trains.
        length: tokens that a token's attention is counted over: of its sample, see `mean_length`.
        supervised_share: share of positions at which the output head runs.

    Returns:
        None where the model has weights that this count does not cover.
    """
    head = _weight(model, "get_output_embeddings")
    embedding = _weight(model, "get_input_embeddings")
    total = 0.0
    for parameter in model.parameters():
        shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed keeps the whole's shape there
        if len(shape) > 2:
            return None
        if len(shape) < 2 or (parameter is embedding and parameter is not head):
            continue  # a lookup multiplies nothing
        cost = 6 if parameter.requires_grad else 4
        total += cost * shape.numel() * (supervised_share if parameter is head else 1.0)
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    if getattr(config, "per_layer_attributes", None):  # layers of several kinds
        width = sum(map(_attention_width, config.per_layer_config))
    else:
        width = config.num_hidden_layers * _attention_width(config)
    return total + 12.0 * width * length


def _attention_width(config: Any) -> int:
    heads: int = config.num_attention_heads
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * head_dim


def mean_length(lengths: Sequence[int]) -> float:
    """Length of the sample that a token is in, meant over tokens: a long sample has more of them."""
    return sum(length**2 for length in lengths) / sum(lengths)


def model_flops_utilisation(
    tokens_per_second: float, flops: float | None, peak_flops: float | None, devices: int
) -> float | None:
    """Share of the devices' dense peak that the model's own FLOPs take (MFU, PaLM section 4.1).

    Args:
        tokens_per_second: of all devices together.
        flops: per token, from `flops_per_token`.
        peak_flops: of one device in the working format, FLOP/s.
        devices: that took part.

    Returns:
        0 to 1; None where one of the figures is not known.
    """
    if flops is None or peak_flops is None:
        return None
    return tokens_per_second * flops / (peak_flops * devices)


def _weight(model: nn.Module, getter: str) -> torch.Tensor | None:
    module = getattr(model, getter)()
    return None if module is None else module.weight
