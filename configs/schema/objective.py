"""The objective group: what is minimised."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class ObjectiveConfig:
    """What every objective has."""

    _target_: str = MISSING
    """A subclass of ``train.objectives.base.Objective``."""


@dataclass
class CausalLMConfig(ObjectiveConfig):
    """Next-token cross-entropy over the supervised tokens."""

    _target_: str = "train.objectives.causal_lm.CausalLM"
