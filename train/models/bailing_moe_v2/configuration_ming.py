"""Config of Ming-Flash-Omni 2.0. What is no business of the thinker is kept as it was read."""

# transformers is not typed for mypy: its classes are Any.
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from train.models.bailing_moe_v2.configuration import BailingMoeV2Config


@strict
class MingThinkerConfig(BailingMoeV2Config):
    """Of the language model inside: Ling's, with Ming's defaults for keys that a folder leaves out."""

    partial_rotary_factor: float | int | None = 0.5
    routed_scaling_factor: float | int = 2.5


@strict
class BailingMM2Config(PretrainedConfig):
    """Of the whole; only `llm_config` is read."""

    model_type = "bailingmm_moe_v2_lite"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"text_config": "llm_config"}
    sub_configs_defaults = {"llm_config": MingThinkerConfig}

    llm_config: Any = None
    """A `MingThinkerConfig`, or the dict that it is made of."""
    vision_config: dict[str, Any] | None = None
    audio_config: dict[str, Any] | None = None
    mlp_depth: int = 1
    """Layers between the towers and the language model."""
    tie_word_embeddings: bool = False
