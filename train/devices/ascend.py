"""Huawei Ascend NPUs through torch_npu. Written against the API; not run on a card in this version."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import torch

from configs.errors import DeviceError
from configs.schema.device import DeviceConfig
from train.devices.base import Availability, Device


class AscendDevice(Device):
    """One NPU per process, collectives by HCCL."""

    name = "ascend"
    torch_type = "npu"
    backend = "hccl"
    deepspeed_accelerator = "npu"
    visible_devices_variable = "ASCEND_RT_VISIBLE_DEVICES"

    def __init__(self, cfg: DeviceConfig) -> None:
        super().__init__(cfg)
        self._npu: ModuleType | None = None

    def _plugin(self) -> ModuleType:
        """`torch.npu`, which exists once torch_npu is imported. Imported here only, since it patches torch."""
        if self._npu is None:
            importlib.import_module("torch_npu")
            self._npu = getattr(torch, "npu")  # noqa: B009 - an attribute that the import adds
        return self._npu

    def availability(self) -> Availability:
        """Needs torch_npu, CANN's libraries and a visible NPU."""
        if importlib.util.find_spec("torch_npu") is None:
            return Availability(
                False, f"torch_npu is not installed; it must match torch {torch.__version__.split('+')[0]}"
            )
        try:
            npu = self._plugin()
        except (ImportError, OSError, RuntimeError) as error:
            return Availability(False, f"torch_npu does not load ({error}); source CANN's set_env.sh first")
        if not npu.is_available():
            return Availability(False, "no NPU is visible; see npu-smi info and ASCEND_RT_VISIBLE_DEVICES")
        return Availability(True, f"{npu.device_count()} NPUs")

    def count(self) -> int:
        """Visible NPUs."""
        return int(self._plugin().device_count())

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 on 910B and later; the plugin knows."""
        return (torch.bfloat16, torch.float32) if self._plugin().is_bf16_supported() else (torch.float32,)

    def peak_memory_bytes(self) -> int:
        """Largest amount that the allocator has reserved."""
        return int(self._plugin().max_memory_reserved(self.torch_device))

    def rng_state(self) -> torch.Tensor:
        """The NPU's generator."""
        state: torch.Tensor = self._plugin().get_rng_state(self.torch_device)
        return state

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Puts the NPU's generator back."""
        self._plugin().set_rng_state(state, self.torch_device)

    def synchronize(self) -> None:
        """Waits for the NPU."""
        self._plugin().synchronize()

    def environment(self) -> dict[str, str]:
        """Deterministic collectives; the rendezvous may take minutes on large clusters (seconds)."""
        env = {"HCCL_CONNECT_TIMEOUT": "600"}
        return env | {"HCCL_DETERMINISTIC": "true"} if self.cfg.deterministic else env

    def _activate(self, local_rank: int) -> None:
        if local_rank >= self.count():
            raise DeviceError(
                "nproc",
                f"process {local_rank} has no NPU: {self.count()} visible",
                remedy="lower nproc or widen ASCEND_RT_VISIBLE_DEVICES",
            )
        self._plugin().set_device(local_rank)
