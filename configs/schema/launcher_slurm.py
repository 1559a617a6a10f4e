"""The launcher group's option slurm."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from configs.errors import ConfigError, not_empty
from configs.schema.launch import VARIABLE, LauncherConfig

WRITABLE = re.compile(r"[^\s\x00-\x1f\x7f'\"\\#]+")
"""What can stand in a #SBATCH line: sbatch ends it at a space or a #, and takes quotes and backslashes for its own."""
OPTION = re.compile(r"--(?P<name>[a-z][a-z0-9-]*)(?P<value>=.*)?", re.DOTALL)
OWN_OPTIONS = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "output", "error", "open-mode", "signal", "requeue", "wrap"),
    *("no-requeue", "export", "export-file", "get-user-env", "array", "parsable", "chdir", "wait", "test-only", "help"),
)
"""Options of sbatch that a job cannot do without, or that would make it another one."""
SETTINGS = {
    **{name: f"launcher.{name}" for name in ("partition", "account", "qos", "constraint", "nodelist", "exclude")},
    **{"reservation": "launcher.reservation", "time": "time_limit_minutes", "cpus-per-task": "cpus"},
    **{"mem": "memory_gib", "gres": "cluster.gres"},
}
"""Options of sbatch that have a setting of ours, and its key."""
OWN_OF_SRUN = (
    *("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "export", "kill-on-bad-exit", "wait", "label", "help"),
    *("output", "error", "container-image", "container-mounts", "multi-prog", "chdir"),
)
LARGEST_LEAD = 65535
"""Of Slurm's --signal, in seconds."""


class Container(Enum):
    """What runs a container on a node of Slurm."""

    none = "none"
    pyxis = "pyxis"
    """A plugin of srun, over enroot."""
    apptainer = "apptainer"


@dataclass
class SlurmLauncherConfig(LauncherConfig):
    """A batch job of Slurm: one task per machine, started again by Slurm from the run's last checkpoint.

    Slurm keeps the values of `export` and of `secrets` with the job, in its StateSaveLocation: who administers it can
    read them there.
    """

    partition: str | None = None
    """Null, here and below: the cluster's default. What the environment has in SBATCH_... variables does not count."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    """Features of the nodes, such as ``a100&ib``."""
    nodelist: str | None = None
    """Nodes that the job must have, such as ``n[1-4]``."""
    exclude: str | None = None
    """Nodes that it must not have."""
    reservation: str | None = None
    signal_lead_seconds: int = 180
    """So long before the time limit the run is told to save; Slurm may be up to 60 s earlier. Above
    `guard.grace_seconds`, by the length of a step."""
    requeue: bool = True
    """After a preemption, a time limit or a failure the job goes back into the queue, `restarts` times at most. False:
    it ends there, and `crosstune resume` goes on."""
    export: list[str] = field(default_factory=list)
    """Names of variables of the submitting environment that the job gets, besides `secrets`. All others it has from a
    login on its first node, not from here."""
    container: Container = Container.none
    """none, pyxis or apptainer."""
    image: str | None = None
    """The container's: what ``--container-image`` of pyxis or ``apptainer exec`` takes. It has crosstune installed."""
    mounts: list[str] = field(default_factory=list)
    """More folders for the container, as /path or /path:/inside[:flags]. The run's folder and the working folder are
    there in any case, under their own paths."""
    container_args: list[str] = field(default_factory=list)
    """More arguments of ``apptainer exec``, or of srun for pyxis, such as --nv or --container-writable."""
    extra: list[str] = field(default_factory=list)
    """More options of sbatch: --key=value or --key."""
    srun_extra: list[str] = field(default_factory=list)
    """More options of the srun that starts the machines: --key=value or --key."""
    array_parallel: int = 0
    """Of a sweep so many jobs at a time; 0: as many as Slurm gives."""
    poll_seconds: float = 10
    """Between two questions to Slurm while a log is followed."""

    def __post_init__(self) -> None:
        for key in ("partition", "account", "qos", "constraint", "nodelist", "exclude", "reservation"):
            not_empty(f"launcher.{key}", value := getattr(self, key))
            if value is not None:
                _writable(f"launcher.{key}", value)
        if not 1 <= self.signal_lead_seconds <= LARGEST_LEAD:
            allowed = f"1 to {LARGEST_LEAD}"
            raise ConfigError("launcher.signal_lead_seconds", str(self.signal_lead_seconds), allowed=allowed)
        for name in self.export:
            if not VARIABLE.fullmatch(name):
                raise ConfigError("launcher.export", f"'{name}'", allowed="names of variables, without values")
        if self.array_parallel < 0:
            raise ConfigError("launcher.array_parallel", str(self.array_parallel), allowed="0 (no limit) or more")
        if not 1 <= self.poll_seconds <= 3600:
            raise ConfigError("launcher.poll_seconds", str(self.poll_seconds), allowed="1 to 3600")
        self._check_options()
        self._check_container()

    def _check_options(self) -> None:
        for option in self.extra:
            name = _option("launcher.extra", option)
            _writable("launcher.extra", option)
            for ours in (*OWN_OPTIONS, *SETTINGS):
                if ours.startswith(name):  # Slurm's commands take an option by any beginning of its name
                    setting = SETTINGS.get(ours)
                    raise ConfigError(
                        "launcher.extra",
                        f"'{option}': --{ours} is set by crosstune",
                        remedy=f"set {setting}" if setting else "leave it out",
                    )
        for option in self.srun_extra:
            name = _option("launcher.srun_extra", option)
            if any(ours.startswith(name) for ours in OWN_OF_SRUN):
                raise ConfigError("launcher.srun_extra", f"'{option}' is set by crosstune", remedy="leave it out")

    def _check_container(self) -> None:
        not_empty("launcher.image", self.image)
        given = [key for key in ("image", "mounts", "container_args") if getattr(self, key)]
        if self.container is Container.none and given:
            raise ConfigError(
                f"launcher.{given[0]}", "without a container", remedy="launcher.container=pyxis or apptainer"
            )
        if self.container is not Container.none and self.image is None:
            raise ConfigError("launcher.image", "not set", remedy=f"the image that {self.container.value} runs")
        for mount in self.mounts:
            if not mount.startswith("/") or "," in mount or "\n" in mount:
                raise ConfigError("launcher.mounts", f"'{mount}'", allowed="/path or /path:/inside[:flags], no comma")


def _option(key: str, option: str) -> str:
    """The name of an option, without its dashes."""
    match = OPTION.fullmatch(option)
    if match is None:
        raise ConfigError(key, f"'{option}'", allowed="--key=value or --key")
    return match["name"]


def _writable(key: str, value: str) -> None:
    if not WRITABLE.fullmatch(value):
        raise ConfigError(
            key, f"{value!r} cannot be written in a line of #SBATCH", allowed="no space, quote, backslash, # or newline"
        )
