"""Lines of output for the user, from a thread of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

ROOM = 10_000
"""Lines that wait; beyond, lines are left out here (they are in the machines' output.log)."""
LAST_SECONDS = 5.0
"""For what still waits at the end."""


class Terminal:
    """Shows lines without ever making whoever has them wait: a terminal that is held (Ctrl-S) holds up no job.

    Args:
        say: prints a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lines: queue.Queue[str | None] = queue.Queue(ROOM)
        self._left_out = 0

    def __enter__(self) -> Terminal:
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._lines.put(None, timeout=LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_SECONDS)

    def show(self, line: str) -> None:
        """A line, unless too many wait already."""
        try:
            if self._left_out:
                self._lines.put_nowait(f"... {self._left_out} lines left out here ...")
                self._left_out = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._left_out += 1

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._say(line)
