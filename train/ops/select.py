"""Which version of each op a model runs on a device, by the switches ``device.NAME_kernel``, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from configs.errors import DeviceError, raise_all
from configs.schema.device import KernelChoice
from train.devices.base import Device
from train.models.families import Family
from train.models.load import dtype_name
from train.ops.agreement import disagreement
from train.ops.kernel import REFERENCES, Needs
from train.ops.packed_attention import register
from train.ops.replace import another_formula, layers_of, replace

logger = logging.getLogger(__name__)


class KernelSelection:
    """Puts a device's versions of the ops into a model, where they are wanted, can be used and agree.

    Args:
        device: whose versions; `device.cfg` says which are wanted.
        family: of the model.
        dtype: the working dtype.
        packed: whether rows hold several samples; attention is replaced only then.

    Raises:
        DeviceError: a version was asked for by name that this device or family has not, or that would never run.
        ErrorGroup: several.
    """

    def __init__(self, device: Device, family: Family, dtype: torch.dtype, *, packed: bool) -> None:
        self.device, self.family, self.dtype, self.packed = device, family, dtype, packed
        self.kernels = device.kernels(dtype)
        self.choices = {op: device.cfg.kernel_choice(op) for op in REFERENCES}
        self._stop({op: self._missing(op) for op in REFERENCES})

    def use(self, model: Any, note: Callable[[str], None] = logger.info) -> tuple[str, ...]:
        """Has a model compute with the versions that can be used.

        Args:
            model: a transformers model on the device, with or without adapters in it, its weights whole.
            note: takes the one line that says what runs; a comparison that failed is a warning on every rank.

        Returns:
            the ops that run the device's version.

        Raises:
            DeviceError: a version was asked for by name and cannot be used.
            ErrorGroup: several.
        """
        if not self.kernels:
            return ()
        wanted = [op for op in self.kernels if self.choices[op] is not KernelChoice.reference]
        refused = {op: self._missing(op) or self._unfit(op, model) for op in wanted}
        compared = {op: self._compare(op, model) for op in wanted if refused[op] is None}
        self._stop(refused | compared)
        chosen = tuple(op for op, found in compared.items() if found is None)
        for op in chosen:
            self._put(op, model)
        failed = any(compared.values())
        (logger.warning if failed else note)(self._line(refused | compared))
        return chosen

    def _missing(self, op: str) -> str | None:
        """What can be said before a model is there; None: nothing."""
        if op not in self.kernels:
            return f"{self.device.name} has no version of its own"
        if op == "attention" and not self.packed:
            return "no row holds several samples"
        return None if self.family.layers else f"the layers of family '{self.family.model_type}' are not known"

    def _layers(self, op: str, model: Any) -> list[Any]:
        assert self.family.layers is not None, "see `_missing`"
        return layers_of(op, model, self.family.layers)

    def _unfit(self, op: str, model: Any) -> str | None:
        """Why the model cannot take the device's version; None: it can."""
        if op != "attention":
            found = self._layers(op, model)
            if not found:
                return f"the model has no {getattr(self.family.layers, op)}"
            if different := another_formula(op, found, self.dtype, self.device.torch_device):
                return different
        return self.kernels[op].unmet(Needs.of(model))

    def _compare(self, op: str, model: Any) -> str | None:
        found = disagreement(op, self.kernels[op], Needs.of(model), self.dtype, self.device.torch_device)
        return found and f"comparison in {dtype_name(self.dtype)}: {found}"

    def _put(self, op: str, model: Any) -> None:
        if op == "attention":
            model.set_attn_implementation(register(self.device.name, self.kernels[op]))
        else:
            replace(op, self._layers(op, model), self.kernels[op])

    def _stop(self, reasons: Mapping[str, str | None]) -> None:
        faults = [
            DeviceError(
                f"device.{op}_kernel",
                f"device, but {self.device.name}'s {op} cannot be used: {reason}",
                allowed="auto (the device's where it agrees with plain torch), reference (plain torch)",
                remedy=f"device.{op}_kernel=auto",
            )
            for op, reason in reasons.items()
            if reason and self.choices[op] is KernelChoice.device
        ]
        raise_all(faults)

    def _line(self, reasons: Mapping[str, str | None]) -> str:
        chosen = [op for op, reason in reasons.items() if reason is None]
        parts = [f"{', '.join(chosen)} by {self.device.name}, compared with plain torch just now"] if chosen else []
        others = {op: reason or "" for op, reason in reasons.items() if reason}
        others |= {op: "as configured" for op in self.kernels if op not in reasons}
        for reason in dict.fromkeys(others.values()):
            parts.append(f"{', '.join(op for op in others if others[op] == reason)} by plain torch: {reason}")
        return "kernels: " + "; ".join(parts)
