"""The root of `crosstune launch`, and its cluster and launcher groups: where and how a step is started."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.errors import ConfigError, not_empty

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class ClusterConfig:
    """What the machines of a site have, and what a process there needs before it starts. One YAML per site."""

    device: str | None = None
    """The option of the device group that they serve; a run on another one is refused. Null: any."""
    devices_per_node: int = 0
    """0: as many as the run has processes per machine (`nproc`)."""
    gres: str | None = None
    """What Slurm calls the devices: ``gpu``, ``gpu:type``. Null: none are asked for."""
    resource: str | None = None
    """What Kubernetes calls the devices: ``vendor.com/card``. Null: none are asked for."""
    visible_devices: str | None = None
    """Environment variable that names the devices of a process, set from what the scheduler assigned."""
    interface: str | None = None
    """Network interface for the rendezvous and the collectives; null: the one that leads to the first machine."""
    setup: list[str] = field(default_factory=list)
    """Shell scripts that each machine sources first, such as a toolkit's ``set_env.sh``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process on these machines; the job's own win."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Kubernetes: labels of the nodes that will do."""
    labels: dict[str, str] = field(default_factory=dict)
    """Kubernetes: of the job and its pods."""
    pod_fields: dict[str, str] = field(default_factory=dict)
    """Kubernetes: variables that take the value of a field of the pod, such as ``status.hostIP``."""
    assigned_fields: dict[str, str] = field(default_factory=dict)
    """Kubernetes: the same, where the scheduler writes the devices of a pod into an annotation of it: only with
    launcher.scheduler_assigns_devices=true."""

    def __post_init__(self) -> None:
        if self.devices_per_node < 0:
            raise ConfigError("cluster.devices_per_node", str(self.devices_per_node), allowed="0 (nproc) or more")
        for key in ("device", "gres", "resource", "visible_devices", "interface"):
            not_empty(f"cluster.{key}", getattr(self, key))
        check_variables("cluster.environment", self.environment)


@dataclass
class LauncherConfig:
    """What every launcher has."""

    _target_: str = MISSING
    """A subclass of ``launchers.base.Launcher``."""

    def keeps_secret(self, name: str) -> bool:
        """Whether the cluster itself keeps the value of a secret, so that none has to be in our environment."""
        return False


@dataclass
class LocalLauncherConfig(LauncherConfig):
    """This machine, in the foreground."""


@dataclass
class LaunchConfig:
    """`crosstune launch COMMAND`: starts a step somewhere, and starts it again from its checkpoint if need be."""

    nodes: int = 1
    """Machines, each with `nproc` processes of the run."""
    restarts: int = 3
    """So often the job is started again from its last checkpoint after a preemption or a failure."""
    time_limit_minutes: int = 0
    """Of one attempt, as the scheduler counts it; the run saves before. 0: the scheduler's own."""
    cpus: int = 0
    """Per machine. 0: the scheduler's default."""
    memory_gib: int = 0
    """Per machine. 0: the scheduler's default."""
    master_port: int = 0
    """Where the ranks of several machines find each other, on the first; each attempt takes the next one. 0: drawn from
    20000 to 29000, another one for each job."""
    python: str | None = None
    """The interpreter on the machines. Null: this one, or in a container ``python3``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process; their values are written into job.json. Nothing secret."""
    secrets: list[str] = field(default_factory=list)
    """Names of variables whose values are handed over without being written anywhere by crosstune."""
    check: bool = True
    """Look at what can be looked at quickly before anything is submitted."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ConfigError("nodes", str(self.nodes), allowed="1 or more")
        for key in ("restarts", "time_limit_minutes", "cpus", "memory_gib"):
            if getattr(self, key) < 0:
                raise ConfigError(key, str(getattr(self, key)), allowed="0 or more")
        if self.master_port and not 1024 <= self.master_port <= 65000:
            raise ConfigError("master_port", str(self.master_port), allowed="1024 to 65000, or 0")
        not_empty("python", self.python)
        check_variables("environment", self.environment)
        for name in self.secrets:
            if not VARIABLE.fullmatch(name):
                raise ConfigError("secrets", f"'{name}'", allowed="names of environment variables, without values")


def check_variables(key: str, variables: dict[str, str]) -> None:
    """Refuses what no process can have in its environment, and what the launchers set themselves.

    Raises:
        ConfigError: with the name.
    """
    for name, value in variables.items():
        if not VARIABLE.fullmatch(name):
            raise ConfigError(key, f"'{name}'", allowed="letters, digits and _, not a digit first")
        if name in SET_BY_US or name.startswith(("PET_", "TORCHELASTIC_")):
            raise ConfigError(f"{key}.{name}", "is set by crosstune or torchrun for each rank", remedy="leave it out")
        if "\0" in str(value):
            raise ConfigError(f"{key}.{name}", "holds a NUL character, which no environment can")


SET_BY_US = frozenset(
    (
        *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"),
        *("MASTER_ADDR", "MASTER_PORT", "CROSSTUNE_ERROR_DIR", "CROSSTUNE_STARTED", "CROSSTUNE_LAUNCHED"),
        *("CROSSTUNE_NODE", "CROSSTUNE_ATTEMPT", "CROSSTUNE_MASTER"),
    )
)
