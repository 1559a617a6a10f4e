"""How long the watch over hangs waits for what; all of it follows from ``guard.hang_timeout_seconds``."""

from __future__ import annotations

from dataclasses import dataclass

from train.engine.base import COLLECTIVE_TIMEOUT_SECONDS

FIRST_STEP_FACTOR = 3
"""The first step of a command may take so many time-outs: it compiles kernels and fills caches."""


def collective_seconds(hang_timeout_seconds: float) -> float:
    """Time-out of the collectives, above that of any verdict: a collective that gives up only says that it did."""
    return max(COLLECTIVE_TIMEOUT_SECONDS, FIRST_STEP_FACTOR * hang_timeout_seconds + 600)


@dataclass(frozen=True)
class Limits:
    """Times of the watch, in seconds."""

    timeout: float
    """Without an advance of any rank before a verdict is due."""
    interval: float
    """Between two signs."""
    silence: float
    """Without a sign after which a rank is not heard of."""
    patience: float
    """For answers to a call."""

    @staticmethod
    def of(timeout: float) -> Limits:
        """Derived from ``guard.hang_timeout_seconds``."""
        interval = min(5.0, max(0.05, timeout / 60))
        return Limits(timeout, interval, min(30.0, max(1.0, timeout / 10)), 2 * interval + min(10.0, timeout / 2))
