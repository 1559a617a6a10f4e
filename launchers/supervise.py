"""Attempt after attempt, for launchers that stay in the foreground; schedulers do this themselves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from configs.errors import EXIT_DONE, EXIT_USER_FAULT, RunFailedError
from launchers.job import Job, JobFolder, root_cause
from launchers.torchrun import passed_on

Note = Callable[[str], None]


class StopSignals:
    """The stop signals that this command gets: a context manager of the main thread.

    Whoever runs an attempt passes them on.

    Args:
        note: what the user is told at the first one.
    """

    def __init__(self, note: str = "") -> None:
        self.note = note
        self.heard: list[int] = []
        """Numbers, in order."""

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._hear) for number in passed_on()}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard.append(number)
        if self.note and len(self.heard) == 1:
            os.write(2, f"crosstune: {self.note}\n".encode())  # print is not for signal handlers


@contextmanager
def deferred_stops() -> Iterator[None]:
    """Lets a stop signal of this command wait until the end of what must not be left half done."""
    with StopSignals(note="stops as soon as it is known what became of the job") as stops:
        yield
    for number in stops.heard[:1]:
        signal.raise_signal(number)


def supervise(
    start: Callable[[int], int],
    job: Job,
    folder: JobFolder,
    stops: StopSignals,
    note: Note,
    newest: Callable[[JobFolder], int] | None = None,
) -> int:
    """Starts a job, and again from its last checkpoint while it does not come to its end.

    Not again: after a fault of the user's (exit code 2), after a stop that this command was asked for, where the job
    was cancelled, and where two attempts in a row got no further.

    Args:
        start: runs one attempt, by its number, to its end on all machines and gives the worst exit code.
        job: what runs.
        folder: of the job.
        stops: signals heard so far; `start` passes them on.
        note: takes lines for the user.
        newest: step of the newest checkpoint, where not only this machine's folder counts; None: `newest_step`.

    Returns:
        The exit code of the last attempt.
    """
    newest = newest or newest_step
    steps, last = newest(folder), job.attempt + job.spec.restarts
    code = EXIT_DONE
    for attempt in range(job.attempt, last + 1):
        if stops.heard:  # before anything was started
            code = code or 128 + stops.heard[0]
            break
        code = start(attempt)
        if code in (EXIT_DONE, EXIT_USER_FAULT) or stops.heard or folder.cancelled:
            break
        ended = f"attempt {attempt} ended with exit code {code}"
        before, steps = steps, newest(folder)
        if attempt == last:
            note(f"{ended}: no restart is left (restarts={job.spec.restarts})")
        elif attempt > job.attempt and steps == before:
            note(f"{ended} and got no further than the one before: no restart")
            break
        else:
            where = f"from step {steps}" if steps >= 0 else "from the beginning: there is no checkpoint"
            note(f"{ended}: starting again {where}, {last - attempt} restart(s) left")
    return code


def newest_step(folder: JobFolder) -> int:
    """Of the run's newest complete checkpoint; -1 where there is none."""
    saved = sorted(folder.run_dir.glob("checkpoints/step-*[0-9]/COMPLETE"))
    return int(saved[-1].parent.name.removeprefix("step-")) if saved else -1


def failed(job: Job, folder: JobFolder, code: int) -> RunFailedError:
    """What a job that did not end well is told as: its earliest fault, with the machine it befell.

    Args:
        job: what was submitted.
        folder: of the job.
        code: exit code of its last attempt, which the error takes on.
    """
    cause = root_cause(marks := folder.marks(since=job.attempt))
    if cause is None:
        told = ", ".join(f"{mark.exit_code} on {mark.host}" for mark in marks if mark.exit_code)
        error = RunFailedError(
            str(folder.run_dir), f"ended with exit code {told or f'{code} on a machine that left no word'}"
        )
    else:
        mark, fault = cause
        rank = (mark.fault or {}).get("rank")
        who = f"rank {rank} on {mark.host}" if rank is not None else mark.host
        error = RunFailedError(fault.where, f"{fault.found} ({who})", allowed=fault.allowed, remedy=fault.remedy)
    error.exit_code = code
    return error
