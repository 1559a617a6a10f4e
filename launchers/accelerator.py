"""The calling process's look at the device, before it starts anything slow on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from configs.compose import build
from configs.errors import ConfigError, DeviceError
from configs.schema.device import DeviceConfig
from configs.schema.roots import TrainConfig

if TYPE_CHECKING:
    from train.devices.base import Device


def check_processes(cfg: TrainConfig) -> None:
    """Looks at device and processes before anything slow starts.

    Raises:
        ConfigError: an outer launcher started another number of processes.
        DeviceError: the device is not there, or there are fewer of them than processes.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is not None and cfg.nproc not in (1, int(world)):
        raise ConfigError(
            "nproc", f"{cfg.nproc}, but the outer launcher started {world} processes", remedy="leave it out"
        )
    device = available_device(cfg.device)
    if device.torch_type != "cpu" and cfg.nproc > device.count():
        raise DeviceError("nproc", f"{cfg.nproc} processes, but {device.count()} {device.name} devices are visible")


def choose_accelerator(name: str) -> None:
    """Says early what `Device.activate` says again.

    Loading a tokenizer with transformers already imports DeepSpeed, which picks its accelerator on import.
    """
    os.environ["DS_ACCELERATOR"] = name


def available_device(cfg: DeviceConfig) -> Device:
    """The configured device, chosen for DeepSpeed too.

    Raises:
        DeviceError: it is not there.
    """
    from train.devices.base import Device

    device = build(cfg, Device)
    found = device.availability()
    if not found.ok:
        raise DeviceError(f"device={device.name}", found.reason, remedy="device=auto takes what is there")
    choose_accelerator(device.deepspeed_accelerator)
    return device
