"""Further accelerators, each described by a row of data. None of them was run by crosstune's makers.

The names are those by which DeepSpeed 0.19.8 (folder ``accelerator``) and accelerate 1.15.0 (``utils/imports.py``,
``state.py``, ``utils/random.py``) call the same plugins; a test compares them. A vendor whose accelerator is worth
more than a row writes a file like `ascend.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from configs.errors import DeviceError, first_line
from configs.schema.model import Precision
from train.devices.accelerator import AcceleratorDevice
from train.devices.base import Memory


@dataclass(frozen=True)
class Row:
    """What differs between accelerators. Functions are names in the runtime module; dots reach into its parts."""

    maker: str
    backend: str
    deepspeed: str | None
    """DeepSpeed's name of its class; None: it has none."""
    lister: str
    plugin: str | None = None
    """Package that adds ``torch.<type>``; None: stock torch has it."""
    runtime: str | None = None
    """Module of the functions where it is not ``torch.<type>``."""
    collectives: str | None = None
    """Package whose import adds the collective backend."""
    visible: str | None = None
    """Variable that hides devices."""
    bf16: str | bool = "is_bf16_supported"
    """Function that says whether bf16 works; or the answer."""
    several_processes: bool = True
    set_device: str | None = "set_device"
    seed: str = "manual_seed_all"
    rng_state: str = "get_rng_state"
    set_rng_state: str = "set_rng_state"
    used: str = "memory_allocated"
    peak: str = "max_memory_allocated"
    total: str = "get_device_properties"
    """Gives bytes, a (free, total) pair, a mapping with "Limit", or an object with ``total_memory``."""
    total_of_device: bool = True
    """Whether `total` takes the device's number."""


ROWS: dict[str, Row] = {
    "mlu": Row("Cambricon", "cncl", "mlu", "cnmon", plugin="torch_mlu", visible="MLU_VISIBLE_DEVICES"),
    "musa": Row(
        *("Moore Threads", "mccl", None, "mthreads-gmi"),
        plugin="torch_musa",
        visible="MUSA_VISIBLE_DEVICES",
        bf16=True,
        total="mem_get_info",
    ),
    "hpu": Row(
        *("Intel Gaudi", "hccl", "hpu", "hl-smi"),
        plugin="habana_frameworks.torch",
        runtime="habana_frameworks.torch.hpu",
        collectives="habana_frameworks.torch.distributed.hccl",
        visible="HABANA_VISIBLE_MODULES",
        bf16=True,
        seed="random.manual_seed_all",
        rng_state="random.get_rng_state",
        set_rng_state="random.set_rng_state",
        total="memory_stats",
    ),
    "sdaa": Row("Tecorigin", "tccl", "sdaa", "teco-smi", plugin="torch_sdaa", visible="SDAA_VISIBLE_DEVICES"),
    "supa": Row("Biren", "bccl", "supa", "brsmi", plugin="torch_supa", visible="SUPA_VISIBLE_DEVICES", bf16=True),
    "mps": Row(
        *("Apple", "gloo", "mps", "system_profiler SPDisplaysDataType"),
        bf16=False,  # depends on the system: see MpsDevice
        several_processes=False,
        set_device=None,
        seed="manual_seed",
        used="current_allocated_memory",
        peak="driver_allocated_memory",
        total="recommended_max_memory",
        total_of_device=False,
    ),
}


class TableDevice(AcceleratorDevice):
    """An accelerator as its row describes it."""

    row: Row

    def __init_subclass__(cls) -> None:
        """What the row says that others ask as attributes."""
        cls.row = row = ROWS[cls.name]
        cls.torch_type = cls.name
        cls.backend, cls.deepspeed_accelerator, cls.lister = row.backend, row.deepspeed, row.lister
        cls.plugin, cls.visible_devices_variable = row.plugin, row.visible
        cls.install_hint = f"it comes with {row.maker}'s software"
        cls.load_hint = f"it needs {row.maker}'s driver and libraries"
        cls.out_of_memory_texts = (f"{cls.name.upper()} out of memory", f"{cls.name.upper()} backend out of memory")

    @property
    def runtime(self) -> Any:
        """See `AcceleratorDevice.runtime`."""
        module = super().runtime
        return sys.modules[self.row.runtime] if self.row.runtime else module

    def _found(self) -> str:
        """The devices, and that nobody here has seen one."""
        return f"{super()._found()}; not run by crosstune's makers"

    def card_name(self, index: int) -> str:
        """Only the maker's: not every plugin tells the card's."""
        return f"{self.row.maker} {self.name}"

    def memory(self) -> Memory:
        """What torch's tensors hold: some plugins do not say what is reserved."""
        total = self._call(self.row.total, *([self.index] if self.row.total_of_device else []))
        return Memory(int(self._call(self.row.used)), int(self._call(self.row.peak)), _bytes(total))

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """As the row says, or the plugin."""
        works = self._call(self.row.bf16) if isinstance(self.row.bf16, str) else self.row.bf16
        return (torch.bfloat16, torch.float32) if works else (torch.float32,)

    def faults(self, nproc: int, precision: Precision) -> Iterator[DeviceError]:
        """See `Device.faults`."""
        missing = self._missing_collectives() if nproc > 1 else None
        if missing:
            yield DeviceError("nproc", f"{nproc} processes, but {missing}", remedy="nproc=1")
            nproc = 1  # what else is wrong
        yield from super().faults(nproc, precision)

    def _activate(self, index: int) -> None:
        missing = self._missing_collectives() if self.row.collectives else None
        if missing:
            raise DeviceError(f"device={self.name}", missing, remedy=self.load_hint)
        super()._activate(index)

    def _set_device(self, index: int) -> None:
        if self.row.set_device:
            self._call(self.row.set_device, index)

    def _missing_collectives(self) -> str | None:
        """Registers the backend with torch.distributed, where that takes an import; why there is none."""
        if not self.row.several_processes:
            return f"device={self.name} has no collectives"
        if self.row.collectives is None:
            return None
        try:
            importlib.import_module(self.row.collectives)
        except Exception as error:  # see `load_plugin`
            return f"{self.row.collectives} does not load ({type(error).__name__}: {first_line(error)})"
        return None

    def _seed_device(self, seed: int) -> None:
        self._call(self.row.seed, seed)

    def rng_state(self) -> torch.Tensor:
        """See `AcceleratorDevice.rng_state`."""
        state: torch.Tensor = self._call(self.row.rng_state)
        return state

    def set_rng_state(self, state: torch.Tensor) -> None:
        """See `AcceleratorDevice.set_rng_state`."""
        self._call(self.row.set_rng_state, state)

    def _call(self, name: str, *arguments: Any) -> Any:
        """Calls a function that the row names.

        Raises:
            DeviceError: this version of the plugin has no such function.
        """
        found = self.runtime
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            raise DeviceError(
                f"device={self.name}",
                f"{self.row.plugin or 'torch'} has no {name}, which crosstune expects of it without having seen it",
                remedy=f"mend the row '{self.name}' of train/devices/table.py, and tell crosstune's makers",
            )
        return found(*arguments)


def _bytes(total: Any) -> int:
    """Of whatever `Row.total` gives."""
    if isinstance(total, dict):
        return int(total["Limit"])
    if isinstance(total, tuple):
        return int(total[1])
    return int(getattr(total, "total_memory", total))


class MluDevice(TableDevice):
    """Cambricon MLU."""

    name = "mlu"


class MusaDevice(TableDevice):
    """Moore Threads GPUs; DeepSpeed has no class for them, so no ZeRO."""

    name = "musa"


class HpuDevice(TableDevice):
    """Intel Gaudi."""

    name = "hpu"


class SdaaDevice(TableDevice):
    """Tecorigin SDAA."""

    name = "sdaa"


class SupaDevice(TableDevice):
    """Biren SUPA."""

    name = "supa"


class MpsDevice(TableDevice):
    """The GPU of an Apple computer; one process."""

    name = "mps"

    def missing_build(self) -> str | None:
        """Needs torch for macOS."""
        if torch.backends.mps.is_built():
            return None
        return f"torch {torch.__version__} is built without MPS, which needs macOS on an Apple chip"

    def fast_dtypes(self) -> tuple[torch.dtype, ...]:
        """bf16 from macOS 14 on."""
        return (torch.bfloat16, torch.float32) if torch.backends.mps.is_macos_or_newer(14, 0) else (torch.float32,)
