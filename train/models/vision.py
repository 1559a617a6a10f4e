"""The vision tower of a model, made ready for rows of several samples and for the working dtype."""

from __future__ import annotations

from typing import Any

from torch import nn

from train.models.classes import attention_for
from train.ops.packed_attention import PACKED_ATTENTION

_TOWERS = ("visual", "vision_tower")


def settle_vision_tower(model: nn.Module) -> None:
    """Lets a model's vision tower attend within each image, whatever a row of tokens holds.

    Packed attention is causal within samples of tokens, which would be wrong in the tower. Pixel values are cast to its
    dtype, which not every family does.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _TOWERS:
            tower: Any = module
            if tower.config._attn_implementation.startswith(PACKED_ATTENTION):
                tower.set_attn_implementation(attention_for(tower, "sdpa"))
            tower.register_forward_pre_hook(_in_its_dtype)


def _in_its_dtype(tower: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].to(tower.dtype), *args[1:])
