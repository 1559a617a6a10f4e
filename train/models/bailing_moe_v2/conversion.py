"""Published names of weights against those of our modules, in transformers' own terms, for loading and for saving."""

from __future__ import annotations

from typing import Any

from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming


def ling() -> list[Any]:
    """One tensor for each expert becomes one for all; the routers' bias gets the name of the router we build on."""
    experts: list[Any] = get_checkpoint_conversion_mapping("qwen2_moe")
    return [*experts, WeightRenaming(r"gate\.expert_bias", "gate.e_score_correction_bias")]


def ming() -> list[Any]:
    """What Ming names otherwise than Ling; the language model inside brings `ling` with it."""
    return [
        WeightRenaming(r"\.attention\.q_norm\.", ".attention.query_layernorm."),
        WeightRenaming(r"\.attention\.k_norm\.", ".attention.key_layernorm."),
    ]
