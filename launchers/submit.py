"""Jobs are written into their folders and handed over: all of them or none, and by one command at a time."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from configs.compose import save_resolved
from configs.errors import EXIT_DONE, ConfigError
from configs.files import write_whole
from configs.schema.launch import LaunchConfig
from configs.schema.roots import TrainConfig
from launchers.base import Launcher, UnknownOutcomeError
from launchers.foreground import ForegroundLauncher
from launchers.job import Job, JobFolder
from launchers.run_dir import FREE_AGAIN, LOCK, LockedError, held, make_writable, remove_if_empty
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
                held.enter_context(alone_with(planned.folder))
                ready.append(prepare(planned))
                undo.enter_context(_as_they_were(_files_of(ready[-1])))
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
    """Holds a job's folder while it is written and submitted. What it makes, and is still empty after a fault, goes.

    Raises:
        ConfigError: another command does.
        StorageError: it cannot be made or written.
    """
    made = [path for path in (folder.path, *folder.path.parents) if not path.exists()]
    try:
        make_writable(folder.path, "run_dir")
        with held(folder.path / LOCK):
            try:
                yield
            except BaseException:
                remove_if_empty(folder.path)  # while nobody else can be in it
                raise
    except LockedError:
        raise ConfigError(
            str(folder.run_dir),
            "another crosstune is just starting a job there",
            remedy=f"crosstune status tells; {FREE_AGAIN.format(folder.path / LOCK)}",
        ) from None
    except BaseException:
        for path in made:
            remove_if_empty(path)
        raise


@contextmanager
def _as_they_were(files: Sequence[Path]) -> Iterator[None]:
    """Puts files back as they were where a job is refused; not where that is unknown.

    They are copied beforehand and renamed back, so that a disk that is full meanwhile does not matter.
    """
    kept = {file: file.with_name(f".{file.name}.before") for file in files if file.is_file()}
    try:
        for file, copy in kept.items():
            write_whole(copy, file.read_text(encoding="utf-8"))
        try:
            yield
        except UnknownOutcomeError:
            raise
        except BaseException:
            for file in files:
                with suppress(OSError):  # the fault that is already told counts
                    kept[file].replace(file) if file in kept else file.unlink(missing_ok=True)
            raise
    finally:
        for copy in kept.values():
            with suppress(OSError):
                copy.unlink(missing_ok=True)


def _files_of(planned: Plan) -> list[Path]:
    """What `write` writes, or takes away."""
    folder = planned.folder
    rendered = [folder.path / name for name in planned.files]
    return [folder.file, folder.options, folder.request, folder.cancel_mark, *rendered]


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
