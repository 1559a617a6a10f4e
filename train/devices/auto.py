"""`device=auto`: the first backend that is available, and why."""

from __future__ import annotations

import logging

from configs.schema.device import DeviceConfig
from train.devices.ascend import AscendDevice
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.devices.cuda import CudaDevice

logger = logging.getLogger(__name__)

ORDER: tuple[type[Device], ...] = (AscendDevice, CudaDevice, CpuDevice)
"""An accelerator before the host; an NPU first, since a machine that has torch_npu installed is meant for it."""


def AutoDevice(cfg: DeviceConfig) -> Device:  # noqa: N802 - named like the classes that a config may name
    """The first available backend of `ORDER`; the log says what the others lacked."""
    passed_over = []
    for backend in ORDER:
        device = backend(cfg)
        found = device.availability()
        if found.ok:
            why = "".join(f"; {reason}" for reason in passed_over)
            logger.info("device=auto took %s (%s)%s", device.name, found.reason, why)
            return device
        passed_over.append(f"{device.name}: {found.reason}")
    raise AssertionError("the CPU is always available")
