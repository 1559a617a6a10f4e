"""What each model family needs. A family that is not listed gets the safe path and is told so."""

from __future__ import annotations

from typing import Any

from train.models.families.facts import Family, Layers
from train.models.families.table import FAMILIES

__all__ = ["FAMILIES", "Family", "Layers", "brings_code", "family_of"]


def brings_code(config: Any) -> bool:
    """Whether the model's folder holds the Python that computes it."""
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def family_of(config: Any, *, trust_remote_code: bool = False) -> Family:
    """The family of a transformers config; an unknown one is not packed and LoRA adapts all its linear modules.

    A model that brings its own code is unknown whatever it calls itself: its layers may ignore the boundaries. Models
    that are implemented here (`train/models/bailing_moe_v2`) run by our code, whatever their folder brings.
    """
    model_type = str(config.model_type)
    ours = type(config).__module__.startswith("train.models.")
    if trust_remote_code and brings_code(config) and not ours:
        return Family.unlisted(model_type)
    return FAMILIES.get(model_type) or Family.unlisted(model_type)
