"""`device=auto`: the first backend that is available, and why."""

from __future__ import annotations

import logging
from functools import cache

from configs.schema.device import DeviceConfig
from train.devices.ascend import AscendDevice
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.devices.cuda import CudaDevice

logger = logging.getLogger(__name__)

ORDER: tuple[type[Device], ...] = (AscendDevice, CudaDevice, CpuDevice)
"""An accelerator before the host; an NPU first, since a machine that has torch_npu installed is meant for it."""


class AutoDevice(Device):
    """Stands for the first available backend of `ORDER`: making one gives that backend's object."""

    def __new__(cls, cfg: DeviceConfig) -> Device:  # type: ignore[misc]  # gives another class on purpose
        """Logs what was taken and what the others lacked."""
        passed_over: list[str] = []
        for backend in ORDER:
            device = backend(cfg)
            found = device.availability()
            if found.ok:
                _say_once(f"device=auto took {device.name} ({'; '.join([found.reason, *passed_over])})")
                return device
            passed_over.append(f"{device.name}: {found.reason}")
        raise AssertionError("the CPU is always available")


@cache
def _say_once(text: str) -> None:
    """Each stage of a command makes its own device; the choice is said with the first."""
    logger.info(text)
