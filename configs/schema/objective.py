"""The objective group: what is minimised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from configs.errors import ConfigError


class IndexerStage(Enum):
    """How the indexer of DeepSeek sparse attention (DSA) trains; DeepSeek-V3.2 has two stages, one run each."""

    none = "none"
    """It does not: it is frozen."""
    warmup = "warmup"
    """The indexer alone, against dense attention. DeepSeek-V3.2 takes 1000 steps of optim.lr=1e-3."""
    sparse = "sparse"
    """The model by its loss and the indexer by its own, on the tokens that it selects."""


@dataclass
class ObjectiveConfig:
    """What every objective has."""

    _target_: str = MISSING
    """A subclass of ``train.objectives.base.Objective``."""


@dataclass
class CausalLMConfig(ObjectiveConfig):
    """Next-token cross-entropy over the supervised tokens."""

    _target_: str = "train.objectives.causal_lm.CausalLM"
    label_smoothing: float = 0.0
    """Share of each target that all words have in common (arXiv:1512.00567). The loss in metrics.jsonl is with it."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator (PaLM, arXiv:2204.02311, took 1e-4). metrics.jsonl has the
    mean square as z_loss; the loss is with its weighted part."""
    indexer_stage: IndexerStage = IndexerStage.none
    """Trains the indexer of a model with sparse attention. none, with an `indexer_kl` above 0: sparse."""
    indexer_kl: float = 0.0
    """Weight of the indexer's loss. 0: 1 where `indexer_stage` is set; else the indexer is frozen."""
    balance_loss: float = 0.0
    """Weight of the load-balancing loss of routed experts, which is 1 where the experts share evenly. 0: off.

    The loss of each sample by itself (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20), so that it is the same however a
    step is split. A ``router_aux_loss_coef`` of a config.json corresponds to it times the experts per token.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError("objective.label_smoothing", str(self.label_smoothing), allowed="0 up to, not with, 1")
        for key in ("indexer_kl", "balance_loss", "z_loss"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ConfigError(f"objective.{key}", str(getattr(self, key)), allowed="0 (off) or more")

    @property
    def stage(self) -> IndexerStage:
        """That of the indexer, whichever of its two keys was typed."""
        asked = self.indexer_stage is IndexerStage.none and self.indexer_kl > 0
        return IndexerStage.sparse if asked else self.indexer_stage

    @property
    def indexer_weight(self) -> float:
        """Of the indexer's loss; 0: there is none."""
        return 0.0 if self.stage is IndexerStage.none else self.indexer_kl or 1.0
