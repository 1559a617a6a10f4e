"""An objective turns a micro-batch into sums that the loop divides by what they were summed over."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn

from train.data.collate import Batch
from train.data.prepared import DataKind

Note = Callable[[str], None]


class Unit(Enum):
    """What a term is summed over.

    The loop divides by their number in the global step, over all ranks and micro-batches: so a step has one gradient
    however it is split.
    """

    targets = "targets"
    """Supervised tokens."""
    tokens = "tokens"
    """Tokens of samples, supervised or not; padding is none."""
    samples = "samples"


@dataclass(frozen=True)
class Term:
    """One part of what is minimised."""

    name: str
    """Of the figure in metrics.jsonl, which is the mean without the weight."""
    total: torch.Tensor
    """Scalar fp32 sum over the micro-batch's units; 0, with a graph, of a filler."""
    unit: Unit
    weight: float = 1.0


class Objective(ABC):
    """What is minimised: the sum over supervised tokens, which the loop divides by their number in the global step.

    An objective may have further terms, and figures about the model's inside.
    """

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

    def terms(self, forward: Callable[..., Any], batch: Batch) -> list[Term]:
        """What the step is taken on: first the loss, then what else there is; on every rank the same ones."""
        return [Term("loss", self.loss_sum(forward, batch), Unit.targets)]

    def gauges(self) -> dict[str, float]:
        """Figures of the last micro-batch, for metrics.jsonl: of all ranks the highest. On every rank the same ones."""
        return {}

    def check(self, model_config: Any, note: Note) -> None:  # noqa: B027  # most objectives fit every model
        """Before the weights are loaded: does the model have what the objective trains?

        Args:
            model_config: of transformers.
            note: tells the user what he might expect otherwise.

        Raises:
            ConfigError: it does not.
        """

    def choose(self, module: nn.Module, note: Note, *, on_host: bool) -> None:  # noqa: B027
        """After the tuning method: freezes what this objective gives no gradient, so that no weight decay moves it.

        Args:
            module: what trains, wherever it lies as yet.
            note: for the log.
            on_host: whether it will compute on a CPU.

        Raises:
            ConfigError: nothing that trains would get a gradient from a term, or none from any.
        """

    def attach(self, module: nn.Module) -> None:  # noqa: B027
        """After the engine was built: hooks on the model's inside. The engine's own come first, as they must."""
