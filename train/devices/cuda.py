"""NVIDIA cards through torch.cuda. Written against the API; not run on a card in this version."""

from __future__ import annotations

import torch

from configs.errors import DeviceError
from train.devices.base import Availability, Device


class CudaDevice(Device):
    """One card per process, collectives by NCCL."""

    name = "cuda"
    torch_type = "cuda"
    backend = "nccl"
    deepspeed_accelerator = "cuda"
    visible_devices_variable = "CUDA_VISIBLE_DEVICES"

    def availability(self) -> Availability:
        """Needs a CUDA build of torch and a card that the driver shows."""
        if torch.version.cuda is None:
            return Availability(
                False, f"torch {torch.__version__} is built without CUDA; install a CUDA build of the same version"
            )
        if not torch.cuda.is_available():
            return Availability(False, "no card is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES")
        return Availability(True, ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))

    def count(self) -> int:
        """Visible cards."""
        return torch.cuda.device_count()

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 from Ampere on."""
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return (torch.bfloat16, torch.float32)
        return (torch.float32,)

    def peak_memory_bytes(self) -> int:
        """Largest amount that torch's allocator has reserved."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    def rng_state(self) -> torch.Tensor:
        """The card's generator."""
        return torch.cuda.get_rng_state(self.torch_device)

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Puts the card's generator back."""
        torch.cuda.set_rng_state(state, self.torch_device)

    def synchronize(self) -> None:
        """Waits for the card."""
        torch.cuda.synchronize(self.torch_device)

    def environment(self) -> dict[str, str]:
        """CuBLAS is deterministic only with a fixed workspace."""
        return {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if self.cfg.deterministic else {}

    def _activate(self, local_rank: int) -> None:
        if local_rank >= self.count():
            raise DeviceError(
                "nproc",
                f"process {local_rank} has no card: {self.count()} visible",
                remedy="lower nproc or widen CUDA_VISIBLE_DEVICES",
            )
        torch.cuda.set_device(local_rank)
