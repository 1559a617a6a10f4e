"""The end of a look, also one before its time: what it wrote for others to see does not outlive it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGALRM") if hasattr(signal, name))
CLEAR_SECONDS = 3.0
"""For a file system that does not answer."""
GONE = 1
"""Exit code where whoever asked has gone."""

_traces: set[Path] = set()


def leaves(file: Path) -> None:
    """Notes a file that is to be taken away, however this process ends."""
    _traces.add(file)


def clear() -> None:
    """Takes away what was noted."""
    while _traces:
        with suppress(OSError):
            _traces.pop().unlink()


def leave(code: int) -> NoReturn:
    """Clears, and ends the process though its threads may hang."""
    clearing = threading.Thread(target=clear, daemon=True)
    clearing.start()
    clearing.join(CLEAR_SECONDS)
    os._exit(code)


def ends_on_signals() -> None:
    """Signals end this process, the first one of a container too: that gets none that it has no handler for."""
    for number in ENDING:
        signal.signal(number, lambda number, frame: leave(128 + number))


def ends_with_asker() -> None:
    """Ends this process once standard input does: ssh and srun keep it open as long as whoever asked is there."""

    def follow() -> None:
        while os.read(sys.stdin.fileno(), 65536):
            pass
        leave(GONE)

    threading.Thread(target=follow, name="asker", daemon=True).start()
