"""The batch script of a job, or of a sweep's array of jobs: pure.

sbatch reads its own lines (#SBATCH) without a shell: what goes there is checked to need no quoting. All else is bash,
and every value in it is quoted.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jinja2

from configs.schema.launch import ClusterConfig
from configs.schema.launcher_slurm import Container, SlurmLauncherConfig
from launchers.base import node_command, with_setup
from launchers.spec import LaunchSpec, this_python

NAME, SWEEP_NAME = "job.sbatch", "sweep.sbatch"
NAMED_BY_SLURM = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK"),
)
"""What Slurm's gpu plugin may set, several at once. A runtime that knows two of them applies one after the other: of
devices 4 and 5, renumbered 0 and 1, it would look for 4 and 5 again."""
PATIENCE_SECONDS = 10
"""A machine that failed waits so long before srun ends the others: one that fails later may know the cause."""
AWAY_SECONDS, PAUSE_SECONDS = 600, 15
"""So long, and with such pauses, the script asks a controller of Slurm that does not answer: one that is started anew,
or whose place another takes, is away for minutes."""
_JOB_FILE = "\0job.json"
"""Stands for the first argument of the script's function `machine`; no word of a command holds a NUL."""


def render_script(
    specs: Sequence[LaunchSpec],
    attempt: int,
    cfg: SlurmLauncherConfig,
    cluster: ClusterConfig,
    *,
    array: bool = False,
) -> str:
    """The script of one job, or of several of equal shape as an array, in their order.

    Args:
        specs: the jobs.
        attempt: number of their first attempt.
        cfg: of the launcher.
        cluster: what the machines have.
        array: several jobs, under the name of the first.
    """
    spec = specs[0]
    visible = cluster.visible_devices if spec.devices and cluster.gres else None
    return _template().render(
        options=_options(specs, cfg, cluster, array),
        runs=[each.run_dir for each in specs],
        array=array,
        restarts=spec.restarts if cfg.requeue else 0,
        attempt=attempt,
        visible=visible,
        gres_pattern=(cluster.gres or "").replace(".", r"\."),
        others=" ".join(each for each in NAMED_BY_SLURM if each != visible),
        inside=cfg.container is Container.pyxis,
        command=_command(spec, cfg),
        patience=PATIENCE_SECONDS if spec.nodes > 1 else 0,
        away=AWAY_SECONDS,
        pause=PAUSE_SECONDS,
        srun=_srun(spec, cfg),
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # it is a shell script
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template("job.sbatch.jinja")


def _options(specs: Sequence[LaunchSpec], cfg: SlurmLauncherConfig, cluster: ClusterConfig, array: bool) -> list[str]:
    spec = specs[0]
    limit = f"%{cfg.array_parallel}" if cfg.array_parallel else ""
    choices = {
        "job-name": spec.name,
        "array": f"0-{len(specs) - 1}{limit}" if array else None,
        **{key: getattr(cfg, key) for key in ("partition", "account", "qos", "reservation")},
        **{key: getattr(cfg, key) for key in ("constraint", "nodelist", "exclude")},
        "nodes": spec.nodes,
        "ntasks": spec.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": spec.cpus or None,
        "mem": f"{spec.memory_gib}G" if spec.memory_gib else None,
        "gres": f"{cluster.gres}:{spec.devices}" if cluster.gres and spec.devices else None,
        "time": spec.time_limit_minutes or None,
        "signal": f"B:USR1@{cfg.signal_lead_seconds}",
        "output": "slurm-%A_%a.out" if array else "slurm-%j.out",
        "open-mode": "append",
        # Nothing of the submitting environment but what is named; sbatch reads the values there.
        "export": ",".join((*cfg.export, *spec.secrets)) or "NONE",
    }
    goes_on = cfg.requeue and spec.restarts
    lines = [f"--{key}={value}" for key, value in choices.items() if value is not None]
    return [*lines, "--requeue" if goes_on else "--no-requeue", *cfg.extra]


def _srun(spec: LaunchSpec, cfg: SlurmLauncherConfig) -> list[str]:
    words = [
        *(f"--nodes={spec.nodes}", f"--ntasks={spec.nodes}", "--ntasks-per-node=1"),
        *([f"--cpus-per-task={spec.cpus}"] if spec.cpus else []),  # srun does not take it over from sbatch
        *("--export=ALL", "--mpi=none", "--label", "--wait=0", "--kill-on-bad-exit=1"),
    ]
    if cfg.container is Container.pyxis:
        words += [shlex.quote(f"--container-image={cfg.image}"), f"--container-mounts={_mounts(spec, cfg)}"]
        words += [shlex.quote(word) for word in cfg.container_args]
    return [*words, *(shlex.quote(word) for word in cfg.srun_extra)]


def _command(spec: LaunchSpec, cfg: SlurmLauncherConfig) -> str:
    """What a machine runs, in the words of the function `machine`."""
    python = spec.python or (this_python() if cfg.container is Container.none else "python3")
    words = with_setup(node_command(python, _JOB_FILE), spec.setup)
    command = " ".join('"$1"' if word == _JOB_FILE else shlex.quote(word) for word in words)
    if cfg.container is not Container.apptainer:
        return command
    args = " ".join(shlex.quote(word) for word in cfg.container_args)
    run = '"${1%/launch/job.json}"'
    mounts = _mounts(spec, cfg).replace('"$run"', run)
    return f"apptainer exec --bind {mounts} {f'{args} ' if args else ''}{shlex.quote(str(cfg.image))} {command}"


def _mounts(spec: LaunchSpec, cfg: SlurmLauncherConfig) -> str:
    """For the container; the run's folder is the script's own variable."""
    mounts = container_mounts(cfg, [spec.working_dir])
    return ",".join(['"$run":"$run"', *(shlex.quote(word) for word in mounts)])


def container_mounts(cfg: SlurmLauncherConfig, folders: Sequence[str]) -> list[str]:
    """What a container gets: folders under their own paths, and those of the settings."""
    return [*(f"{folder}:{folder}" for folder in folders), *cfg.mounts]
