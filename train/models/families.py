"""What each model family needs. A family that is not listed gets the safe path and is told so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layers:
    """Where a family computes the ops of `train/ops`: classes of one module of transformers, with that very formula.

    The formula is compared again before a layer is touched (`train/ops/replace.py`).
    """

    module: str
    rms_norm: str
    """A class with `weight` and `variance_epsilon`."""
    rotary: str
    """An attention class that calls its module's `apply_rotary_pos_emb`."""
    swiglu: str
    """A class with `gate_proj`, `up_proj`, `down_proj` and `act_fn`."""


@dataclass(frozen=True)
class Family:
    """Facts about one `config.model_type`."""

    model_type: str
    packing_exact: bool
    """Proven by test: logits and gradients of a packed row equal those of its samples alone."""
    lora_targets: tuple[str, ...] | None
    """Names of the projections that LoRA adapts by default; None: every linear module but the head."""
    layers: Layers | None = None
    """None: its layers run as transformers wrote them, on every device."""


_PROVEN = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Softmax attention through transformers' attention interface only: `tests/unit/test_packing.py` runs over these."""


def _family(name: str, prefix: str) -> Family:
    """One of `_PROVEN`; they are built from the same parts and name them alike."""
    layers = Layers(
        module=f"transformers.models.{name}.modeling_{name}",
        rms_norm=f"{prefix}RMSNorm",
        rotary=f"{prefix}Attention",
        swiglu=f"{prefix}MLP",
    )
    return Family(name, packing_exact=True, lora_targets=ATTENTION_AND_MLP, layers=layers)


FAMILIES = {name: _family(name, prefix) for name, prefix in _PROVEN.items()}


def family_of(config: Any, *, trust_remote_code: bool = False) -> Family:
    """The family of a transformers config; an unknown one is not packed and LoRA adapts all its linear modules.

    A model that brings its own code is unknown whatever it calls itself: its layers may ignore the boundaries.
    """
    model_type = str(config.model_type)
    unknown = Family(model_type, packing_exact=False, lora_targets=None)
    brings_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    return unknown if trust_remote_code and brings_code else FAMILIES.get(model_type, unknown)
