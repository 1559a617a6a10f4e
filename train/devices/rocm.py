"""AMD cards through a ROCm build of torch, which answers under the name torch.cuda."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

from train.devices.accelerator import AcceleratorDevice, text_version


class RocmDevice(AcceleratorDevice):
    """One card (or half of a card with two chips) per process, collectives by RCCL under NCCL's name."""

    name = "rocm"
    torch_type = "cuda"
    backend = "nccl"
    deepspeed_accelerator = "cuda"
    fused_optimizer = True
    lister = "rocm-smi"
    visible_devices_variable = "HIP_VISIBLE_DEVICES"
    # ROCm, "GPU isolation techniques": HIP reads CUDA's name, too; ROCR's is applied before, and HIP counts the rest.
    further_visible_variables = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
    visible_entry = re.compile(r"\s*(\d+|GPU-[0-9a-fA-F]+)\s*")
    out_of_memory_texts = (
        "HIP out of memory",
        "HIP error: out of memory",
        "hipErrorOutOfMemory",
        "HIPBLAS_STATUS_ALLOC_FAILED",
        "Failed to CUDA calloc",  # RCCL kept NCCL's words
    )
    recorded_variables = (
        *("HSA_OVERRIDE_GFX_VERSION", "HSA_ENABLE_SDMA", "HIP_LAUNCH_BLOCKING", "HIPBLASLT_ALLOW_TF32"),
        *("PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_DEBUG"),
    )

    def missing_build(self) -> str | None:
        """Needs a ROCm build of torch; a CUDA build has the same module."""
        if torch.version.hip is not None:
            return None
        if torch.version.cuda is not None:
            return f"this torch {torch.__version__} is a CUDA build: device=cuda"
        return f"torch {torch.__version__} is built without ROCm; install a ROCm build of the same version"

    def versions(self) -> dict[str, str]:
        """HIP and RCCL as torch was built with them; ROCm and driver as the machine has them."""
        found = {"hip": str(torch.version.hip)} if torch.version.hip else {}
        if torch.distributed.is_nccl_available():
            found["rccl"] = ".".join(str(part) for part in self.runtime.nccl.version())
        rocm = Path(os.environ.get("ROCM_PATH", "/opt/rocm"), ".info", "version")
        driver = Path("/sys/module/amdgpu/version")
        return found | text_version("rocm", rocm, r"^(\S+)") | text_version("driver", driver, r"^(\S+)")

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 where the matrix units have it: CDNA (gfx908, gfx90a, gfx94x, gfx95x), RDNA 3 and 4 (gfx11, gfx12).

        Torch says yes for every AMD card; older ones emulate.
        """
        architecture = str(self.runtime.get_device_properties(self.index).gcnArchName)
        if re.match(r"gfx(908|90a|94|95|11|12)", architecture):
            return (torch.bfloat16, torch.float32)
        return (torch.float32,)

    def supports(self, dtype: torch.dtype) -> bool:
        """Other cards emulate bf16."""
        return dtype in (torch.bfloat16, torch.float32)

    def visible_problems(self, counted: int) -> Iterator[tuple[str, str]]:
        """See `AcceleratorDevice.visible_problems`; two names for one thing must not disagree."""
        hip, cuda = (os.environ.get(name) for name in ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"))
        if hip is not None and cuda is not None and hip != cuda:
            yield "CUDA_VISIBLE_DEVICES", f"'{cuda}', but HIP_VISIBLE_DEVICES, which means the same here, is '{hip}'"
        else:
            yield from super().visible_problems(counted)
