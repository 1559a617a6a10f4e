"""Models of every family as a run has them when rows are packed."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_families import build
from train.models.classes import attention_for
from train.models.families import FAMILIES, Family
from train.ops.packed_mixers import attention_for_packing, wrap_mixers

CPU = torch.device("cpu")
LEAKY = tuple(
    name
    for name, family in FAMILIES.items()
    if family.packed_mixers and name not in ("glm_moe_dsa", "deepseek_v32")  # theirs is another choice, not a leak
)


def unwrapped(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The model with the attention of packed rows, its mixers as transformers wrote them."""
    model = build(name, dtype=dtype, **changes)
    model.set_attn_implementation(attention_for(type(model), attention_for_packing(FAMILIES[name])))
    return model


def packable(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same with its mixers wrapped."""
    model = unwrapped(name, dtype=dtype, **changes)
    wrap_mixers(model, FAMILIES[name])
    return model


def kinds(model: Any, family: Family) -> list[Any]:
    """The wrapped layers."""
    return [module for module in model.modules() if type(module).__name__ in (family.packed_mixers or ())]
