"""An objective turns a micro-batch into a loss sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from train.data.collate import Batch
from train.data.prepared import DataKind


class Objective(ABC):
    """What is minimised: the sum over supervised tokens, which the loop divides by their number in the global step."""

    name: str
    needs: DataKind
    """The kind of prepared data that it learns from."""

    @abstractmethod
    def loss_sum(self, forward: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Scalar fp32 loss, summed over the batch's `num_targets` supervised tokens.

        Args:
            forward: the model as the engine calls it, by keyword arguments.
            batch: one micro-batch on the model's device.
        """
