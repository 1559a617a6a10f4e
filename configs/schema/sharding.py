"""The sharding group: which engine holds parameters, gradients and optimizer state, and how they are spread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from configs.errors import ConfigError


@dataclass
class ShardingConfig:
    """What every engine has."""

    _target_: str = MISSING
    """A subclass of ``train.engine.base.Engine``."""


@dataclass
class PlainConfig(ShardingConfig):
    """One process, or several that each hold everything and sum their gradients (data parallel)."""

    _target_: str = "train.engine.plain.PlainEngine"


@dataclass
class ZeroConfig(ShardingConfig):
    """DeepSpeed ZeRO (Rajbhandari et al. 2019, arXiv:1910.02054)."""

    _target_: str = "train.engine.zero.ZeroEngine"
    stage: int = 2
    """1: optimizer state, 2: and gradients, 3: and parameters are spread over the ranks."""
    offload_optimizer: bool = False
    """Keeps optimizer state in host memory."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed keys, or ``{file: ds.json}``; what contradicts our own settings is refused."""

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ConfigError(
                "sharding.stage", str(self.stage), allowed="1, 2 or 3", remedy="sharding=plain is stage 0"
            )
