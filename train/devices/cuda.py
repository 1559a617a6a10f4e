"""NVIDIA cards through torch.cuda."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import torch

from train.devices.accelerator import AcceleratorDevice, text_version


class CudaDevice(AcceleratorDevice):
    """One card per process, collectives by NCCL."""

    name = "cuda"
    torch_type = "cuda"
    backend = "nccl"
    deepspeed_accelerator = "cuda"
    lister = "nvidia-smi"
    fused_optimizer = True
    visible_devices_variable = "CUDA_VISIBLE_DEVICES"
    # CUDA C++ programming guide, "CUDA environment variables": ordinals, or UUIDs that may be cut short.
    visible_entry = re.compile(r"\s*(\d+|GPU-[0-9a-fA-F-]+|MIG-\S+)\s*")
    out_of_memory_texts = (
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "Failed to CUDA calloc",  # NCCL's own buffers
    )
    recorded_variables = (
        *("CUBLAS_WORKSPACE_CONFIG", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "NVIDIA_TF32_OVERRIDE"),
        *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
        *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_P2P_DISABLE", "NCCL_ALGO", "NCCL_PROTO", "NCCL_DEBUG"),
    )

    def missing_build(self) -> str | None:
        """Needs a CUDA build of torch; a ROCm build has the same module."""
        if torch.version.hip is not None:
            return f"this torch {torch.__version__} is a ROCm build: device=rocm"
        if torch.version.cuda is None:
            return f"torch {torch.__version__} is built without CUDA; install a CUDA build of the same version"
        return None

    def versions(self) -> dict[str, str]:
        """CUDA, cuDNN and NCCL as torch was built with them; the driver as the kernel shows it."""
        found = {"cuda": str(torch.version.cuda)} if torch.version.cuda else {}
        with suppress(RuntimeError):  # it refuses a library older than the one torch was built with
            if torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
                found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(str(part) for part in self.runtime.nccl.version())
        driver = Path("/proc/driver/nvidia/version")
        return found | text_version("driver", driver, r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s")

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 from Ampere (compute capability 8.0) on."""
        if self.runtime.is_bf16_supported(including_emulation=False):
            return (torch.bfloat16, torch.float32)
        return (torch.float32,)

    def supports(self, dtype: torch.dtype) -> bool:
        """Older cards emulate bf16, slowly but correctly.

        Torch would find that out with a tensor on the card, on which the process that starts the workers has no place.
        """
        return dtype in (torch.bfloat16, torch.float32)

    def environment(self) -> dict[str, str]:
        """CuBLAS gives the same bits twice only with a workspace of its own per stream (cuBLAS, "Reproducibility")."""
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if self.cfg.deterministic else {}

    def _activate(self, index: int) -> None:
        super()._activate(index)
        # Convolutions (of state-space models) have a switch of their own, which torch leaves on.
        torch.backends.cudnn.allow_tf32 = False
