"""What each model family needs. A family that is not listed gets the safe path and is told so."""

from __future__ import annotations

from dataclasses import replace
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
    family = FAMILIES.get(model_type) or Family.unlisted(model_type)
    turns = turns_by_length(config)
    return replace(family, turns_by_length=turns) if turns else family


def turns_by_length(config: Any) -> tuple[str, int] | None:
    """See `Family.turns_by_length`; transformers' ``dynamic_rope_update`` takes the highest position of a call."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    # One set for all layers, or one for each type of layer.
    sets = [parameters, *(each for each in parameters.values() if isinstance(each, dict))]
    found = []
    for each in sets:
        rope = str(each.get("rope_type", "default"))
        if rope == "longrope":
            found.append((rope, int(each.get("original_max_position_embeddings") or text.max_position_embeddings)))
        elif "dynamic" in rope:
            found.append((rope, int(text.max_position_embeddings)))
    # The first to turn; of equals the one that depends on more.
    return min(found, key=lambda one: (one[1], one[0]), default=None)
