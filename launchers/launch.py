"""`crosstune launch`, `status`, `logs`, `cancel`, and `resume` of what was launched: the same for every launcher."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from configs.compose import build, compose, load_resolved, save_resolved
from configs.errors import EXIT_DONE, ConfigError, CrosstuneError, ErrorGroup
from configs.files import write_whole
from configs.schema.device import DeviceConfig
from configs.schema.launch import ClusterConfig, LaunchConfig, LauncherConfig
from configs.schema.roots import TrainConfig
from launchers.base import Launcher
from launchers.foreground import ForegroundLauncher
from launchers.job import Job, JobFolder, Mark, State, root_cause, state_of
from launchers.run_dir import make_writable, new_run, with_run_dir
from launchers.spec import make_spec

Result = dict[str, Any]
LAST_LINES = 12
"""Of the log of the rank that failed first."""
OPTIONS_OF_LAUNCH = frozenset(f.name for f in fields(LaunchConfig))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the launch, and those of the step that is launched."""
    ours: list[str] = []
    theirs: list[str] = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
        (ours if key in OPTIONS_OF_LAUNCH else theirs).append(word)
    return ours, theirs


def launch(command: str, cfg: TrainConfig, options: LaunchConfig, *, dry_run: bool = False) -> Result:
    """Starts a job.

    Args:
        command: ``train`` or ``run``.
        cfg: its config.
        options: where and how.
        dry_run: print the files that would be submitted, and write nothing.

    Raises:
        ErrorGroup: faults that can be told before anything is written.
        CrosstuneError: the scheduler refused the job; in the foreground, how it ended.
    """
    cfg = with_run_dir(cfg)
    run_dir = Path(str(cfg.run_dir))
    folder = JobFolder.of_run(run_dir)
    spec = make_spec(command, cfg, options, folder.request, time.strftime("%Y%m%d-%H%M%S"))
    launcher = launcher_of(options.launcher, options.cluster)
    _raise_all([*_faults(cfg, options), *launcher.faults(spec)])
    files = launcher.render(spec, attempt=0)
    if dry_run:
        _print_files(files, spec.arguments(0))
        return {"files": files, "spec": spec.to_json()}
    with new_run(run_dir):  # only while it is made: the job's first rank will hold it
        make_writable(folder.path, "run_dir")
        save_resolved(cfg, folder.request)
        save_resolved(options, folder.options)
    try:
        return _submit(launcher, Job(spec, time.time()), folder, files)
    except CrosstuneError:
        if not launcher.foreground:  # refused: the folder is as it was, and may be used again
            shutil.rmtree(folder.path)
            with suppress(OSError):
                run_dir.rmdir()
        raise


def _submit(launcher: Launcher, job: Job, folder: JobFolder, files: dict[str, str]) -> Result:
    for name, text in files.items():
        write_whole(folder.path / name, text)
    if isinstance(launcher, ForegroundLauncher):
        job = replace(job, handle=launcher.handle())
        folder.write(job)
        print(f"job {job.spec.name}: {_where(job)}; run: {folder.run_dir}", flush=True)
        code = int(launcher.submit(job, folder)["exit_code"])
        if code == EXIT_DONE:
            print(f"done; run: {folder.run_dir}")
        return {"run_dir": str(folder.run_dir), "handle": job.handle, "exit_code": code}
    else:
        folder.write(job)
        job = replace(job, handle=launcher.submit(job, folder))
        folder.write(job)
        run = shlex.quote(str(folder.run_dir))
        print(f"job {job.spec.name}: submitted, {_where(job)}\n  crosstune status {run}\n  crosstune logs -f {run}")
    return {"run_dir": str(folder.run_dir), "handle": job.handle}


def _where(job: Job) -> str:
    spec = job.spec
    machines = f"{spec.nodes} machines" if spec.nodes > 1 else "1 machine"
    return f"{machines} x {spec.nproc} process{'es' if spec.nproc > 1 else ''}"


def status(run_dir: Path) -> Result:
    """`crosstune status RUN`: the job's state, its machines, and the earliest fault if it failed."""
    folder = JobFolder.of_run(existing_launch(run_dir))
    job, launcher = _job(folder)
    report, marks = launcher.report(job, folder), folder.marks()
    state = state_of(report, marks, job.spec.nodes, cancelled=folder.cancelled)
    print(f"{state.value}: {job.spec.name}" + (f" ({report.detail})" if report.detail else ""))
    attempt = marks[0].attempt if marks else job.attempt
    step, total = _progress(folder.run_dir)
    if step:
        print(f"  step {step:,}{f' of {total:,}' if total else ''}, attempt {attempt}")
    for mark in marks:
        print(f"  {_line(mark)}")
    _tell_differences(marks)
    result: Result = {
        "state": state.value,
        "detail": report.detail,
        "attempt": attempt,
        "step": step,
        "nodes": [asdict(mark) for mark in marks],
    }
    if state in (State.failed, State.lost):
        result["cause"] = _tell_cause(folder, marks)
    return result


def _line(mark: Mark) -> str:
    if mark.ended is None:
        ending = "at work"
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
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
    if lines:
        print(f"  the end of {log}:")
        print("\n".join(f"    {line}" for line in lines))
    return {"node": mark.node, "host": mark.host, "rank": rank, "error": error.render(), "log": str(log)}


def _progress(run_dir: Path) -> tuple[int, int]:
    from launchers.failure import last_step
    from train.run_folder import RunFolder

    record = RunFolder(run_dir)
    total = record.read_record().total_steps if record.record.is_file() else 0
    return last_step(record.metrics), total


def logs(run_dir: Path, *, node: int, follow: bool) -> Result:
    """`crosstune logs [-f] [--node K] RUN`: what a machine prints; machine 0 has rank 0."""
    folder = JobFolder.of_run(existing_launch(run_dir))
    job, launcher = _job(folder)
    if node >= job.spec.nodes:
        raise ConfigError("--node", str(node), allowed=f"0 to {job.spec.nodes - 1}")
    for line in launcher.log(job, folder, node, follow=follow):
        print(line, flush=follow)
    return {"node": node}


def cancel(run_dir: Path, *, hard: bool) -> Result:
    """`crosstune cancel [--hard] RUN`: the run saves and ends; with --hard it ends at once."""
    folder = JobFolder.of_run(existing_launch(run_dir))
    job, launcher = _job(folder)
    if launcher.is_over(job, folder):
        print("the job has ended already")
        return {"cancelled": False}
    folder.ask_to_cancel()
    launcher.cancel(job, folder, hard=hard)
    print("ending" if hard else f"ending with a save; crosstune cancel --hard {shlex.quote(str(run_dir))} ends at once")
    return {"cancelled": True}


def was_launched(run_dir: Path) -> bool:
    """Whether `resume` has to start a job."""
    return JobFolder.of_run(run_dir).file.is_file()


def relaunch(cfg: TrainConfig) -> Result:
    """`crosstune resume RUN` of a job: submits it again, where it was submitted.

    Raises:
        ConfigError: it has not ended.
    """
    folder = JobFolder.of_run(Path(str(cfg.run_dir)))
    job, launcher = _job(folder)
    if not launcher.is_over(job, folder):
        raise ConfigError(
            str(folder.run_dir),
            "the job has not ended",
            remedy=f"crosstune status {shlex.quote(str(folder.run_dir))}, or crosstune cancel first",
        )
    folder.take_back_cancel()
    marks = folder.marks()
    options: LaunchConfig = load_resolved(folder.options)
    spec = make_spec(job.spec.command, cfg, options, folder.request, time.strftime("%Y%m%d-%H%M%S"))
    # Paths in the config are meant from where the job was first launched.
    spec = replace(spec, working_dir=job.spec.working_dir)
    _raise_all([*_faults(cfg, options), *launcher.faults(spec)])
    save_resolved(cfg, folder.request)
    job = Job(spec, time.time(), attempt=marks[0].attempt + 1 if marks else job.attempt)
    return _submit(launcher, job, folder, launcher.render(spec, job.attempt))


def launcher_of(cfg: LauncherConfig, cluster: ClusterConfig) -> Launcher:
    """The launcher that a config names."""
    return build(cfg, Launcher, cluster)


def existing_launch(run_dir: Path) -> Path:
    """The absolute path of a folder with a job."""
    JobFolder.of_run(run_dir).read()
    return run_dir.resolve()


def _job(folder: JobFolder) -> tuple[Job, Launcher]:
    options: LaunchConfig = load_resolved(folder.options)
    return folder.read(), launcher_of(options.launcher, options.cluster)


def _faults(cfg: TrainConfig, options: LaunchConfig) -> list[CrosstuneError]:
    """What the step and the machines say against each other."""
    found: list[CrosstuneError] = []
    cluster = options.cluster
    if cluster.device and not any(cfg.device._target_ == target_of(name) for name in ("auto", cluster.device)):
        cls = cfg.device._target_.rpartition(".")[2]
        found.append(
            ConfigError("device", f"{cls}, but these machines have {cluster.device}", remedy=f"device={cluster.device}")
        )
    if 0 < cluster.devices_per_node < cfg.nproc:
        there = f"cluster.devices_per_node={cluster.devices_per_node}"
        found.append(ConfigError("nproc", f"{cfg.nproc}, above {there}: one process drives one device"))
    if both := sorted(set(options.secrets) & {*options.environment, *cluster.environment}):
        found.append(ConfigError("secrets", f"also in environment, with a value: {', '.join(both)}"))
    return found


def target_of(device: str) -> str:
    """The class behind an option of the device group."""
    cfg: DeviceConfig = compose("train", [f"device={device}", "model.path=.", "dataset.path=."]).device
    return cfg._target_


def _raise_all(faults: Sequence[CrosstuneError]) -> None:
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ErrorGroup(list(faults))


def _print_files(files: dict[str, str], arguments: Sequence[str]) -> None:
    for name, text in files.items():
        print(f"# ---- {name}\n{text}")
    print(f"# each rank: crosstune {shlex.join(arguments)}")
