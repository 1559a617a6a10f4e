"""`crosstune status`, `logs` and `cancel`: what became of a job, from its folder alone."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs.compose import build, load_resolved
from configs.errors import EXIT_DONE, EXIT_RESUMABLE, ConfigError, CrosstuneError, RunFailedError, raise_all
from configs.schema.launch import LaunchConfig
from launchers.base import Launcher, last_lines
from launchers.failure import last_step
from launchers.job import Job, JobFolder, Mark, Report, State, Word, root_cause, state_of

Result = dict[str, Any]
UNKNOWN = "unknown"
"""In place of a state, while the scheduler does not answer."""
LAST_LINES = 12
"""Of the log of the rank that failed first."""


def status(run_dir: Path) -> Result:
    """`crosstune status RUN`: the job's state, its machines, and the earliest fault of an attempt that failed.

    Of a job whose scheduler does not answer it tells what lies in the folder, with exit code 3.
    """
    if runs := runs_of_sweep(run_dir):
        told = [{"run_dir": str(run), **status(run)} for run in runs]
        return {"jobs": told, "exit_code": max(each.get("exit_code", EXIT_DONE) for each in told)}
    folder = JobFolder.of_run(existing_launch(run_dir))
    job, launcher = opened(folder)
    try:
        report = launcher.report(job, folder)
    except RunFailedError as error:
        silent = Report(Word.unknown, f"{error.where}: {error.found}")
        marks = folder.marks(since=job.attempt)
        return _told(job, folder, silent, marks, UNKNOWN) | {"exit_code": error.exit_code}
    marks = folder.marks(since=job.attempt)
    state = state_of(report, marks, job.spec.nodes, cancelled=folder.cancelled)
    return _told(job, folder, report, marks, state.value)


def _told(job: Job, folder: JobFolder, report: Report, marks: Sequence[Mark], state: str) -> Result:
    print(f"{state}: {job.spec.name}" + (f" ({report.detail})" if report.detail else ""))
    attempt = marks[0].attempt if marks else job.attempt
    step, total = _progress(folder.run_dir)
    if step:
        print(f"  step {step:,}{f' of {total:,}' if total else ''}, attempt {attempt}")
    over = state != UNKNOWN and report.word not in (Word.pending, Word.running)
    for mark in marks:
        print(f"  {_line(mark, over)}")
    _tell_differences(marks)
    if over and state != State.succeeded.value:
        print(f"  crosstune resume {shlex.quote(str(folder.run_dir))} starts it again")
    result: Result = {
        "state": state,
        "detail": report.detail,
        "attempt": attempt,
        "step": step,
        "nodes": [asdict(mark) for mark in marks],
    }
    badly = any(mark.exit_code not in (None, EXIT_DONE, EXIT_RESUMABLE) for mark in marks)
    if badly or state in (State.failed.value, State.lost.value):  # also before the next attempt begins
        result["cause"] = _tell_cause(folder, marks)
    return result


def _line(mark: Mark, job_ended: bool) -> str:
    if mark.ended is None:
        ending = "did not say how it ended" if job_ended else "at work"
    else:
        ending = f"exit code {mark.exit_code} after {mark.ended - mark.began:.0f} s"
    return f"node {mark.node} on {mark.host}: {ending}"


def _tell_differences(marks: Sequence[Mark]) -> None:
    if len({mark.environment for mark in marks}) > 1:
        told = ", ".join(f"node {mark.node} {mark.environment}" for mark in marks)
        print(f"  the machines' environments differ: {told}")


def _tell_cause(folder: JobFolder, marks: Sequence[Mark]) -> Result | None:
    """The first fault over all ranks, with the last lines of that rank's log."""
    cause = root_cause(marks)
    if cause is None:
        print("  no machine left a fault behind")
        return None
    mark, error = cause
    rank = (mark.fault or {}).get("rank")
    who = f"rank {rank}, node {mark.node} on {mark.host}" if rank is not None else f"node {mark.node} on {mark.host}"
    print(f"  first fault: {who}")
    print("    " + error.render().replace("\n", "\n    "))
    log = folder.logs(mark.attempt, mark.node) / "workers" / f"rank{rank}.log"
    log = log if rank and log.is_file() else folder.output(mark.attempt, mark.node)
    lines = last_lines(log)[-LAST_LINES:] if log.is_file() else []
    if lines:
        print(f"  the end of {log}:")
        print("\n".join(f"    {line}" for line in lines))
    return {"node": mark.node, "host": mark.host, "rank": rank, "error": error.render(), "log": str(log)}


def _progress(run_dir: Path) -> tuple[int, int]:
    from train.run_folder import RunFolder

    record = RunFolder(run_dir)
    total = record.read_record().total_steps if record.record.is_file() else 0
    return last_step(record.metrics), total


def logs(run_dir: Path, *, node: int, follow: bool) -> Result:
    """`crosstune logs [-f] [--node K] RUN`: what a machine prints; machine 0 has rank 0."""
    folder = JobFolder.of_run(existing_launch(run_dir))
    job, launcher = opened(folder)
    if node >= job.spec.nodes:
        raise ConfigError("--node", str(node), allowed=f"0 to {job.spec.nodes - 1}")
    line = None
    for line in launcher.log(job, folder, node, follow=follow):
        print(line, flush=follow)
    if line is None:
        print(f"node {node} has printed nothing", file=sys.stderr)
    return {"node": node}


def cancel(run_dir: Path, *, hard: bool) -> Result:
    """`crosstune cancel [--hard] RUN`: the run saves and ends; with --hard it ends at once."""
    if runs := runs_of_sweep(run_dir):
        return _cancel_all(runs, hard=hard)
    folder = JobFolder.of_run(existing_launch(run_dir))
    job, launcher = opened(folder)
    before = folder.cancelled
    folder.ask_to_cancel()  # first: whoever would start the job again looks here, also while a scheduler is silent
    try:
        if launcher.is_over(job, folder):
            if not before:
                folder.take_back_cancel()
            print("the job has ended already")
            return {"cancelled": False}
        launcher.cancel(job, folder, hard=hard)
    except RunFailedError as error:
        again = f"crosstune cancel {'--hard ' if hard else ''}{shlex.quote(str(run_dir))}"
        error.remedy = f"it will not be started again, but runs on where it runs: once it can be asked, {again}"
        raise
    print("ending" if hard else f"ending with a save; crosstune cancel --hard {shlex.quote(str(run_dir))} ends at once")
    return {"cancelled": True}


def _cancel_all(runs: Sequence[Path], *, hard: bool) -> Result:
    """All that can be reached.

    Raises:
        CrosstuneError: what kept the others.
    """
    told: list[Result] = []
    faults: list[CrosstuneError] = []
    for run in runs:
        try:
            told.append({"run_dir": str(run), **cancel(run, hard=hard)})
        except CrosstuneError as error:
            faults.append(error)
    raise_all(faults)
    return {"jobs": told}


def runs_of_sweep(parent: Path) -> list[Path]:
    """The launched runs below the folder of a sweep, in order; none: it is another folder."""
    if JobFolder.of_run(parent).file.is_file():
        return []
    return sorted(file.parent.parent for file in parent.resolve().glob("[0-9]*/launch/job.json"))


def existing_launch(run_dir: Path) -> Path:
    """The absolute path of a folder with a job."""
    JobFolder.of_run(run_dir).read()
    return run_dir.resolve()


def opened(folder: JobFolder) -> tuple[Job, Launcher]:
    """A job and its launcher.

    Raises:
        CheckpointError: the folder is not that of a job, or damaged.
    """
    job = folder.read()
    options: LaunchConfig = load_resolved(folder.options)
    return job, launcher_of(options)


def launcher_of(options: LaunchConfig) -> Launcher:
    """The launcher that a launch names."""
    return build(options.launcher, Launcher, options.cluster)
