"""What every launcher answers. One file per launcher beside this one, with its schema and its YAML."""

from __future__ import annotations

import logging
import os
import shlex
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import CrosstuneError, RunFailedError, first_line
from configs.schema.launch import ClusterConfig, LauncherConfig
from launchers.job import Job, JobFolder, Report
from launchers.spec import LaunchSpec

logger = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
"""Between two looks at a log that is followed."""
LAST_BYTES = 1 << 16
"""At the end of a file in which its last lines are looked for."""
CHUNK = 1 << 20
"""Bytes of a log that are in memory at a time."""


class UnknownOutcomeError(RunFailedError):
    """It is not known whether the scheduler took a job; one that it has is found by its name later."""


class Launcher(ABC):
    """Starts jobs on one kind of cluster, and asks after them.

    Args:
        cfg: its settings.
        cluster: what the machines have.
    """

    name: str
    """The option of the `launcher` group."""
    foreground: bool = False
    """The job lives as long as the command that started it; else a scheduler keeps it."""

    def __init__(self, cfg: LauncherConfig, cluster: ClusterConfig) -> None:
        self.cfg, self.cluster = cfg, cluster

    def faults(self, spec: LaunchSpec) -> Iterator[CrosstuneError]:
        """What can be told to be wrong before anything is written; asks no network."""
        yield from ()

    @abstractmethod
    def render(self, spec: LaunchSpec, attempt: int) -> dict[str, str]:
        """The files that will be submitted, by name: pure, the same bytes for the same spec, nothing secret in them.

        Args:
            spec: the job.
            attempt: number of its first attempt.
        """

    def render_sweep(self, specs: Sequence[LaunchSpec], attempt: int) -> dict[str, str]:
        """The files by which several jobs go to the scheduler as one; none: each goes by its own files.

        Raises:
            ConfigError: they cannot go as one.
        """
        return {}

    @abstractmethod
    def submit(self, job: Job, folder: JobFolder) -> dict[str, Any]:
        """Hands the rendered files, which lie in `folder`, to the scheduler.

        Returns:
            What the scheduler calls the job: ``Job.handle``. A launcher in the foreground starts further attempts
            itself (`launchers.supervise`) and gives the job's ``exit_code``.

        Raises:
            UnknownOutcomeError: the scheduler did not answer. `report` and `cancel` of a job without a handle ask for
                its name.
            CrosstuneError: it was refused; nothing is left behind. In the foreground: how the job ended.
        """

    def submit_all(self, jobs: Sequence[tuple[Job, JobFolder]]) -> list[dict[str, Any]]:
        """Hands several jobs over at once, as a sweep does; all or none.

        Returns:
            Their handles, in order.

        Raises:
            UnknownOutcomeError: the scheduler did not answer, or does not say that it ended those before the one that
                it refused; which of them may run is told.
            CrosstuneError: one was refused; those before it have been cancelled.
        """
        handles: list[dict[str, Any]] = []
        try:
            for job, folder in jobs:
                handles.append(self.submit(job, folder))
        except BaseException as error:
            self._take_back(
                [(replace(job, handle=handle), folder) for (job, folder), handle in zip(jobs, handles, strict=False)],
                error,
            )
            raise
        return handles

    def _take_back(self, submitted: Sequence[tuple[Job, JobFolder]], reason: BaseException) -> None:
        """Cancels the jobs of a sweep that cannot be submitted as a whole.

        Raises:
            UnknownOutcomeError: not all are known to have ended.
        """
        left = []
        for job, folder in submitted:
            try:
                self.cancel(job, folder, hard=True)
                note = folder.ask_to_cancel
            except CrosstuneError as fault:
                left.append(f"{folder.run_dir.name}: {fault.found}")
                note = partial(folder.write, job)  # by its handle it can be asked for later
            with suppress(CrosstuneError):
                note()
        if left:
            why = reason.found if isinstance(reason, CrosstuneError) else first_line(reason)
            run = shlex.quote(str(submitted[0][1].run_dir.parent))
            raise UnknownOutcomeError(
                f"launcher={self.name}",
                f"{why}; jobs that may run although they were to be cancelled: {'; '.join(left)}",
                remedy=f"crosstune status {run} tells, crosstune cancel --hard {run} ends them",
            ) from None

    @abstractmethod
    def report(self, job: Job, folder: JobFolder) -> Report:
        """What the scheduler says of the job now.

        Raises:
            CrosstuneError: it cannot be asked.
        """

    @abstractmethod
    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        """Ends a job: with a save first, or at once. Returns when the scheduler has taken note.

        Raises:
            CrosstuneError: it cannot be asked.
        """

    def log(self, job: Job, folder: JobFolder, node: int, *, follow: bool) -> Iterator[str]:
        """What a machine printed in the latest attempt, line by line; from the shared folder where it is one.

        Args:
            job: the job.
            folder: of the job.
            node: the machine's number.
            follow: go on until the job has ended, from attempt to attempt.
        """
        attempt = -1
        while (latest := _latest_attempt(job, folder)) > attempt:  # it may be started again meanwhile
            attempt = latest
            yield from tail(folder.output(attempt, node), partial(self._grows, job, folder, attempt, follow))

    def _grows(self, job: Job, folder: JobFolder, attempt: int, follow: bool) -> bool:
        if not follow or attempt != _latest_attempt(job, folder):
            return False
        try:
            return not self.is_over(job, folder)
        except RunFailedError as error:  # the file grows on while a scheduler is away
            logger.warning("%s: %s; the log goes on", error.where, error.found)
            return True

    def is_over(self, job: Job, folder: JobFolder) -> bool:
        """Whether nothing more will come.

        Raises:
            CrosstuneError: the scheduler cannot be asked.
        """
        from launchers.job import Word

        return self.report(job, folder).word not in (Word.pending, Word.running)


def _latest_attempt(job: Job, folder: JobFolder) -> int:
    return max([job.attempt, *folder.begun()])  # earlier ones are of jobs that were here before


def tail(path: Path, more: Any) -> Iterator[str]:
    """Lines of a file that may still grow, and may not be there yet.

    Args:
        path: the file.
        more: called at its end; False: nothing more will come.
    """
    position, rest = 0, b""
    while True:
        going_on = bool(more())  # asked before the look: what is written until the end is still read
        while content := _read(path, position):
            position += len(content)
            *lines, rest = (rest + content).split(b"\n")
            yield from (line.decode("utf-8", errors="replace") for line in lines)
        if not going_on:
            if rest:
                yield rest.decode("utf-8", errors="replace")
            return
        time.sleep(LOOK_SECONDS)


def _read(path: Path, position: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read(CHUNK)
    except FileNotFoundError:
        return b""


def last_lines(path: Path) -> list[str]:
    """The lines at the end of a file; the first may be cut.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return file.read().decode("utf-8", errors="replace").splitlines()


def node_command(python: str, job_file: str) -> list[str]:
    """What a machine runs: the three variables of `launchers.spec` say which one it is."""
    return [python, "-P", "-m", "launchers.node", job_file]


SOURCED_FIRST = (
    '_crosstune_setup=("${@:2:$1}") _crosstune_command=("${@:$1 + 2}"); set --; '
    'for _crosstune_file in "${_crosstune_setup[@]}"; do . "$_crosstune_file" || exit 2; set --; done; '
    'exec "${_crosstune_command[@]}"'
)
"""Shell. A sourced script sees the arguments of who sources it, and may change them: it finds and leaves none. Not in a
function, where what a script declares would end with it."""


def with_setup(command: Sequence[str], setup: Sequence[str]) -> list[str]:
    """A command behind shell scripts that must be sourced first; nothing of either is read by the shell twice."""
    if not setup:
        return list(command)
    return ["bash", "-c", SOURCED_FIRST, "crosstune", str(len(setup)), *setup, *command]


def secret_values(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Values of the secrets, for a launcher to hand over; never to be written."""
    return {name: environment[name] for name in names}
