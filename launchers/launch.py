"""`crosstune launch`, and `resume` of what was launched: from the words to a job in its folder and at its scheduler."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from configs.compose import amend, compose, load_resolved, save_resolved
from configs.errors import EXIT_DONE, ConfigError, CrosstuneError, ErrorGroup
from configs.files import write_whole
from configs.schema.device import DeviceConfig
from configs.schema.launch import LaunchConfig
from configs.schema.roots import TrainConfig
from launchers.base import Launcher
from launchers.doctor.nodes.before import before_submit
from launchers.foreground import ForegroundLauncher
from launchers.job import Job, JobFolder
from launchers.run_dir import LOCK, make_writable, new_run, with_run_dir
from launchers.spec import make_spec
from launchers.status import launcher_of, opened

Result = dict[str, Any]
OPTIONS_OF_LAUNCH = frozenset(f.name for f in fields(LaunchConfig))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the launch, and those of the step that is launched."""
    ours: list[str] = []
    theirs: list[str] = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
        (ours if key in OPTIONS_OF_LAUNCH else theirs).append(word)
    return ours, theirs


@dataclass(frozen=True)
class Plan:
    """A job before anything of it is written."""

    launcher: Launcher
    cfg: TrainConfig
    options: LaunchConfig
    job: Job
    folder: JobFolder
    files: dict[str, str]


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
    stamp = time.strftime("%Y%m%d-%H%M%S") + label
    spec = make_spec(command, cfg, options, folder.request, stamp)
    launcher = launcher_of(options)
    _raise_all([*_faults(cfg, options), *launcher.faults(spec)])
    return Plan(launcher, cfg, options, Job(spec, time.time()), folder, launcher.render(spec, attempt=0))


def launch(planned: Plan, *, dry_run: bool = False) -> Result:
    """Starts a job; `dry_run` prints the files that would be submitted, and writes nothing.

    Raises:
        CrosstuneError: the scheduler refused the job, and nothing of it is left.
    """
    if dry_run:
        _print_files(planned)
        return {"files": planned.files, "spec": planned.job.spec.to_json()}
    _write(planned)
    if isinstance(planned.launcher, ForegroundLauncher):
        return _run(planned)
    try:
        [handle] = planned.launcher.submit_all([(planned.job, planned.folder)])
    except CrosstuneError:
        _take_back(planned)
        raise
    return _tell(planned, handle)


def launch_all(plans: Sequence[Plan], *, dry_run: bool = False) -> Result:
    """Starts the jobs of a sweep: all at once at a scheduler, else one after the other until one is stopped.

    Raises:
        CrosstuneError: see `launch`.
    """
    launcher = plans[0].launcher
    if dry_run or isinstance(launcher, ForegroundLauncher):
        results: list[Result] = []
        for planned in plans:
            results.append(launch(planned, dry_run=dry_run))
            if results[-1].get("exit_code", EXIT_DONE) != EXIT_DONE:
                break
        return {"jobs": results, "exit_code": results[-1].get("exit_code", EXIT_DONE)}
    for planned in plans:
        _write(planned)
    try:
        handles = launcher.submit_all([(planned.job, planned.folder) for planned in plans])
    except CrosstuneError:
        for planned in plans:
            _take_back(planned)
        raise
    return {"jobs": [_tell(planned, handle) for planned, handle in zip(plans, handles, strict=True)]}


def _write(planned: Plan) -> None:
    folder = planned.folder
    with new_run(folder.run_dir):  # only while it is made: the job's first rank will hold it
        make_writable(folder.path, "run_dir")
        _write_request(planned)


def _write_request(planned: Plan) -> None:
    save_resolved(planned.cfg, planned.folder.request)
    save_resolved(planned.options, planned.folder.options)
    for name, text in planned.files.items():
        write_whole(planned.folder.path / name, text)
    planned.folder.write(planned.job)


def _take_back(planned: Plan) -> None:
    """The job was refused: its folder is as it was, and may be used again."""
    shutil.rmtree(planned.folder.path, ignore_errors=True)
    (planned.folder.run_dir / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        planned.folder.run_dir.rmdir()


def _run(planned: Plan) -> Result:
    """In the foreground, to its end."""
    launcher, folder = planned.launcher, planned.folder
    assert isinstance(launcher, ForegroundLauncher)
    job = replace(planned.job, handle=launcher.handle())
    folder.write(job)
    print(f"job {job.spec.name}: {_size(job)}; run: {folder.run_dir}", flush=True)
    code = int(launcher.submit(job, folder)["exit_code"])
    if code == EXIT_DONE:
        print(f"done; run: {folder.run_dir}")
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


def was_launched(run_dir: Path) -> bool:
    """Whether `resume` has to start a job."""
    return JobFolder.of_run(run_dir).file.is_file()


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
    former, launcher = opened(folder)
    if not launcher.is_over(former, folder):
        run = shlex.quote(str(folder.run_dir))
        raise ConfigError(
            str(folder.run_dir),
            "the job has not ended",
            remedy=f"crosstune status {run} tells how far it is; crosstune cancel {run} ends it",
        )
    marks = folder.marks()
    attempt = marks[0].attempt + 1 if marks else former.attempt
    options: LaunchConfig = load_resolved(folder.options)
    planned = plan(former.spec.command, cfg, amend(options, words, config_dir=config_dir) if words else options)
    # Relative paths in the config are meant from where the job was first launched.
    spec = replace(planned.job.spec, working_dir=former.spec.working_dir)
    job = replace(planned.job, spec=spec, attempt=attempt)
    planned = replace(planned, job=job, files=planned.launcher.render(spec, attempt))
    before = _texts(folder, planned.files)
    _write_request(planned)
    folder.take_back_cancel()
    if planned.launcher.foreground:
        return _run(planned)
    try:
        return _tell(planned, planned.launcher.submit(job, folder))
    except CrosstuneError:
        for file, text in before.items():
            write_whole(file, text)
        raise


def _texts(folder: JobFolder, names: Iterable[str]) -> dict[Path, str]:
    """The files of a job that a submission writes anew, as they are."""
    files = [folder.file, folder.options, folder.request, folder.cancel_mark, *(folder.path / name for name in names)]
    return {file: file.read_text(encoding="utf-8") for file in files if file.is_file()}


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
    if options.check:
        found += before_submit(cfg, {**cluster.environment, **options.environment})
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


def _print_files(planned: Plan) -> None:
    for name, text in planned.files.items():
        print(f"# ---- {name}\n{text}")
    print(f"# each rank: crosstune {shlex.join(planned.job.spec.arguments(0))}")
