"""The vision tower of a model, made ready for rows of several samples and for the working dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from train.models.classes import attention_for
from train.ops.packed_attention import PACKED_ATTENTION

_TOWERS = ("visual", "vision_tower")


def settle_vision_tower(model: nn.Module) -> None:
    """Lets a model's vision tower attend within each image, whatever a row of tokens holds.

    Packed attention is causal within samples of tokens, which would be wrong in the tower. Pixel values are cast to its
    dtype, which not every family does.
    """
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        # What a folder's own code calls so may be no model of transformers': it keeps its attention and its casts.
        if name.rpartition(".")[2] in _TOWERS and isinstance(module, PreTrainedModel):
            if str(module.config._attn_implementation).startswith(PACKED_ATTENTION):
                module.set_attn_implementation(attention_for(module, "sdpa"))
            module.register_forward_pre_hook(_in_its_dtype, with_kwargs=True)


def _in_its_dtype(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def cast(value: Any) -> Any:
        return value.to(tower.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}
