"""The live display of a run: step, loss, speed, memory, time left. A plain line now and then where no one watches."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from train.loop import Hook, Record

PLAIN_EVERY_SECONDS = 5.0
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
        self._total = 0
        self._last_plain = float("-inf")
        self._validation = ""
        self._bar: RichProgress | None = None
        self._task = TaskID(0)

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Opens the display."""
        self._total = total_steps
        self._times.append((self._clock(), 0))
        if first_step:
            self.console.print(f"{self.stage}: going on after step {first_step} of {total_steps}", highlight=False)
        if self.console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"),
                console=self.console, transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task(self.stage, total=total_steps, completed=first_step, line="starting")
            self._bar.start()

    def on_step(self, record: Record) -> None:
        """Brings the display up to date."""
        now = self._clock()
        self._times.append((now, int(record["tokens"])))
        step = int(record["step"])
        if "validation_loss" in record:
            self._validation = f"  validation {record['validation_loss']:.4f}"
            self._say(f"{self.stage}: step {step}{self._validation}")
        line = self.line(record)
        if self._bar:
            self._bar.update(self._task, completed=step, line=line)
        elif now - self._last_plain >= PLAIN_EVERY_SECONDS or step == self._total:
            self._last_plain = now
            self._say(f"{self.stage}: {line}")

    def on_checkpoint(self, path: Path) -> None:
        """Says where the checkpoint is."""
        self._say(f"{self.stage}: checkpoint {path}")

    def on_end(self) -> None:
        """Closes the display."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def line(self, record: Record) -> str:
        """All figures of a step in one line."""
        seconds = self._times[-1][0] - self._times[0][0]
        tokens = sum(count for _, count in list(self._times)[1:])
        step = int(record["step"])
        left = (self._total - step) * seconds / max(1, len(self._times) - 1)
        speed = tokens / seconds if seconds > 0 else float(record["tokens_per_second"])
        return (
            f"step {step}/{self._total}  loss {record['loss']:.4f}{self._validation}  {speed:,.0f} tok/s"
            f"  {record['peak_gib']:.1f} GiB  ETA {_clock_time(left)}"
        )

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def counter(title: str, total: int, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Shows how far a piece of work is: a bar on a terminal, else a plain line now and then.

    Yields:
        A function to call with (done, total).
    """
    console = console or Console(stderr=True)
    started = last = time.monotonic()
    with RichProgress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)

        def show(done: int, of: int) -> None:
            nonlocal last
            bar.update(task, completed=done)
            now = time.monotonic()
            if not console.is_terminal and (now - last >= PLAIN_EVERY_SECONDS or done == of):
                last = now
                console.print(f"{title}: {done}/{of}  {now - started:.0f} s", highlight=False, markup=False)

        yield show
