"""What can be chosen: the root of each command, the groups below it, and the schema behind every option."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from configs.schema.clean import CleanConfig, DedupConfig, HereConfig, LocalConfig, RayConfig, SlurmConfig
from configs.schema.dataset import FilesDatasetConfig, LicensesDatasetConfig, MixDatasetConfig
from configs.schema.device import AscendConfig, DeviceConfig
from configs.schema.doctor import DoctorConfig, PortabilityConfig, StandinConfig
from configs.schema.doctor_nodes import DoctorNodesConfig
from configs.schema.guard import GuardConfig
from configs.schema.launch import ClusterConfig, LaunchConfig, LocalLauncherConfig
from configs.schema.launcher_kubernetes import (
    AscendJobLauncherConfig,
    PyTorchJobLauncherConfig,
    TrainJobLauncherConfig,
    VolcanoLauncherConfig,
)
from configs.schema.launcher_slurm import SlurmLauncherConfig
from configs.schema.launcher_ssh import SshLauncherConfig
from configs.schema.model import ClosedModelConfig, ModelConfig
from configs.schema.objective import CausalLMConfig
from configs.schema.optim import AdamWConfig, ConstantConfig, CosineConfig, LinearConfig, SGDConfig
from configs.schema.outputs import CheckpointConfig, ExportConfig
from configs.schema.plan import PlanConfig
from configs.schema.prove import ProveLayoutConfig, ProveReshardConfig, ProveResumeConfig
from configs.schema.roots import EvalJobConfig, ExportJobConfig, PrepConfig, RunConfig, TrainConfig
from configs.schema.sharding import PlainConfig, ZeroConfig
from configs.schema.template import TemplateConfig
from configs.schema.tuning import FullConfig, LoraConfig

CONFIG_ROOT = Path(__file__).parent

ROOTS: dict[str, type[Any]] = {
    "prep": PrepConfig,
    "train": TrainConfig,
    "run": RunConfig,
    "export": ExportJobConfig,
    "eval": EvalJobConfig,
    "doctor": DoctorConfig,
    "doctor_portability": PortabilityConfig,
    "doctor_nodes": DoctorNodesConfig,
    "doctor_ascend-standin": StandinConfig,
    "launch": LaunchConfig,
    "plan": PlanConfig,
    "prove_resume": ProveResumeConfig,
    "prove_reshard": ProveReshardConfig,
    "prove_layout": ProveLayoutConfig,
}

# group -> schema name, as an option's YAML file lists it under `defaults:` -> dataclass
SCHEMAS: dict[str, dict[str, type[Any]]] = {
    "model": {"model_schema": ModelConfig, "closed_schema": ClosedModelConfig},
    "dataset": {
        "files_schema": FilesDatasetConfig,
        "licenses_schema": LicensesDatasetConfig,
        "mix_schema": MixDatasetConfig,
    },
    "template": {"template_schema": TemplateConfig},
    "clean": {"clean_schema": CleanConfig},
    "dedup": {"dedup_schema": DedupConfig},
    "executor": {
        "here_schema": HereConfig,
        "local_schema": LocalConfig,
        "slurm_schema": SlurmConfig,
        "ray_schema": RayConfig,
    },
    "tuning": {"lora_schema": LoraConfig, "full_schema": FullConfig},
    "objective": {"causal_lm_schema": CausalLMConfig},
    "optim": {"adamw_schema": AdamWConfig, "sgd_schema": SGDConfig},
    "schedule": {"constant_schema": ConstantConfig, "linear_schema": LinearConfig, "cosine_schema": CosineConfig},
    "sharding": {"plain_schema": PlainConfig, "zero_schema": ZeroConfig},
    "device": {"device_schema": DeviceConfig, "ascend_schema": AscendConfig},
    "checkpoint": {"checkpoint_schema": CheckpointConfig},
    "guard": {"guard_schema": GuardConfig},
    "export": {"export_schema": ExportConfig},
    "launcher": {
        "local_schema": LocalLauncherConfig,
        "ssh_schema": SshLauncherConfig,
        "slurm_schema": SlurmLauncherConfig,
        "volcano_schema": VolcanoLauncherConfig,
        "trainjob_schema": TrainJobLauncherConfig,
        "pytorchjob_schema": PyTorchJobLauncherConfig,
        "ascendjob_schema": AscendJobLauncherConfig,
    },
    "cluster": {"cluster_schema": ClusterConfig},
}


def spoken(command: str) -> str:
    """A command as it is typed: ``doctor_portability`` is ``crosstune doctor portability``."""
    return command.replace("_", " ", 1)


# Experiments are whole runs. They are composed as a `run`, and a smaller command then takes the part it knows.
EXPERIMENT = "experiment"
EXPERIMENT_COMMANDS = ("prep", "train", "run", "plan", "prove_resume", "prove_reshard", "prove_layout")


@cache
def register_schemas() -> None:
    """Puts every schema into Hydra's ConfigStore, once per process."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for command, root in ROOTS.items():
        store.store(name=f"{command}_schema", node=root)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=name, node=schema)


def groups_of(command: str) -> list[str]:
    """The groups that `command` lets the user choose from, `experiment` last."""
    names = {f.name: str(f.type) for f in fields(ROOTS[command])}
    found = [group for group in SCHEMAS if names.get(group, "").endswith("Config")]
    return [*found, EXPERIMENT] if command in EXPERIMENT_COMMANDS else found


def options_of(group: str, config_dir: Path | None = None) -> list[str]:
    """The options of a group: ours, and those in the user's `config_dir`."""
    folders = [CONFIG_ROOT / group] + ([config_dir / group] if config_dir else [])
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
