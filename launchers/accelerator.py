"""The calling process's look at the device, before it starts anything slow on it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from configs.compose import build
from configs.errors import ConfigError, DeviceError, raise_all
from configs.schema.device import DeviceConfig
from configs.schema.model import Precision
from configs.schema.roots import RunConfig, TrainConfig
from configs.schema.sharding import ZeroConfig

if TYPE_CHECKING:
    from train.devices.base import Device


def check_processes(cfg: TrainConfig, began_in: str | None = None) -> None:
    """Looks at device, processes and number format before anything slow starts; every fault at once.

    Args:
        cfg: what was asked for.
        began_in: precision of a run that goes on, whatever `auto` would take here.

    Raises:
        ConfigError: an outer launcher started another number of processes.
        DeviceError: the device is not there, there are fewer of them than processes, or it cannot do what was asked.
    """
    world = os.environ.get("WORLD_SIZE")
    if world is not None and cfg.nproc not in (1, int(world)):
        raise ConfigError(
            "nproc", f"{cfg.nproc}, but the outer launcher started {world} processes", remedy="leave it out"
        )
    device = available_device(cfg.device)
    precision = Precision(began_in) if began_in else cfg.model.precision
    faults = list(device.faults(processes_here(cfg.nproc), precision))
    if isinstance(cfg, RunConfig) and (fault := device.precision_fault(cfg.eval.precision, "eval.precision")):
        faults.append(fault)
    if isinstance(cfg.sharding, ZeroConfig) and device.deepspeed_accelerator is None:
        found = f"ZeRO stage {cfg.sharding.stage}, but DeepSpeed has no class for device={device.name}"
        faults.append(DeviceError("sharding", found, allowed="plain", remedy="sharding=plain"))
    raise_all(faults)


def processes_here(nproc: int) -> int:
    """Processes of the run on this machine: what an outer launcher says, else what we shall start."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return int(os.environ.get("LOCAL_RANK", "0")) + 1 if "WORLD_SIZE" in os.environ else nproc


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
    device.require()
    choose_accelerator(device.deepspeed_choice)
    return device


def device_of_one(cfg: DeviceConfig) -> Device:
    """The configured device for work of a single process, checked.

    Raises:
        DeviceError: it is not there, or the variables that hide devices name what is not there.
    """
    device = available_device(cfg)
    device.check(1, Precision.auto)
    return device
