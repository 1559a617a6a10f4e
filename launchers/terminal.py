"""Lines of output for the user, from a thread of their own."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

ROOM = 10_000
LAST_SECONDS = 5.0
"""For what still waits at the end."""


def lines_missing(count: int) -> str:
    """Stands for lines that were not shown."""
    return f"... {count} lines left out here ..."


def say(line: str) -> None:
    """A line for the user, at once. A job ends neither by a character nor by a reader that has gone (``| head``)."""
    try:
        try:
            print(line, flush=True)
        except UnicodeEncodeError:
            encoding = sys.stdout.encoding
            print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        told = f"crosstune: nobody takes this command's output any more ({error.strerror}); the job goes on\n"
        with suppress(OSError):
            os.write(2, told.encode())
        with suppress(OSError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # what Python still holds is for nobody, either


Line = TypeVar("Line", str, bytes)


class Terminal(Generic[Line]):
    """Shows lines without ever making whoever has them wait: a terminal that is held (Ctrl-S) holds up no job.

    Args:
        say: prints a line; see `say`.
        missing: the line that stands for so many which were left out.
        room: lines that wait; beyond, they are left out here (they are in the machines' output.log).
    """

    def __init__(self, say: Callable[[Line], None], missing: Callable[[int], Line], room: int = ROOM) -> None:
        self._say: Callable[[Line], None] = say
        self._missing: Callable[[int], Line] = missing
        self._lines: queue.Queue[Line | None] = queue.Queue(room)
        self._left_out = 0

    def __enter__(self) -> Terminal[Line]:
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._lines.put(None, timeout=LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(LAST_SECONDS)

    def show(self, line: Line) -> None:
        """A line, unless too many wait already."""
        try:
            if self._left_out:
                self._lines.put_nowait(self._missing(self._left_out))
                self._left_out = 0
            self._lines.put_nowait(line)
        except queue.Full:
            self._left_out += 1

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._say(line)
