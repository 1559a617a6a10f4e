"""How far a piece of work is: a bar with a line of figures on a terminal, elsewhere the line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

PLAIN_EVERY_SECONDS = 5.0
"""Between two lines where there is no terminal."""


class Display:
    """Shows one piece of work; a context manager, or closed with `close`.

    Args:
        title: what the line begins with.
        total: amount of work.
        completed: part of it that was done before.
        console: where to show; None: standard error, so that standard output stays clean for results.
        say: prints plain lines; None: to the console.
        clock: seconds; a test passes its own.
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        completed: int = 0,
        console: Console | None = None,
        say: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self._clock = title, clock
        self._console = console or Console(stderr=True)
        self._print = say or self._to_console
        self._last_plain = clock()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=completed, line="starting")
            self._bar.start()

    def show(self, completed: int, line: str, *, always: bool = False) -> None:
        """Brings the figures up to date; `always`: also as a plain line, however short ago the last one was."""
        if self._bar:
            self._bar.update(self._task, completed=completed, line=line)
        elif always or self._clock() - self._last_plain >= PLAIN_EVERY_SECONDS:
            self._last_plain = self._clock()
            self._print(f"{self.title}: {line}")

    def say(self, text: str) -> None:
        """A line that stays, above the bar if there is one."""
        (self._to_console if self._bar else self._print)(f"{self.title}: {text}")

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _to_console(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def clock_time(seconds: float) -> str:
    """``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
