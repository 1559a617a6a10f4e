"""Launchers whose job lives as long as the command that started it, which is asked for by its process."""

from __future__ import annotations

import os
import socket
from abc import abstractmethod
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from configs.errors import EXIT_DONE, EXIT_RESUMABLE, CheckpointError
from launchers.base import Launcher
from launchers.job import Job, JobFolder, Report, Word
from launchers.supervise import Note, StopSignals, failed, newest_step, supervise
from launchers.terminal import say
from launchers.watch import SILENT_SECONDS, last_sign, watched
from train.run_folder import STOP_FILE

SAME_PROCESS_SECONDS = 1.0
"""By so much the begin of a process may differ between two looks at it; numbers of processes are given out again."""


class ForegroundLauncher(Launcher):
    """See the module. The command that launched is the supervisor: what ends it ends the job."""

    foreground = True
    note: Note = staticmethod(say)

    @abstractmethod
    def start(self, job: Job, folder: JobFolder, attempt: int, stops: StopSignals) -> int:
        """Runs one attempt on all machines to its end; nothing of it is left running anywhere.

        Args:
            job: what runs.
            folder: of the job.
            attempt: its number.
            stops: signals that this command gets; the first is passed on, so that the run saves, a second ends all.

        Returns:
            The worst exit code: 2 before 3 before 128 + n before 75 before 0.
        """

    def submit(self, job: Job, folder: JobFolder) -> dict[str, Any]:
        """See `Launcher.submit`.

        Raises:
            RunFailedError: a job of several machines did not end well; it has the exit code that this ended with.
        """
        with StopSignals() as stops, watched(job, folder):
            start = partial(self.start, job, folder, stops=stops)
            code = supervise(start, job, folder, stops, self.note, self.newest_step)
        if stops.heard and code not in (EXIT_DONE, EXIT_RESUMABLE):
            folder.ask_to_cancel()  # ended by its user before it could save: that is no failure
        if code != EXIT_DONE and job.spec.nodes > 1:
            raise failed(job, folder, code)
        return {"exit_code": code}  # a single machine has told its fault already, on this terminal

    def newest_step(self, folder: JobFolder) -> int:
        """Of the newest checkpoint of the run that is known here; -1 where there is none."""
        return newest_step(folder)

    def handle(self) -> dict[str, Any]:
        """Names this process, for commands in other terminals."""
        return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()}

    def report(self, job: Job, folder: JobFolder) -> Report:
        """Whether the supervisor is at this job: what it said itself, whether its process lives, or gives signs."""
        if not job.handle:
            return Report(Word.unknown, "it was not started")
        where, sign = f"process {job.handle['pid']} on {job.handle['host']}", last_sign(job, folder)
        if sign is not None and sign.ended:
            return Report(Word.ended, f"{where} has ended it")
        if job.handle["host"] == socket.gethostname():
            return Report(Word.running, where) if _supervisor(job) else Report(Word.ended, f"{where} has ended")
        if sign is not None and sign.age_seconds > SILENT_SECONDS:
            return Report(Word.ended, f"{where} has given no sign for {sign.age_seconds / 60:.0f} minutes")
        return Report(Word.running, f"{where}, which cannot be asked from {socket.gethostname()}")

    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        """Softly by the run's own stop file, which any machine can make; hard by signals to the supervisor.

        Raises:
            CheckpointError: hard, and the supervisor is on another machine.
        """
        if not hard:
            (folder.run_dir / STOP_FILE).touch()
            return
        if (supervisor := supervisor_here(job, folder)) is not None:
            with suppress(psutil.NoSuchProcess):
                supervisor.kill()  # its machines end with it


def supervisor_here(job: Job, folder: JobFolder) -> psutil.Process | None:
    """The process of the command that launched a job; None: it has ended.

    Raises:
        CheckpointError: it is on another machine.
    """
    if job.handle["host"] != socket.gethostname():
        raise CheckpointError(
            str(folder.run_dir),
            f"is supervised on {job.handle['host']}, which cannot be signalled from {socket.gethostname()}",
            remedy=f"crosstune cancel --hard there, or kill {job.handle['pid']}",
        )
    return _supervisor(job)


def _supervisor(job: Job) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(job.handle["pid"])
        same = abs(process.create_time() - job.handle["began"]) < SAME_PROCESS_SECONDS
        if same and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None
