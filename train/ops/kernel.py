"""What the ops of this folder are, what a model asks of them, and how a device offers its own versions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from train.ops.packed_attention import attend_to_each_sample
from train.ops.rms_norm import rms_norm
from train.ops.rotary import rotary
from train.ops.swiglu import swiglu

Version = Callable[..., torch.Tensor]
"""One version of an op; all versions of an op take the same arguments."""

REFERENCES: Mapping[str, Version] = MappingProxyType(
    {"attention": attend_to_each_sample, "rms_norm": rms_norm, "rotary": rotary, "swiglu": swiglu}
)
"""The ops, and of each the version in plain torch operators. ``device.NAME_kernel`` is an op's switch."""


@dataclass(frozen=True)
class Needs:
    """Sizes and constants with which one model calls the ops."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    epsilon: float
    """Of the RMSNorm."""
    sliding_window: int | None
    dropout: float
    """On the attention weights while training."""
    rotary_factor: float
    """On cosine and sine; above 1 for context extensions such as YaRN."""

    @staticmethod
    def of(model: nn.Module) -> Needs:
        """Those of a transformers model whose family names its layers (`train/models/families.py`)."""
        config: Any = model.config
        heads = config.num_attention_heads
        factors: list[float] = [float(getattr(module, "attention_scaling", 1.0)) for module in model.modules()]
        return Needs(
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            epsilon=config.rms_norm_eps,
            sliding_window=getattr(config, "sliding_window", None),
            dropout=config.attention_dropout,
            rotary_factor=max(factors),
        )


@dataclass(frozen=True)
class Kernel:
    """A device's version of an op together with its documented limits."""

    run: Version
    unmet: Callable[[Needs], str | None]
    """What a model asks that the kernel does not offer; None: nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs it."""
        return self.run(*args, **kwargs)
