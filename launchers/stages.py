"""The lines on the terminal that say which stage of a command is at work and how long it took."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from data_prep.progress import PrepProgress, Progress
    from train.observe.display import Display

WINDOW = 60
"""Speed and time left are means over so many of the last calls: files differ in the length of their rows."""


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

    def line(self, text: str) -> None:
        """A line that belongs to no stage."""
        self._say(text)

    def note(self, text: str) -> None:
        """A line below the current stage."""
        self._say(f"      {text}")

    @contextmanager
    def preparation(self) -> Iterator[Progress]:
        """Shows how far a preparation is: a bar on a terminal, else a note now and then.

        Yields:
            A function to call with the figures so far.
        """
        meter = PrepMeter(say=self.note)
        try:
            yield (lambda figures: None) if self.quiet else meter.show
        finally:
            meter.close()

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


class PrepMeter:
    """Turns the figures of a preparation into a line: percent, rows, speed, time left. One display per stage.

    Args:
        say: prints plain lines where there is no terminal.
        console: where the bar is; None: standard error.
        clock: seconds; a test passes its own.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._console, self._clock = say, console, clock
        self._stage = ""
        self._display: Display | None = None
        self._last: deque[tuple[float, PrepProgress]] = deque(maxlen=WINDOW)

    def show(self, figures: PrepProgress) -> None:
        """Brings the display up to date."""
        if self._display is None or self._stage != figures.stage:
            self.close()
            from train.observe.display import Display

            self._stage = figures.stage
            self._last.clear()
            self._display = Display(
                figures.stage, figures.bytes_total, console=self._console, say=self._say, clock=self._clock
            )
        self._last.append((self._clock(), figures))
        self._display.show(figures.bytes_done, self.line(figures))

    def line(self, figures: PrepProgress) -> str:
        """The figures in one line; speed and time left once there is something to measure them by."""
        from train.observe.display import clock_time

        (begin, first), (now, _) = self._last[0], self._last[-1]
        share = figures.bytes_done / figures.bytes_total if figures.bytes_total else 1.0
        line = f"{share:.0%}  {figures.rows:,} rows"
        seconds, done = now - begin, figures.bytes_done - first.bytes_done
        if seconds <= 0 or done <= 0:
            return line
        line += f"  {(figures.rows - first.rows) / seconds:,.0f} rows/s"
        if figures.stage == "prepare":
            line += f"  {(figures.tokens - first.tokens) / seconds:,.0f} tok/s"
        return line + f"  ETA {clock_time((figures.bytes_total - figures.bytes_done) * seconds / done)}"

    def close(self) -> None:
        """Takes the bar away."""
        if self._display:
            self._display.close()
            self._display = None
