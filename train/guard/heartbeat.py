"""Where a rank is: which step, which phase, since when. Written by the thread of the steps, read by any other.

A change of phase costs a few attribute writes and no lock: a reader may see a phase with the time of the one before,
and looks again a moment later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum


class Phase(Enum):
    """What the thread of the steps is at, in the order of a step."""

    setup = "setup"
    """Before the first step."""
    data = "data"
    forward = "forward"
    backward = "backward"
    optimizer = "optimizer"
    collective = "collective"
    """Waits for the figures of the other ranks."""
    validation = "validation"
    save = "save"
    """Copies the state, or waits for a writer."""
    guard = "guard"
    """Compares weights, dumps a batch, rolls back."""
    done = "done"


class Heartbeat:
    """The place of one rank.

    Args:
        clock: seconds that never go back; a test passes its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.step = 0
        """Counted from 1; 0 before the first."""
        self.phase = Phase.setup
        self.entered = 0
        """Phases begun since the step began: ranks take the same ones, so that the lower count is behind."""
        self.beats = 0
        """Changes so far: a rank whose count stands still does not advance."""
        self.since = clock()
        """When the phase began."""

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """The thread of the steps begins a phase."""
        if step is not None:
            self.step, self.entered = step, 0
        self.phase = phase
        self.entered += 1
        self.since = self._clock()
        self.beats += 1

    def beat(self) -> None:
        """Within a long phase, or beside it on another thread: something has been done."""
        self.beats += 1
