"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from configs.schema.objective import CausalLMConfig
from train.data.collate import Batch
from train.data.prepared import DataKind
from train.objectives.base import Objective


class CausalLM(Objective):
    """Cross-entropy of each supervised token given those before it."""

    name = "causal_lm"
    needs = DataKind.samples

    def __init__(self, cfg: CausalLMConfig) -> None:
        self.cfg = cfg

    def loss_sum(self, forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """The head runs at the positions that predict a supervised token only; see `Batch.predicts_BT`."""
        logits_NV: torch.Tensor = forward(**batch.model_inputs()).logits.flatten(0, -2)
        if batch.num_targets == 0:
            # A filler so that every rank runs the same passes: nothing to learn, but a graph to go back through.
            return logits_NV.float().sum() * 0.0
        return F.cross_entropy(logits_NV.float(), batch.targets_N, reduction="sum")
