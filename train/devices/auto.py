"""`device=auto`: the first backend that is available, and why."""

from __future__ import annotations

import logging
from functools import cache

from configs.schema.device import DeviceConfig
from train.devices.accelerator import AcceleratorDevice, is_installed
from train.devices.ascend import AscendDevice
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.devices.cuda import CudaDevice
from train.devices.rocm import RocmDevice
from train.devices.table import HpuDevice, MluDevice, MpsDevice, MusaDevice, SdaaDevice, SupaDevice
from train.devices.xpu import XpuDevice

logger = logging.getLogger(__name__)

ORDER: tuple[type[Device], ...] = (
    *(MluDevice, SdaaDevice, MusaDevice, SupaDevice, AscendDevice, HpuDevice),
    *(RocmDevice, CudaDevice, XpuDevice, MpsDevice, CpuDevice),
)
"""As accelerate orders them: a vendor's plugin before torch's own names, since a machine that has it installed is meant
for it and some plugins answer for torch.cuda, too; an accelerator before the host."""


class AutoDevice(Device):
    """Stands for the first available backend of `ORDER`: making one gives that backend's object."""

    def __new__(cls, cfg: DeviceConfig) -> Device:  # type: ignore[misc]  # gives another class on purpose
        """Logs what was taken and what the others lacked."""
        absent: list[str] = []
        unbuilt: list[str] = []
        passed_over: list[str] = []
        for backend in ORDER:
            device = backend(cfg)
            if isinstance(device, AcceleratorDevice) and device.plugin and not is_installed(device.plugin):
                absent.append(device.plugin)
                continue
            found = device.availability()
            if found.ok:
                lacking = {"not installed": absent, "not in this build of torch": unbuilt}
                passed_over += [f"{what}: {', '.join(names)}" for what, names in lacking.items() if names]
                _say_once(f"device=auto took {device.name} ({'; '.join([found.reason, *passed_over])})")
                return device
            if isinstance(device, AcceleratorDevice) and not device.plugin and device.missing_build():
                unbuilt.append(device.name)
            else:
                passed_over.append(f"{device.name}: {found.reason}")
        raise AssertionError("the CPU is always available")


@cache
def _say_once(text: str) -> None:
    """Each stage of a command makes its own device; the choice is said with the first."""
    logger.info(text)
