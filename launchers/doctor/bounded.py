"""Processes that load a device's driver. Each has its time, and one that hangs in the driver holds up nobody."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launchers.torchrun import end_with_parent

MESSAGES = ".err"
"""Ends the name of a file with what a process printed, beside that with its answer."""
REAP_SECONDS = 5.0
"""For processes to be gone once they are killed. One that sits in a driver may never be."""


def start(command: Sequence[str], environment: Mapping[str, str], messages: Path) -> subprocess.Popen[bytes]:
    """Starts a process that ends with this one.

    Args:
        command: to run.
        environment: of the process, all of it.
        messages: takes its standard error. A pipe that is full, as nobody empties it yet, would hold the process up.
    """
    with messages.open("wb") as stderr:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, preexec_fn=end_with_parent
        )


def end(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> list[int]:
    """Waits for all, and kills those that are still there at `deadline` (`time.monotonic`).

    Returns:
        The places of those, whether or not they are gone by now.
    """
    _wait(processes, deadline)
    late = [place for place, process in enumerate(processes) if process.poll() is None]
    for place in late:
        processes[place].kill()
    _wait([processes[place] for place in late], time.monotonic() + REAP_SECONDS)
    return late


def _wait(processes: Sequence[subprocess.Popen[bytes]], deadline: float) -> None:
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def last_words(messages: Path) -> str:
    """The last line of a process's standard error; empty: it said nothing."""
    from launchers.base import last_lines

    return next((line.strip() for line in reversed(last_lines(messages)) if line.strip()), "")
