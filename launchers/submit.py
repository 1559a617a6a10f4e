"""Jobs are written into their folders and handed over: all of them or none, and by one command at a time."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from filelock import FileLock, Timeout

from configs.compose import save_resolved
from configs.errors import EXIT_DONE, ConfigError
from configs.files import write_whole
from configs.schema.launch import LaunchConfig
from configs.schema.roots import TrainConfig
from launchers.base import Launcher, UnknownOutcomeError
from launchers.foreground import ForegroundLauncher
from launchers.job import Job, JobFolder
from launchers.run_dir import LOCK, make_writable
from launchers.supervise import deferred_stops
from launchers.terminal import say

Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A job before anything of it is written."""

    launcher: Launcher
    cfg: TrainConfig
    options: LaunchConfig
    job: Job
    folder: JobFolder
    files: dict[str, str]


def start(plans: Sequence[Plan], prepare: Callable[[Plan], Plan]) -> list[Result]:
    """Writes jobs and hands them over; where one is refused, all folders are as they were.

    Nobody else may start a job in these folders meanwhile, and a stop of this command waits until it is known what the
    scheduler calls the jobs: a job that nobody knows of could not be ended.

    Args:
        plans: one, or those of a sweep.
        prepare: what is to be done with the folder first; see `launchers.launch`.
    """
    launcher = plans[0].launcher
    with deferred_stops(), ExitStack() as held:
        with ExitStack() as undo:
            ready = []
            for planned in plans:
                new = not planned.folder.path.exists()
                held.enter_context(alone_with(planned.folder))
                undo.enter_context(_as_it_was(planned, new))
                ready.append(prepare(planned))
                write(ready[-1])
            if isinstance(launcher, ForegroundLauncher):
                handles = []
            else:
                handles = launcher.submit_all([(planned.job, planned.folder) for planned in ready])
        if handles:
            return [_tell(planned, handle) for planned, handle in zip(ready, handles, strict=True)]
    return [_run(planned) for planned in ready]


@contextmanager
def alone_with(folder: JobFolder) -> Iterator[None]:
    """Holds a job's folder while it is written and submitted.

    Raises:
        ConfigError: another command does.
        StorageError: it cannot be made or written.
    """
    make_writable(folder.path, "run_dir")
    lock = FileLock(folder.path / LOCK)
    try:
        with lock.acquire(blocking=False):
            yield
    except Timeout:
        raise ConfigError(
            str(folder.run_dir), "another crosstune is just starting a job there", remedy="crosstune status tells"
        ) from None


@contextmanager
def _as_it_was(planned: Plan, new: bool) -> Iterator[None]:
    """Puts the folder of a job back as it was where the job is refused; not where that is unknown."""
    folder = planned.folder
    files = [folder.file, folder.options, folder.request, folder.cancel_mark]
    files += [folder.path / name for name in planned.files]
    there = {file: file.read_text(encoding="utf-8") for file in files if file.is_file()}
    try:
        yield
    except UnknownOutcomeError:
        raise
    except BaseException:
        for file, text in there.items():
            write_whole(file, text)
        if new:
            shutil.rmtree(folder.path, ignore_errors=True)
            if [path.name for path in folder.run_dir.iterdir()] in ([], [LOCK]):
                shutil.rmtree(folder.run_dir, ignore_errors=True)
        raise


def write(planned: Plan) -> None:
    """The job's files; of one in the foreground with who supervises it."""
    folder = planned.folder
    folder.take_back_cancel()
    save_resolved(planned.cfg, folder.request)
    save_resolved(planned.options, folder.options)
    for name, text in planned.files.items():
        write_whole(folder.path / name, text)
    folder.write(planned.job)


def _run(planned: Plan) -> Result:
    """In the foreground, to its end."""
    launcher, folder, job = planned.launcher, planned.folder, planned.job
    say(f"job {job.spec.name}: {_size(job)}; run: {folder.run_dir}")
    code = int(launcher.submit(job, folder)["exit_code"])
    if code == EXIT_DONE:
        say(f"done; run: {folder.run_dir}")
    return {"run_dir": str(folder.run_dir), "handle": job.handle, "exit_code": code}


def _tell(planned: Plan, handle: dict[str, Any]) -> Result:
    """Keeps what the scheduler calls the job, and says how to go on."""
    job = replace(planned.job, handle=handle)
    planned.folder.write(job)
    run = shlex.quote(str(planned.folder.run_dir))
    print(f"job {job.spec.name}: submitted, {_size(job)}\n  crosstune status {run}\n  crosstune logs -f {run}")
    return {"run_dir": str(planned.folder.run_dir), "handle": handle}


def _size(job: Job) -> str:
    spec = job.spec
    machines = f"{spec.nodes} machines" if spec.nodes > 1 else "1 machine"
    return f"{machines} x {spec.nproc} process{'es' if spec.nproc > 1 else ''}"
