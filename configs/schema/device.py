"""The device group."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from configs.errors import ConfigError


@dataclass
class DeviceConfig:
    """What every backend has."""

    _target_: str = MISSING
    """A subclass of ``train.devices.base.Device``."""
    threads: int = 0
    """CPU threads per process. 0: the cores of the machine divided by the processes on it."""
    deterministic: bool = True
    """Asks the backend for deterministic kernels where it has them."""

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError("device.threads", str(self.threads), allowed="0 (automatic) or more")
