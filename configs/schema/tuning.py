"""The tuning group: which parameters train."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from configs.errors import ConfigError


@dataclass
class TuningConfig:
    """What every tuning method has."""

    _target_: str = MISSING
    """A subclass of ``train.tuning.base.Tuning``."""


class Frozen(Enum):
    """Parts that full fine-tuning may leave as they are: projections with biases, not norms, gates, convolutions."""

    vision = "vision"
    """The vision tower and its projector."""
    embeddings = "embeddings"
    """Input and output embeddings."""
    routed_experts = "routed_experts"
    shared_experts = "shared_experts"
    attention = "attention"
    mlp = "mlp"


@dataclass
class FullConfig(TuningConfig):
    """All parameters train."""

    _target_: str = "train.tuning.full.FullTuning"
    frozen: list[Frozen] = field(default_factory=lambda: [Frozen.vision])
    """Parts that stay as they are; ``[]`` trains a vision tower too. What no gradient reaches stays in any case."""


@dataclass
class LoraConfig(TuningConfig):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) through peft."""

    _target_: str = "train.tuning.lora.LoraTuning"
    rank: int = 16
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)
    """Parts, e.g. ``attention+mlp``: attention, mlp (dense layers and shared experts), shared_experts, routed_experts,
    vision, hyper_connections; or last names of linear modules. Empty: attention and mlp."""
    first_layer: int = 0
    """Layers below this one stay as they are, which also saves their backward pass."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError("tuning.rank", str(self.rank), allowed="1 or more")
        if not 0 <= self.dropout < 1:
            raise ConfigError("tuning.dropout", str(self.dropout), allowed="0 up to, not including, 1")
        if not all(word.strip() for entry in self.targets for word in entry.split("+")):
            raise ConfigError("tuning.targets", f"{self.targets} has an empty part", allowed="e.g. attention+mlp")
        if self.first_layer < 0:
            raise ConfigError("tuning.first_layer", str(self.first_layer), allowed="0 or more")
