"""The root of `crosstune doctor nodes`."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.errors import ConfigError, not_empty
from configs.schema.device import DeviceConfig
from configs.schema.launch import ClusterConfig, LauncherConfig, check_variables
from configs.schema.model import ModelConfig


@dataclass
class DoctorNodesConfig:
    """`crosstune doctor nodes`: what would break a run on these machines, asked through the launcher of the run."""

    nodes: int = 1
    """Machines."""
    nproc: int = 1
    """Processes that a run would start on each."""
    run_dir: str | None = None
    """Folder of the run that is meant: its room, its rights, and whether all machines see it. Null: not looked at."""
    shared: bool = True
    """Whether run_dir must be one folder for all machines; false: each keeps its own (checkpoint.storage=per_node)."""
    needed_gib: float = 1.0
    """Free room that run_dir must have."""
    master_port: int = 29500
    """Of the rendezvous, on the first machine."""
    quick: bool = False
    """Leave out what takes long: the look at devices and the all-reduce."""
    allreduce_mib: int = 64
    """Size of the all-reduce whose bandwidth is measured; 0: none."""
    allreduce_seconds: int = 90
    """It must be over by then, the start of its processes included."""
    patience_seconds: int = 30
    """By so much one machine may start later than another."""
    queue_seconds: int = 120
    """So long may a scheduler take to start all machines, images to be fetched included; a doctor waits in no queue for
    hours."""
    compare: list[str] = field(default_factory=list)
    """Further environment variables that must be equal everywhere; their values are not shown."""
    python: str | None = None
    """The interpreter on the machines. Null: this one, or in a container ``python3``."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that the job would have, over those of the cluster."""
    cpus: int = 0
    """Per machine, where a scheduler gives them out. 0: its default."""
    memory_gib: int = 0
    """Likewise."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=""))
    """Only ``model.precision`` is looked at."""
    device: DeviceConfig = field(default_factory=DeviceConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        not_empty("run_dir", self.run_dir)
        for key in ("nodes", "nproc", "allreduce_seconds", "patience_seconds", "queue_seconds"):
            if getattr(self, key) < 1:
                raise ConfigError(key, str(getattr(self, key)), allowed="1 or more")
        not_empty("python", self.python)
        check_variables("environment", self.environment)
        for key in ("needed_gib", "allreduce_mib", "cpus", "memory_gib"):
            if getattr(self, key) < 0:
                raise ConfigError(key, str(getattr(self, key)), allowed="0 or more")
        if not 1024 <= self.master_port <= 65535:
            raise ConfigError("master_port", str(self.master_port), allowed="1024 to 65535")
