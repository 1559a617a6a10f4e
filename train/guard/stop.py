"""A wish to stop: by a signal, a file or the clock. The ranks agree on the step, save and leave with exit code 75."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from configs.schema.guard import GuardConfig

STOP_FILE = "PREEMPT"
"""In the run's folder: whoever makes it stops the run."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """Collects what asks this rank to stop, from the first step to the last.

    Args:
        folder: of the run.
        cfg: the guard group.
        started: `time.time` at which the command began.
    """

    def __init__(self, folder: Path, cfg: GuardConfig, started: float) -> None:
        self.folder, self.cfg, self.started = folder, cfg, started
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def wanted(self) -> str | None:
        """Why this rank wants to stop, in words; None: it does not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if (self.folder / STOP_FILE).exists():
            return f"the file {STOP_FILE}"
        minutes = self.cfg.stop_after_minutes
        if minutes and time.time() - self.started > 60 * minutes:
            return f"guard.stop_after_minutes={minutes:g}"
        return None
