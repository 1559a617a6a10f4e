"""Full fine-tuning."""

from __future__ import annotations

from torch import nn

from configs.schema.tuning import FullConfig
from train.models.families import Family
from train.tuning.base import Tuning


class FullTuning(Tuning):
    """All parameters train."""

    name = "full"

    def __init__(self, cfg: FullConfig) -> None:
        self.cfg = cfg

    def apply(self, model: nn.Module, family: Family) -> nn.Module:
        """The model itself."""
        return model.requires_grad_(True)
