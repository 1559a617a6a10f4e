"""The live display of a run: step, loss, speed, memory, time left. A plain line now and then where no one watches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from train.loop import Hook, Record
from train.observe.display import Display, clock_time

WINDOW_STEPS = 20
"""Speed and time left are means over so many steps: single steps differ widely in length."""


class Progress(Hook):
    """Shows the loop on a terminal, or as plain lines when the output is a file or a pipe.

    Args:
        console: where to show; None: standard error, so that standard output stays clean for results.
        stage: what the line begins with.
        clock: seconds; a test passes its own.
    """

    def __init__(
        self, console: Console | None = None, stage: str = "train", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True)
        self.stage, self._clock = stage, clock
        self._times: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS + 1)
        self._first = self._total = 0
        self._validation = ""
        self._display: Display | None = None

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Opens the display."""
        self._first, self._total = first_step, total_steps
        self._times.append((self._clock(), 0))
        self._display = Display(self.stage, total_steps, completed=first_step, console=self.console, clock=self._clock)
        if first_step:
            self._display.say(f"going on after step {first_step} of {total_steps}")

    def on_step(self, record: Record) -> None:
        """Brings the display up to date."""
        assert self._display is not None
        self._times.append((self._clock(), int(record["tokens"])))
        step = int(record["step"])
        if "validation_loss" in record:
            self._validation = f"  validation {_figure(record['validation_loss'])}"
            self._display.say(f"step {step}{self._validation}")
        self._display.show(step, self.line(record), always=step in (self._first + 1, self._total))

    def on_checkpoint(self, path: Path) -> None:
        """Says where the checkpoint is."""
        assert self._display is not None
        self._display.say(f"checkpoint {path}")

    def on_note(self, text: str) -> None:
        """A line that stays."""
        assert self._display is not None
        self._display.say(text)

    def on_rollback(self, step: int) -> None:
        """Speed and time left begin anew."""
        assert self._display is not None
        self._first = step
        self._times.clear()
        self._times.append((self._clock(), 0))
        self._display.say(f"going on after step {step} of {self._total}")

    def on_end(self) -> None:
        """Closes the display."""
        if self._display:
            self._display.close()

    def line(self, record: Record) -> str:
        """All figures of a step in one line."""
        seconds = self._times[-1][0] - self._times[0][0]
        tokens = sum(count for _, count in list(self._times)[1:])
        step = int(record["step"])
        left = (self._total - step) * seconds / max(1, len(self._times) - 1)
        speed = tokens / seconds if seconds > 0 else float(record["tokens_per_second"])
        return (
            f"step {step}/{self._total}  loss {_figure(record['loss'])}{self._validation}  {speed:,.0f} tok/s"
            f"  {record['peak_gib']:.1f} GiB  ETA {clock_time(left)}"
        )


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


@contextmanager
def counter(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Shows how far a piece of work is: a bar on a terminal, else a plain line now and then.

    Yields:
        A function to call with (done, total).
    """
    started = time.monotonic()
    with Display(title, total, console=console) as display:

        def show(done: int, of: int) -> None:
            display.show(done, f"{done}/{of}  {time.monotonic() - started:.0f} s", always=done == of)

        yield show
