"""What the pipeline asks of a device. One file per backend beside this one; nothing else names a vendor.

Not covered here: kernels (`train/ops`) and multi-node networking (`launchers/`).
"""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch

from configs.errors import DeviceError
from configs.schema.device import DeviceConfig


@dataclass(frozen=True)
class Availability:
    """Whether a device can be used here, and why not."""

    ok: bool
    reason: str
    """What was found, or what is missing and how to get it."""


class Device(ABC):
    """One kind of accelerator (or the CPU), as seen by one process."""

    name: str
    torch_type: str
    """The string torch uses: ``torch.device(torch_type)``."""
    backend: str
    """Collective backend of torch.distributed."""
    deepspeed_accelerator: str
    """Value of DS_ACCELERATOR."""
    visible_devices_variable: str | None

    def __init__(self, cfg: DeviceConfig) -> None:
        self.cfg = cfg
        self.index = 0

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this device can be used in this process; asks the driver, loads no model."""

    @abstractmethod
    def count(self) -> int:
        """Devices that this process may use."""

    @abstractmethod
    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """Number formats that this device multiplies at full speed, fastest first."""

    @abstractmethod
    def peak_memory_bytes(self) -> int:
        """Largest device memory held by this process so far (CPU: largest resident set)."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` works at all, fast or not."""
        return dtype in self.fast_dtypes() or dtype == torch.float32

    def activate(self, local_rank: int) -> None:
        """Makes this device the one that the process works on.

        Must run before DeepSpeed is imported, since DeepSpeed picks its accelerator on import.

        Raises:
            DeviceError: the device is not there, or there are fewer than `local_rank + 1` of them.
        """
        found = self.availability()
        if not found.ok:
            raise DeviceError(f"device={self.name}", found.reason, remedy="device=auto takes what is there")
        os.environ["DS_ACCELERATOR"] = self.deepspeed_accelerator
        for key, value in self.environment().items():
            os.environ.setdefault(key, value)
        self.index = local_rank
        self.set_threads()
        self._activate(local_rank)
        if self.cfg.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # A debugging aid that comes with it and writes NaN into every new tensor first.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    @abstractmethod
    def _activate(self, local_rank: int) -> None:
        """Backend's part of `activate`."""

    def environment(self) -> dict[str, str]:
        """Variables that must be set before the backend starts; a user's own value wins."""
        return {}

    def set_threads(self) -> None:
        """Divides the cores among the processes of this machine, unless the config or OMP_NUM_THREADS says."""
        threads = self.cfg.threads
        if not threads and "OMP_NUM_THREADS" not in os.environ:
            local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            threads = max(1, usable_cores() // local_world)
        if threads:
            torch.set_num_threads(threads)

    @property
    def torch_device(self) -> torch.device:
        """Where tensors go."""
        return torch.device(self.torch_type, self.index)

    def seed(self, seed: int) -> None:
        """Seeds every generator that training may draw from."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def rng_state(self) -> torch.Tensor | None:
        """State of the device's own generator; None where it is torch's CPU generator."""
        return None

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Puts back what `rng_state` gave."""
        raise NotImplementedError(f"{self.name} has no generator of its own")

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until all queued work is done."""

    def describe(self) -> dict[str, str]:
        """Facts for environment.json."""
        return {"name": self.name, "torch_device": str(self.torch_device), "backend": self.backend}


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, not the machine's count."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
