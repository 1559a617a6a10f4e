"""Plain CPUs."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from data_prep.pool import usable_cores
from train.devices.base import Availability, Device, Memory

if TYPE_CHECKING:
    from train.ops.kernel import Kernel


class CpuDevice(Device):
    """The host's processor, collectives by gloo."""

    name = "cpu"
    torch_type = "cpu"
    backend = "gloo"
    deepspeed_accelerator = "cpu"
    proven = True
    visible_devices_variable = None
    fused_optimizer = True
    recorded_variables = ("LOCAL_SIZE", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "MKL_NUM_THREADS")

    def availability(self) -> Availability:
        """Always there."""
        return Availability(True, f"{usable_cores()} cores")

    def count(self) -> int:
        """Any number of processes may share the cores; one per core is the sensible limit."""
        return usable_cores()

    def versions(self) -> dict[str, str]:
        """The libraries that multiply, and the best instructions that torch uses here."""
        known = {"oneDNN": torch.backends.mkldnn, "MKL": torch.backends.mkl}
        libraries = [name for name, library in known.items() if library.is_available()]
        return {"libraries": ", ".join(libraries), "instructions": torch.backends.cpu.get_cpu_capability()}

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 only with the instructions for it: without them it ran at a quarter of fp32's speed."""
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return (torch.bfloat16, torch.float32)
        return (torch.float32,)

    def row_step(self, dtype: torch.dtype) -> int:
        """OneDNN makes and keeps code for each new shape of a product in bf16: milliseconds, and up to some MiB.

        Also where bf16 is emulated: a run that is resumed on another machine draws the same dropout.
        """
        return 64 if dtype == torch.bfloat16 else 1

    def supports(self, dtype: torch.dtype) -> bool:
        """bf16 is emulated where it is not native, slowly but correctly."""
        return dtype in (torch.float32, torch.bfloat16)

    def memory(self) -> Memory:
        """Resident sets of the process, and the machine's memory."""
        used, peak = int(psutil.Process().memory_info().rss), _peak_resident_bytes()
        return Memory(used, max(used, peak), int(psutil.virtual_memory().total))  # the kernel rounds them differently

    def synchronize(self) -> None:
        """Nothing is queued on the host."""

    @property
    def torch_device(self) -> torch.device:
        """The CPU has no index."""
        return torch.device("cpu")

    def kernels(self, dtype: torch.dtype) -> Mapping[str, Kernel]:
        """For bf16 where instructions multiply it."""
        from train.devices.cpu_kernels import KERNELS

        return KERNELS if dtype == torch.bfloat16 and dtype in self.fast_dtypes() else {}

    def environment(self) -> dict[str, str]:
        """DeepSpeed on CPU asks for the number of processes on this machine under this name."""
        return {"LOCAL_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1")}

    def _activate(self, index: int) -> None:
        """There is nothing to choose."""
        _keep_freed_memory()


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC = ((M_MMAP_THRESHOLD, 2**25), (M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, -1))
"""Calls of glibc's mallopt(3). Before 2.35 it refuses a M_MMAP_THRESHOLD above the first one. -1: the heap stays."""


def _keep_freed_memory() -> None:
    """Has glibc keep the memory of tensors that are gone for those that come.

    Left alone it gives some MiB back to the kernel as soon as they are free, which then clears them anew, page by
    page, for the next tensor: tens of thousands of page faults a step. Other C libraries do otherwise, and are let be.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter, value in MALLOC:
            mallopt(parameter, value)


def largest_resident_set(pid: int) -> int | None:
    """Bytes that a process held at the most so far, where Linux tells it; None elsewhere, and once it has ended.

    getrusage, on Linux, counts what the process was forked from, even after exec.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.M)
    return int(found[1]) * 1024 if found else None


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if (own := largest_resident_set(os.getpid())) is not None:
        return own
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
