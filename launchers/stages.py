"""The lines on the terminal that say which stage of a command is at work and how long it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COUNT_SECONDS = 5.0
"""Between two notes of how far a stage is."""


def is_first_rank() -> bool:
    """Whether this process speaks for all: it has no rank, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


class Stages:
    """Numbers the stages of one command: ``[2/5] data``, notes below it, then its time.

    Args:
        total: how many stages the command has.
        quiet: prints nothing; for workers whose parent prints the stages, and for ranks other than 0.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total, self.quiet = total, quiet or not is_first_rank()
        self._number = 0
        self._started = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage; its time is said when it ends without a fault."""
        self._number += 1
        started = time.monotonic()
        self._say(f"[{self._number}/{self.total}] {name}")
        yield
        self.note(f"done in {time.monotonic() - started:.1f} s")

    def note(self, text: str) -> None:
        """A line below the current stage."""
        self._say(f"      {text}")

    def row_counter(self) -> Callable[[int, int], None]:
        """A function to call with (rows, tokens) so far; it makes a note of them now and then."""
        said = time.monotonic()

        def count(rows: int, tokens: int) -> None:
            nonlocal said
            if time.monotonic() - said >= COUNT_SECONDS:
                said = time.monotonic()
                self.note(f"{rows:,} rows read, {tokens:,} tokens")

        return count

    def end(self, text: str) -> None:
        """The last line, with the time of all stages."""
        self._say(f"{text} ({self.seconds:.0f} s)")

    @property
    def seconds(self) -> float:
        """Time since the command began."""
        return time.monotonic() - self._started

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)
