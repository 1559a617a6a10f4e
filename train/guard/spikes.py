"""Which loss is a spike. What follows from one is in `rollback`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from train.checkpoint.layout import TrainerState

HISTORY = "losses"
"""Key of `TrainerState.extra`: the last losses, so that a resumed run judges as the uninterrupted one does."""
MAD_TO_SIGMA = 1.4826
"""The median absolute deviation of a normal distribution is its standard deviation divided by this."""
SMALLEST_SPREAD = 0.01
"""Of the median: where the losses hardly differ, a spike must still be worth the name."""


@dataclass(frozen=True)
class Spike:
    """A loss that stands out."""

    step: int
    loss: float
    median: float
    zscore: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} at step {self.step}, {self.zscore:.1f} robust standard deviations above the "
            f"last ones (median {self.median:.4f})"
        )


class SpikeDetector:
    """Compares each loss with the ones before it. Pure but for the history, which lives in the trainer state.

    Args:
        threshold: robust standard deviations above the median; 0: nothing is a spike, and no history is kept.
        window: losses that one is compared with.
    """

    def __init__(self, threshold: float, window: int) -> None:
        self.threshold, self.window = threshold, window

    def spike(self, state: TrainerState, loss: float) -> Spike | None:
        """The spike that the loss of step `state.step` is, else None and the loss joins the history."""
        if not self.threshold:
            return None
        history: list[float] = state.extra.setdefault(HISTORY, [])
        if 2 * len(history) >= self.window:
            median, zscore = robust_zscore(history, loss)
            if zscore > self.threshold:
                return Spike(state.step, loss, median, zscore)
        state.extra[HISTORY] = [*history, loss][-self.window :]
        return None


def robust_zscore(history: Sequence[float], loss: float) -> tuple[float, float]:
    """Median of `history`, and how many robust standard deviations `loss` is above it."""
    median = statistics.median(history)
    spread = MAD_TO_SIGMA * statistics.median(abs(value - median) for value in history)
    return median, (loss - median) / max(spread, SMALLEST_SPREAD * abs(median), 1e-12)
