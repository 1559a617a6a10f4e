"""`crosstune launch`, and `resume` of what was launched: from the words to a job in its folder and at its scheduler."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from configs.compose import amend, compose, load_resolved
from configs.errors import EXIT_DONE, ConfigError, CrosstuneError, raise_all
from configs.groups import options_of
from configs.schema.device import DeviceConfig
from configs.schema.launch import LaunchConfig
from configs.schema.roots import TrainConfig
from launchers.base import Launcher
from launchers.doctor.device import name_of
from launchers.doctor.nodes.before import before_submit
from launchers.foreground import ForegroundLauncher
from launchers.job import Job, JobFolder
from launchers.run_dir import new_run, with_run_dir
from launchers.spec import LaunchSpec, make_spec
from launchers.status import launcher_of, opened
from launchers.submit import Plan, start

Result = dict[str, Any]


def plan(command: str, cfg: TrainConfig, options: LaunchConfig, *, label: str = "") -> Plan:
    """Puts a job together.

    Args:
        command: ``train`` or ``run``.
        cfg: its config.
        options: where and how.
        label: ends the job's name, where several are launched at once.

    Raises:
        CrosstuneError: what can be told to be wrong without asking anybody; all of it at once.
    """
    cfg = with_run_dir(cfg)
    folder = JobFolder.of_run(Path(str(cfg.run_dir)))
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{token_hex(2)}{label}"  # two may launch in one second
    spec = make_spec(command, cfg, options, folder.request, stamp)
    launcher = launcher_of(options)
    raise_all([*_faults(cfg, options, launcher), *launcher.faults(spec)])
    handle = launcher.handle() if isinstance(launcher, ForegroundLauncher) else {}
    return Plan(launcher, cfg, options, Job(spec, time.time(), handle), folder, launcher.render(spec, attempt=0))


def launch(planned: Plan, *, dry_run: bool = False) -> Result:
    """Starts a job; `dry_run` prints the files that would be submitted, and writes nothing.

    Raises:
        UnknownOutcomeError: the scheduler did not answer; the folder is kept, and `crosstune status` asks again.
        CrosstuneError: the scheduler refused the job, and nothing of it is left.
    """
    _note_devices(planned)
    if dry_run:
        _print_files([planned], planned.files)
        return {"files": planned.files, "spec": planned.job.spec.to_json()}
    return start([planned], _as_new)[0]


def launch_all(plans: Sequence[Plan], *, dry_run: bool = False) -> Result:
    """Starts the jobs of a sweep: all at once at a scheduler, else one after the other until one does not end well.

    Raises:
        CrosstuneError: see `launch`; of jobs in the foreground, what ended one, after the others have been named.
    """
    launcher = plans[0].launcher
    if dry_run and (files := launcher.render_sweep([planned.job.spec for planned in plans], plans[0].job.attempt)):
        _note_devices(plans[0])
        _print_files(plans, files)
        return {"files": files, "jobs": [{"spec": planned.job.spec.to_json()} for planned in plans]}
    if not dry_run and not isinstance(launcher, ForegroundLauncher):
        _note_devices(plans[0])
        return {"jobs": start(plans, _as_new)}
    results: list[Result] = []
    for number, planned in enumerate(plans, start=1):
        try:
            results.append(launch(planned, dry_run=dry_run))
        except CrosstuneError:
            _tell_left_out(plans[number:])
            raise
        if results[-1].get("exit_code", EXIT_DONE) != EXIT_DONE:
            _tell_left_out(plans[number:])
            break
    return {"jobs": results, "exit_code": results[-1].get("exit_code", EXIT_DONE)}


def _tell_left_out(plans: Sequence[Plan]) -> None:
    if plans:
        print(f"not started: {', '.join(planned.folder.run_dir.name for planned in plans)}", file=sys.stderr)


def _note_devices(planned: Plan) -> None:
    """A scheduler gives the devices that a job asks for, and a job without them may wait for hours to say so."""
    asked = planned.cfg.device._target_
    if not planned.launcher.foreground and not planned.job.spec.devices and asked != target_of("cpu"):
        options = ", ".join(each for each in options_of("cluster") if each != "none")
        text = f"no devices are asked for: cluster=... ({options}) does, or cluster.gres, cluster.resource"
        print(f"note: {text}", file=sys.stderr)


def _as_new(planned: Plan) -> Plan:
    """A job in a folder that has none, or one that ended before the run took its first step.

    Raises:
        ConfigError: the folder holds a run, or a job that has not ended.
    """
    folder = planned.folder
    with new_run(folder.run_dir):
        pass  # only while we look: the job's first rank will hold it
    if not folder.file.is_file():
        return planned
    former = _ended_job(folder)
    return _numbered(planned, planned.job.spec, folder.next_attempt(former))


def _ended_job(folder: JobFolder) -> Job:
    """The job of a folder.

    Raises:
        ConfigError: it has not ended.
        CrosstuneError: its scheduler cannot be asked.
    """
    job, launcher = opened(folder)
    if not launcher.is_over(job, folder):
        run = shlex.quote(str(folder.run_dir))
        raise ConfigError(
            str(folder.run_dir),
            "the job has not ended",
            remedy=f"crosstune status {run} tells how far it is; crosstune cancel {run} ends it",
        )
    return job


def _numbered(planned: Plan, spec: LaunchSpec, attempt: int) -> Plan:
    """The same with another spec, from another attempt on."""
    job = replace(planned.job, spec=spec, attempt=attempt)
    return replace(planned, job=job, files=planned.launcher.render(spec, attempt))


def was_launched(run_dir: Path) -> bool:
    """Whether `resume` has to start a job."""
    return JobFolder.of_run(run_dir).file.is_file()


def begun_as(run_dir: Path) -> Path | None:
    """The config of a launched run that did not come so far as to write its own; None: it did, or was not launched."""
    folder = JobFolder.of_run(run_dir)
    return folder.request if folder.file.is_file() and not (run_dir / "resolved.yaml").is_file() else None


def relaunch(cfg: TrainConfig, words: Sequence[str] = (), *, config_dir: Path | None = None) -> Result:
    """`crosstune resume RUN` of a job: submits it again, where it was submitted unless the words say otherwise.

    Args:
        cfg: the run's config with what may change on a resume.
        words: overrides of the launch, such as other hosts.
        config_dir: folder with group options of the user's own.

    Raises:
        ConfigError: it has not ended.
        CrosstuneError: see `launch`; the run is as it was.
    """
    folder = JobFolder.of_run(Path(str(cfg.run_dir)))
    options: LaunchConfig = load_resolved(folder.options)
    command = folder.read().spec.command
    planned = plan(command, cfg, amend(options, words, config_dir=config_dir) if words else options)

    def again(planned: Plan) -> Plan:
        former = _ended_job(folder)
        # Relative paths in the config are meant from where the job was first launched.
        spec = replace(planned.job.spec, working_dir=former.spec.working_dir)
        return _numbered(planned, spec, folder.next_attempt(former))

    return start([planned], again)[0]


def _faults(cfg: TrainConfig, options: LaunchConfig, launcher: Launcher) -> list[CrosstuneError]:
    """What the step and the machines say against each other."""
    found: list[CrosstuneError] = []
    cluster = options.cluster
    if cluster.device and not any(cfg.device._target_ == target_of(name) for name in ("auto", cluster.device)):
        told = f"{name_of(cfg.device)}, but these machines have {cluster.device}"
        found.append(ConfigError("device", told, remedy=f"device={cluster.device}"))
    if 0 < cluster.devices_per_node < cfg.nproc:
        there = f"cluster.devices_per_node={cluster.devices_per_node}"
        found.append(ConfigError("nproc", f"{cfg.nproc}, above {there}: one process drives one device"))
    if launcher.foreground:
        for key, remedy in (
            ("time_limit_minutes", "guard.stop_after_minutes=..."),
            ("cpus", None),
            ("memory_gib", None),
        ):
            if value := getattr(options, key):
                found.append(ConfigError(key, f"{value}, but this launcher has no scheduler for it", remedy=remedy))
    if both := sorted(set(options.secrets) & {*options.environment, *cluster.environment}):
        found.append(ConfigError("secrets", f"also in environment, with a value: {', '.join(both)}"))
    if options.check:
        found += before_submit(cfg, {**cluster.environment, **options.environment})
    return found


def target_of(device: str) -> str:
    """The class behind an option of the device group."""
    cfg: DeviceConfig = compose("train", [f"device={device}", "model.path=.", "dataset.path=."]).device
    return cfg._target_


def _print_files(plans: Sequence[Plan], files: Mapping[str, str]) -> None:
    for name, text in files.items():
        print(f"# ---- {name}\n{text}")
    for planned in plans:
        print(f"# each rank: crosstune {shlex.join(planned.job.spec.arguments(0))}")
