"""What the pipeline asks of a device. One file per backend beside this one; nothing else names a vendor.

Not covered here: what accelerators share (`accelerator.py`), kernels (`train/ops`), networks between machines
(`launchers/`).
"""

from __future__ import annotations

import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from configs.errors import DeviceError, raise_all
from configs.schema.device import DeviceConfig
from configs.schema.model import Precision
from data_prep.pool import usable_cores

if TYPE_CHECKING:
    from train.ops.kernel import Kernel

DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}
"""The formats that weights may be in, by the name that a config has for them."""


@dataclass(frozen=True)
class Availability:
    """Whether a device can be used here, and why not."""

    ok: bool
    reason: str
    """What was found, or what is missing and how to get it."""


@dataclass(frozen=True)
class Memory:
    """Device memory as this process sees it; of the CPU the host's."""

    used_bytes: int
    """Held by this process now."""
    peak_bytes: int
    """The most that it held so far."""
    total_bytes: int | None
    """Of the whole device; None where it does not say."""


class Device(ABC):
    """One kind of accelerator (or the CPU), as seen by one process."""

    name: str
    """The option of the `device` group."""
    torch_type: str
    """The string torch uses: ``torch.device(torch_type)``."""
    backend: str
    """Collective backend of torch.distributed."""
    deepspeed_accelerator: str | None
    """Value of DS_ACCELERATOR; None where DeepSpeed has no class for the device, so no ZeRO."""
    visible_devices_variable: str | None
    """Environment variable that hides devices from a process."""
    fused_optimizer: bool = False
    """Whether torch's own fused steps of optimizers work here."""
    proven: bool = False
    """Whether crosstune's makers have run it on the real thing."""

    out_of_memory_texts: tuple[str, ...] = ()
    """Parts of the messages of errors that mean out of memory but are not torch's own kind."""
    recorded_variables: tuple[str, ...] = ()
    """Environment variables that decide how the device behaves; none that may hold a secret."""

    def __init__(self, cfg: DeviceConfig) -> None:
        self.cfg = cfg
        self.index = 0

    # What is here.

    @abstractmethod
    def availability(self) -> Availability:
        """Whether this device can be used in this process; asks the driver, loads no model."""

    @abstractmethod
    def count(self) -> int:
        """Devices that this process may use."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """What was found of plugin, toolkit and driver; what is not found is left out. Never fails."""

    @abstractmethod
    def memory(self) -> Memory:
        """Memory of the device."""

    @abstractmethod
    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """Number formats that this device multiplies at full speed, fastest first."""

    def row_step(self, dtype: torch.dtype) -> int:
        """Tokens to a multiple of which rows are best filled up, so that few shapes occur; 1: it is no matter."""
        return 1

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether `dtype` works at all, fast or not."""
        return dtype in self.fast_dtypes() or dtype == torch.float32

    def peak_flops(self, dtype: torch.dtype) -> float | None:
        """Dense peak of one device in FLOP/s; None where it is not known. ``device.peak_tflops`` wins for bf16."""
        if dtype == torch.bfloat16 and self.cfg.peak_tflops:
            return self.cfg.peak_tflops * 1e12
        return self._published_peak_flops(dtype)

    def _published_peak_flops(self, dtype: torch.dtype) -> float | None:
        return None

    def kernels(self, dtype: torch.dtype) -> Mapping[str, Kernel]:
        """The device's own versions of operations, by their names in `train.ops.kernel`."""
        return {}

    # What was asked for.

    def check(self, nproc: int, precision: Precision) -> None:
        """Stops what cannot run here, before a model is loaded.

        Args:
            nproc: processes on this machine.
            precision: of the working weights, as it was asked for.

        Raises:
            CrosstuneError: a `DeviceError`, or the group of all that were found.
        """
        raise_all(list(self.faults(nproc, precision)))

    def faults(self, nproc: int, precision: Precision) -> Iterator[DeviceError]:
        """What `check` finds."""
        if nproc > 1 and not dist.is_backend_available(self.backend):
            yield DeviceError(
                "nproc",
                f"{nproc} processes, but torch {torch.__version__} has no {self.backend} collectives",
                remedy="nproc=1, or a build of torch with them",
            )
        fault = self.precision_fault(precision)
        if fault is not None:
            yield fault

    def precision_fault(self, precision: Precision, key: str = "model.precision") -> DeviceError | None:
        """What is wrong with a precision that was asked for by name, under `key`; None where it works."""
        if precision is Precision.auto or self.supports(DTYPES[precision]):
            return None
        return DeviceError(
            key,
            f"{precision.value} does not work on device {self.name} here",
            allowed=", ".join(each.value for each, dtype in DTYPES.items() if self.supports(dtype)) + ", auto",
            remedy=f"{key}=auto",
        )

    # Use.

    def activate(self, local_rank: int) -> None:
        """Makes this device the one that the process works on.

        Must run before DeepSpeed is imported, since DeepSpeed picks its accelerator on import.

        Raises:
            DeviceError: the device is not there, or there are fewer than `local_rank + 1` of them.
        """
        self.require()
        os.environ["DS_ACCELERATOR"] = self.deepspeed_choice
        for key, value in self.environment().items():
            os.environ.setdefault(key, value)
        self.index = self.index_of(local_rank)
        self.set_threads()
        self._activate(self.index)
        if self.cfg.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=True)
            # A debugging aid that comes with it and writes NaN into every new tensor first.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def require(self) -> None:
        """Stops where the device cannot be used.

        Raises:
            DeviceError: it is not there.
        """
        found = self.availability()
        if not found.ok:
            raise DeviceError(f"device={self.name}", found.reason, remedy="device=auto takes what is there")

    def index_of(self, local_rank: int) -> int:
        """Which of the visible devices a process of this machine takes."""
        return local_rank

    @property
    def deepspeed_choice(self) -> str:
        """What DS_ACCELERATOR is set to: transformers imports DeepSpeed in any case, and left alone it would guess."""
        return self.deepspeed_accelerator or "cpu"

    @abstractmethod
    def _activate(self, index: int) -> None:
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

    def peak_memory_bytes(self) -> int:
        """Largest device memory held by this process so far (CPU: largest resident set)."""
        return self.memory().peak_bytes

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether an error, or what caused it, says that the device's memory (or the host's) is full."""
        return memory_is_full(error, self.out_of_memory_texts)

    # Records.

    def variables(self) -> dict[str, str]:
        """Environment variables for environment.json, as they stand."""
        names = (*self.recorded_variables, *([self.visible_devices_variable] if self.visible_devices_variable else []))
        return {name: os.environ[name] for name in names if name in os.environ}

    def describe(self) -> dict[str, Any]:
        """Facts for environment.json."""
        return {
            "name": self.name,
            "torch_device": str(self.torch_device),
            "backend": self.backend,
            "found": self.availability().reason,
            "proven": self.proven,
            "memory_bytes": self.memory().total_bytes,
            "versions": self.versions(),
        }


HOST_TEXTS = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")
"""What torch's allocator of host memory says on Linux and on Windows; it raises a plain RuntimeError."""


def memory_is_full(error: BaseException, texts: tuple[str, ...] = ()) -> bool:
    """Whether an error, or what caused it, says that memory is full: by its kind, or for a RuntimeError by its words.

    Args:
        error: what was raised.
        texts: words of a device's own, beside those of the host.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in (*HOST_TEXTS, *texts)):
            return True
        cause = cause.__cause__
    return False
