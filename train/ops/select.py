"""Which version of each op a model runs on a device, by the switches ``device.NAME_kernel``, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from configs.errors import CrosstuneError, DeviceError, ErrorGroup
from configs.schema.device import KernelChoice
from train.devices.base import Device
from train.models.families import Family
from train.ops.agreement import disagreement
from train.ops.kernel import REFERENCES, Kernel, Needs
from train.ops.packed_attention import register
from train.ops.replace import another_formula, layers_of, replace

logger = logging.getLogger(__name__)


def use_kernels(
    model: Any,
    family: Family,
    device: Device,
    dtype: torch.dtype,
    *,
    packed: bool,
    note: Callable[[str], None] = logger.info,
) -> tuple[str, ...]:
    """Has a model compute with the device's own versions of the ops, where they are wanted and agree.

    Args:
        model: a transformers model on the device, with or without adapters in it, its weights whole.
        family: its family.
        device: whose versions; `device.cfg` says which are wanted.
        dtype: the working dtype.
        packed: whether rows hold several samples; attention is replaced only then.
        note: takes the one line that says what runs.

    Returns:
        the ops that run the device's version.

    Raises:
        DeviceError: a version was asked for by name and cannot be used.
        ErrorGroup: several.
    """
    kernels = device.kernels()
    choices = {op: KernelChoice(getattr(device.cfg, f"{op}_kernel")) for op in REFERENCES}
    wanted = {op: choice for op, choice in choices.items() if choice is not KernelChoice.reference}
    refused: dict[str, str] = {}
    chosen: list[str] = []
    for op, choice in wanted.items():
        if op not in kernels and choice is KernelChoice.auto:
            continue
        reason = _why_not(op, kernels.get(op), model, family, device, dtype, packed)
        if reason is None:
            chosen.append(op)
        else:
            refused[op] = reason
    _stop([_error(op, reason, device) for op, reason in refused.items() if wanted[op] is KernelChoice.device])
    for op in chosen:
        _use(op, kernels[op], model, family, device)
    if kernels:
        note(_line(device, chosen, refused, [op for op in choices if op not in wanted]))
    return tuple(chosen)


def _why_not(
    op: str,
    version: Kernel | None,
    model: Any,
    family: Family,
    device: Device,
    dtype: torch.dtype,
    packed: bool,
) -> str | None:
    """Why a device's version does not run; None: it may. The comparison comes last, being the slow one."""
    if version is None:
        return f"{device.name} has no version of its own"
    if family.layers is None:
        return f"the layers of family '{family.model_type}' are not known"
    if op == "attention":
        if not packed:
            return "no row holds several samples"
    else:
        found = layers_of(op, model, family.layers)
        if not found:
            return f"the model has no {getattr(family.layers, op)}"
        if different := another_formula(op, found, dtype, device.torch_device):
            return different
    needs = Needs.of(model)
    if unmet := version.unmet(needs):
        return unmet
    found_wrong = disagreement(op, version, needs, dtype, device.torch_device)
    if found_wrong is None:
        return None
    # On whichever rank: a card that computes something else is worth knowing.
    logger.warning("%s of %s disagrees with the reference in %s: %s", op, device.name, dtype, found_wrong)
    return f"it disagrees with the reference in {dtype}: {found_wrong}"


def _use(op: str, version: Kernel, model: Any, family: Family, device: Device) -> None:
    if op == "attention":
        model.set_attn_implementation(register(device.name, version))
    else:
        assert family.layers is not None, "checked before"
        replace(op, layers_of(op, model, family.layers), version)


def _error(op: str, reason: str, device: Device) -> CrosstuneError:
    return DeviceError(
        f"device.{op}_kernel",
        f"device, but {device.name}'s {op} cannot be used: {reason}",
        allowed="auto (the device's where it agrees with plain torch), reference (plain torch)",
        remedy=f"device.{op}_kernel=auto",
    )


def _stop(errors: list[CrosstuneError]) -> None:
    if errors:
        raise errors[0] if len(errors) == 1 else ErrorGroup(errors)


def _line(device: Device, chosen: list[str], refused: dict[str, str], unwanted: list[str]) -> str:
    parts = [f"{', '.join(chosen)} by {device.name}, compared with plain torch just now"] if chosen else []
    reasons = refused | dict.fromkeys(unwanted, "as configured")
    for reason in dict.fromkeys(reasons.values()):
        parts.append(f"{', '.join(op for op in reasons if reasons[op] == reason)} by plain torch: {reason}")
    return "kernels: " + "; ".join(parts)
