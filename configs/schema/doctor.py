"""The roots of `crosstune doctor` and its parts."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.errors import ConfigError, not_empty
from configs.schema.device import DeviceConfig
from configs.schema.model import ModelConfig


@dataclass
class DoctorConfig:
    """`crosstune doctor`: a device's answers, found versions, and what is missing."""

    nproc: int = 1
    """Processes that a run would start on this machine."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=""))
    """Only ``model.precision`` is looked at."""
    device: DeviceConfig = field(default_factory=DeviceConfig)

    def __post_init__(self) -> None:
        if self.nproc < 1:
            raise ConfigError("nproc", str(self.nproc), allowed="1 or more")


@dataclass
class StandinConfig:
    """`crosstune doctor ascend-standin`: the real torch_npu over a pretended CANN."""

    build: str | None = None
    """Folder of the stand-in; null: in `cache_dir`, by versions."""
    wheel: str | None = None
    """The torch_npu wheel, or a folder with it; null: pip fetches it from the configured package index."""
    cache_dir: str = "~/.cache/crosstune"
    devices: int = 2
    """Pretended NPUs."""
    hbm_mib: int = 65536
    """Memory of each."""
    soc: str = "Ascend910B3"
    """Chip, as CANN names it; Ascend910PremiumA and Ascend310P3 have no bf16."""
    unsupported: list[str] = field(default_factory=list)
    """Operators without a kernel, such as ``aten::sort`` or ``aten::add.Tensor``."""
    die: str | None = None
    """``RANK:N``: that rank is killed in its N-th collective, counted from 1."""
    slow: str | None = None
    """``RANK:MILLISECONDS``: that rank comes late to every collective."""
    report: str | None = None
    """Folder in which each process leaves what it dispatched, as ``<pid>.json``."""

    def __post_init__(self) -> None:
        for key in ("build", "wheel", "cache_dir", "report"):
            not_empty(key, getattr(self, key))
        if not 0 <= self.devices <= 64:
            raise ConfigError("devices", str(self.devices), allowed="0 to 64")
        if self.hbm_mib < 1:
            raise ConfigError("hbm_mib", str(self.hbm_mib), allowed="1 or more")
        for key in ("die", "slow"):
            value = getattr(self, key)
            if value is not None and not all(part.isdigit() for part in (value.split(":") + [""])[:2]):
                raise ConfigError(key, f"'{value}'", allowed="RANK:NUMBER, such as 1:3")


@dataclass
class PortabilityConfig:
    """`crosstune doctor portability`: one training step of a model on a pretended device, and what it lacks there."""

    model: ModelConfig = field(default_factory=ModelConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    standin: str | None = None
    """Folder of a stand-in that is built already; null: the one in `cache_dir`, built on first use."""
    cache_dir: str = "~/.cache/crosstune"
    soc: str = "Ascend910B3"
    """Chip, as CANN names it; Ascend910PremiumA and Ascend310P3 have no bf16."""
    layers: int = 0
    """Only so many layers, with random weights and only config.json read; 0: the whole model with its weights."""
    tokens: int = 64
    """Tokens of the step."""
    out: str | None = None
    """File for the whole report as JSON."""

    def __post_init__(self) -> None:
        for key in ("standin", "cache_dir", "out"):
            not_empty(key, getattr(self, key))
        if self.layers < 0:
            raise ConfigError("layers", str(self.layers), allowed="0 (all) or more")
        if self.tokens < 2:
            raise ConfigError("tokens", str(self.tokens), allowed="2 or more")
