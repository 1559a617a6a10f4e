"""What the terms of one global step add up to on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from train.data.sampler import GlobalStep
from train.objectives.base import Term, Unit


class Totals:
    """Collects the terms of the micro-batches.

    Args:
        step: what they are parts of.
    """

    def __init__(self, step: GlobalStep) -> None:
        self._counts = {
            Unit.targets: step.num_targets,
            Unit.tokens: step.num_tokens,
            Unit.samples: len(step.samples),
        }
        self._units: dict[str, Unit] = {}
        self._kept: list[torch.Tensor] = []
        self.losses: list[float] = []
        """Loss sums of the micro-batches; [] before `read`."""
        self.sums: dict[str, float] = {}
        """Of each term over the micro-batches; {} before `read`."""

    def add(self, terms: Sequence[Term]) -> torch.Tensor:
        """The scalar whose gradients, summed over ranks and micro-batches, are those of the step."""
        self._units = {term.name: term.unit for term in terms}
        # To be read once the step is queued: reading waits for the device.
        self._kept.append(torch.stack([term.total.detach() for term in terms]))
        parts = []
        for term in terms:
            # A loss that is not finite may have finite gradients: nan times them reaches the norm, and so every rank.
            finite = term.total.detach() * 0 + 1
            part = term.total * finite / self._counts[term.unit]
            parts.append(part if term.weight == 1 else part * term.weight)
        return sum(parts[1:], start=parts[0])

    def read(self) -> None:
        """Fills `losses` and `sums`."""
        values = torch.stack(self._kept).cpu().double().tolist()  # not every device knows fp64
        self.losses = [first for first, *_ in values]
        self.sums = {name: sum(column) for name, column in zip(self._units, zip(*values, strict=True), strict=True)}

    def means(self, totals: dict[str, float]) -> dict[str, float]:
        """From sums over all ranks to figures."""
        return {name: total / self._counts[self._units[name]] for name, total in totals.items()}
