"""Signs of life, both ways, also of a command that is held up itself."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launchers.ssh.connection import Connection


class Beats:
    """Gives all agents a sign of life, from a thread of its own: a terminal or a file system may hold up the others.

    At its end, whatever connection is still open is closed.

    Args:
        seconds: between two.
    """

    def __init__(self, seconds: float) -> None:
        self.connections: set[Connection] = set()
        """A connection leaves by being closed."""
        self._seconds, self._over = seconds, threading.Event()

    def __enter__(self) -> Beats:
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()
        for connection in self.connections:
            connection.close()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            for connection in tuple(self.connections):
                if connection.closed:
                    self.connections.discard(connection)
                else:
                    connection.send("beat")


class Lapse:
    """Tells a loop for how long it did not run: Ctrl-Z, SIGSTOP, a machine that is out of breath, a hung disk.

    What others said meanwhile has not been heard yet, and the time counts against nobody.

    Args:
        seconds: that a round may take.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._before = seconds, time.monotonic()

    def __call__(self, now: float) -> float:
        """Seconds between the round before and that of now (`time.monotonic`), where they are too many; else 0."""
        gap, self._before = now - self._before, now
        return gap if gap > self._seconds else 0.0
