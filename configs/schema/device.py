"""The device group. Vendors' own settings stand here and in `train/devices/`, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from configs.errors import ConfigError


class KernelChoice(Enum):
    """Which version of an operation of `train/ops` runs."""

    auto = "auto"
    """The device's own where it has one and it agrees with the reference on this device; the log says so."""
    device = "device"
    """The device's own; stop where it has none, or it disagrees."""
    reference = "reference"
    """Plain torch operators."""


@dataclass
class DeviceConfig:
    """What every backend has."""

    _target_: str = MISSING
    """A subclass of ``train.devices.base.Device``."""
    threads: int = 0
    """CPU threads per process. 0: the cores of the machine divided by the processes on it."""
    deterministic: bool = True
    """Asks the backend for deterministic kernels where it has them."""
    attention_kernel: KernelChoice = KernelChoice.auto
    """Attention of rows that hold several samples."""
    rms_norm_kernel: KernelChoice = KernelChoice.auto
    rotary_kernel: KernelChoice = KernelChoice.auto
    swiglu_kernel: KernelChoice = KernelChoice.auto
    peak_tflops: float = 0.0
    """Dense bf16 peak of one card in TFLOP/s, for the model FLOP/s utilisation. 0: as known for the card."""

    def kernel_choice(self, op: str) -> KernelChoice:
        """Of an op, by its name in `train/ops/kernel.py`."""
        return KernelChoice(getattr(self, f"{op}_kernel"))

    def __post_init__(self) -> None:
        if self.threads < 0:
            raise ConfigError("device.threads", str(self.threads), allowed="0 (automatic) or more")
        if self.peak_tflops < 0:
            raise ConfigError("device.peak_tflops", str(self.peak_tflops), allowed="0 (as known) or more")


ASCEND_RANGES = (
    # HCCL's and torch_npu's own bounds: train/devices/ascend_variables.py names the sources.
    ("connect_timeout_seconds", 120, 7200),
    ("execute_timeout_seconds", 0, 2**31 - 1),
    ("buffer_mib", 1, 2**31 - 1),
    ("base_port", 1024, 65520),
    ("task_queue", 0, 2),
    ("cpu_affinity", 0, 2),
)


@dataclass
class AscendConfig(DeviceConfig):
    """Run-time settings of CANN, HCCL and torch_npu. Null: the environment's value, else crosstune's default."""

    connect_timeout_seconds: int | None = None
    """HCCL_CONNECT_TIMEOUT: how long ranks wait for each other at the start. Default 600."""
    execute_timeout_seconds: int | None = None
    """HCCL_EXEC_TIMEOUT: how long a collective may wait; 0 for ever. Default 1836. Before the 910B, times of 68 s."""
    buffer_mib: int | None = None
    """HCCL_BUFFSIZE: each communicator takes twice that of device memory. Default 200."""
    interface: str | None = None
    """HCCL_SOCKET_IFNAME, and GLOO_SOCKET_IFNAME where it is not set: ``eth`` (prefix), ``=eth0``, ``^docker``."""
    base_port: int | None = None
    """HCCL_IF_BASE_PORT: first of the ports that HCCL listens on."""
    allocator: str | None = None
    """PYTORCH_NPU_ALLOC_CONF, such as ``expandable_segments:True``, which is the default."""
    task_queue: int | None = None
    """TASK_QUEUE_ENABLE: 0 none, 1 operators are queued, 2 and their preparation too. Default 2."""
    cpu_affinity: int | None = None
    """CPU_AFFINITY_CONF: 0 none, 1 and 2 bind each process to the cores near its NPU. Default 1."""
    launch_blocking: bool = False
    """ASCEND_LAUNCH_BLOCKING: each operator ends before the next begins, for debugging; no queue then."""
    jit_compile: bool = False
    """Compiles operators for each new shape; slow where shapes change, as they do here."""
    internal_format: bool = False
    """Lets torch_npu keep weights in the NPU's private layouts, which others cannot read."""
    known_variables: list[str] = field(default_factory=list)
    """Environment variables that your CANN knows and crosstune does not: they are not taken for misspelt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, low, high in ASCEND_RANGES:
            value = getattr(self, key)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"device.{key}", str(value), allowed=f"{low} to {high:,}, or null")
        for key in ("interface", "allocator"):
            if getattr(self, key) == "":
                raise ConfigError(f"device.{key}", "empty", allowed="a value, or null for what the environment says")
        if self.launch_blocking and self.task_queue:
            raise ConfigError(
                "device.task_queue",
                f"{self.task_queue}, but device.launch_blocking turns the queue off",
                remedy="device.task_queue=0, or leave one of them out",
            )
