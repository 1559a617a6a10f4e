"""Intel GPUs through torch.xpu, which stock torch has."""

from __future__ import annotations

import re
from typing import Any

import torch

from train.devices.accelerator import AcceleratorDevice
from train.devices.peaks import published_peak_flops

VECTOR_ENGINES = {"Max 1550": 1024, "Max 1100": 448}
"""Of a whole card: Intel Data Center GPU Max product briefs (2023), "Xe vector engines"."""


class XpuDevice(AcceleratorDevice):
    """One GPU, or one stack of a GPU, per process; collectives by oneCCL under the name XCCL."""

    name = "xpu"
    torch_type = "xpu"
    backend = "xccl"
    deepspeed_accelerator = "xpu"
    lister = "xpu-smi discovery"
    visible_devices_variable = "ZE_AFFINITY_MASK"
    # Level Zero, "Affinity mask": devices, or with a dot stacks of them: "0,1" or "0.1,1.0".
    visible_entry = re.compile(r"\s*\d+(\.\d+)*\s*")
    out_of_memory_texts = (
        "XPU out of memory",
        "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        "UR_RESULT_ERROR_OUT_OF_RESOURCES",
        "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
    )
    recorded_variables = (
        *("ZE_FLAT_DEVICE_HIERARCHY", "ONEAPI_DEVICE_SELECTOR", "SYCL_CACHE_PERSISTENT", "PYTORCH_ALLOC_CONF"),
        *("CCL_ATL_TRANSPORT", "CCL_ZE_IPC_EXCHANGE", "CCL_PROCESS_LAUNCHER", "CCL_LOG_LEVEL", "FI_PROVIDER"),
    )

    def missing_build(self) -> str | None:
        """Needs an XPU build of torch."""
        if torch.xpu._is_compiled():
            return None
        return (
            f"torch {torch.__version__} is built without XPU; install the same version from "
            "https://download.pytorch.org/whl/xpu"
        )

    def versions(self) -> dict[str, str]:
        """The oneAPI compiler that torch was built with, and the driver."""
        found = {"sycl": str(torch.version.xpu)} if torch.version.xpu else {}
        driver = {"driver": str(self._properties().driver_version)} if self.availability().ok else {}
        return found | driver

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 where the matrix units have it; torch emulates it elsewhere."""
        properties = self._properties()
        if properties.has_bfloat16_conversions and properties.has_subgroup_matrix_multiply_accumulate:
            return (torch.bfloat16, torch.float32)
        return (torch.float32,)

    def supports(self, dtype: torch.dtype) -> bool:
        """See `fast_dtypes`."""
        if dtype == torch.bfloat16:
            return bool(self.runtime.is_bf16_supported(including_emulation=True))
        return super().supports(dtype)

    def _published_peak_flops(self, dtype: torch.dtype) -> float | None:
        """A stack that shows as a device of its own (ZE_FLAT_DEVICE_HIERARCHY=FLAT, the default) has its share."""
        card = self.card_name(self.index)
        whole = published_peak_flops(card, dtype)
        engines = next((number for name, number in VECTOR_ENGINES.items() if name in card), None)
        if whole is None or engines is None:
            return None
        return whole * min(1.0, float(self._properties().gpu_eu_count) / engines)

    def _named(self, entries: list[str]) -> list[str]:
        """Several stacks of a card show as one device, at least."""
        return sorted({entry.strip().partition(".")[0] for entry in entries})

    def _properties(self) -> Any:
        return self.runtime.get_device_properties(self.index)
