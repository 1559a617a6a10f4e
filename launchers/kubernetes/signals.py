"""Signals that end a command which has something at a server to clear away first."""

from __future__ import annotations

import signal
import time
from types import FrameType

from launchers.torchrun import REPEAT_SECONDS, EndedBySignal


class EndsBySignal:
    """Ctrl-C, SIGTERM and SIGHUP end what goes on by an exception: a context manager of the main thread.

    Between `clearing` and its end the first one waits until all is cleared away; another one does not.
    """

    def __init__(self) -> None:
        self._last: float | None = None
        self._clearing = False
        self._held: BaseException | None = None

    def __enter__(self) -> EndsBySignal:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # What is ignored stays so: `nohup`, or a shell's job in the background.
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._hear) for number in heard}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._held is not None:
            raise self._held

    def clearing(self) -> None:
        """From here on it is cleared away."""
        self._clearing = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        before, self._last = self._last, time.monotonic()
        if before is not None and self._last - before < REPEAT_SECONDS:
            return  # the same wish: `timeout` signals a process and then its group
        ending = KeyboardInterrupt() if number == signal.SIGINT else EndedBySignal(128 + number)
        if not self._clearing or before is not None:
            raise ending
        self._held = ending
