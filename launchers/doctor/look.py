"""The doctor's look at devices, in a process of its own: ``python -P -m launchers.doctor.look CONFIG OUT [SKIP ...]``.

A plugin whose driver is missing may take its process down when it is imported, which no `except` survives. So each
device is named in OUT before it is touched, and what it answered follows: the parent sees where the process ended.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch

from configs.compose import build, load_resolved
from configs.errors import CrosstuneError, DeviceError, first_line
from configs.schema.device import DeviceConfig, KernelChoice
from configs.schema.doctor import DoctorConfig
from configs.schema.model import Precision
from launchers.doctor.findings import AUTO
from launchers.failure import as_json
from train.devices.accelerator import AcceleratorDevice, is_installed
from train.devices.auto import ORDER
from train.devices.base import DTYPES, Availability, Device


def main() -> None:
    """Writes a line before each device and one after it; ends with the first that is available."""
    cfg: DoctorConfig = load_resolved(Path(sys.argv[1]))
    with Path(sys.argv[2]).open("a", encoding="utf-8") as out:
        for device in candidates(cfg.device):
            if device.name in sys.argv[3:]:
                continue
            if cfg.device._target_ == AUTO and isinstance(device, AcceleratorDevice) and absent(device):
                record = {"name": device.name, "available": False, "reason": f"no {device.plugin}", "absent": True}
            else:
                print(json.dumps({"name": device.name}), file=out, flush=True)
                record = look_at(device, cfg)
            print(json.dumps(record), file=out, flush=True)
            if record["available"]:
                return


def candidates(cfg: DeviceConfig) -> Iterator[Device]:
    """The device that was named, or all, in the order in which ``device=auto`` tries them."""
    if cfg._target_ == AUTO:
        yield from (backend(cfg) for backend in ORDER)
    else:
        yield build(cfg, Device)


def absent(device: AcceleratorDevice) -> bool:
    """Whether its plugin is not even installed."""
    return device.plugin is not None and not is_installed(device.plugin)


def look_at(device: Device, cfg: DoctorConfig) -> dict[str, Any]:
    """What a device answers; only its name and the reason where it cannot be used."""
    faults: list[dict[str, Any]] = []
    try:
        found = device.availability()
    except CrosstuneError as error:  # settings that it must have before it can be asked
        found, faults = Availability(False, "its settings are refused"), as_json(error)["errors"]
    record: dict[str, Any] = {
        "name": device.name,
        "available": found.ok,
        "reason": found.reason,
        "proven": device.proven,
        "deepspeed": device.deepspeed_accelerator,
        "versions": device.versions(),
        "variable": device.visible_devices_variable,
        "variables": device.variables(),
        "faults": faults,
    }
    if not found.ok:
        return record
    try:
        device.check(cfg.nproc, cfg.model.precision)
    except CrosstuneError as error:
        faults += as_json(error)["errors"]
    try:
        device.activate(0)
        record |= answers(device, cfg)
    except CrosstuneError as error:
        faults += as_json(error)["errors"]
    except Exception as error:  # a driver may fail in any way; that it does is what the user wants to know
        what = f"does not answer: {type(error).__name__}: {first_line(error) or 'no message'}"
        silent = DeviceError(f"device={device.name}", what, remedy="see the driver's own log")
        faults += as_json(silent)["errors"]
    return record


def answers(device: Device, cfg: DoctorConfig) -> dict[str, Any]:
    """What an activated device answers."""
    free, total = memory(device)
    fast = device.fast_dtypes()
    wanted = cfg.model.precision
    dtype = fast[0] if wanted is Precision.auto else DTYPES[wanted]
    return {
        "torch_device": str(device.torch_device),
        "backend": device.backend,
        "count": device.count(),
        "dtypes": {
            each.value: "fast" if kind in fast else "works" if device.supports(kind) else "no"
            for each, kind in DTYPES.items()
        },
        "memory_free_bytes": free,
        "memory_total_bytes": total,
        "peak_flops_bf16": device.peak_flops(torch.bfloat16),
        "kernels": kernels(device, dtype),
        "kernels_dtype": str(dtype).removeprefix("torch."),
        "multiplies": multiplies(device),
    }


def memory(device: Device) -> tuple[int | None, int | None]:
    """Free and whole memory in bytes, as the driver says; other processes' share is not free."""
    if device.torch_type == "cpu":
        host = psutil.virtual_memory()
        return host.available, host.total
    try:
        free, total = torch.accelerator.get_memory_info(device.torch_device)
    except (RuntimeError, NotImplementedError, ValueError):  # a backend that does not tell what is free
        return None, device.memory().total_bytes
    return free, total


def multiplies(device: Device) -> bool:
    """Whether a small product comes out right: whole numbers, so that every format is exact."""
    left = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    there = left.to(device.torch_device)
    device.synchronize()
    return bool(torch.equal((there @ there).cpu(), left @ left))


def kernels(device: Device, dtype: torch.dtype) -> dict[str, str]:
    """Of each op, why plain torch runs; empty where the device's own version does."""
    from train.ops.agreement import disagreement
    from train.ops.kernel import Needs

    # Sizes of a small model; a run compares again, with those of its own.
    sizes = {"heads": 4, "kv_heads": 2, "head_dim": 64, "hidden": 256, "intermediate": 512}
    needs = Needs(**sizes, epsilon=1e-6, sliding_window=None, dropout=0.0, rotary_factor=1.0)
    own = device.kernels(dtype)
    found = {}
    for field in fields(DeviceConfig):
        op = field.name.removesuffix("_kernel")
        if op == field.name:
            continue
        if getattr(device.cfg, field.name) is KernelChoice.reference:
            found[op] = "as configured"
        elif op in own:
            found[op] = disagreement(op, own[op], needs, dtype, device.torch_device) or ""
        else:
            found[op] = "the device has none of its own"
    return found


if __name__ == "__main__":
    try:
        main()
    except CrosstuneError as error:  # such as a class of the user's that is no device
        sys.exit(f"{error.where}: {error.found}" + (f"; {error.remedy}" if error.remedy else ""))
