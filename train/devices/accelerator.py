"""What torch.cuda, torch.xpu, torch.npu and their likes share: each is a module of the same functions.

Calls leave the device out wherever they can: they then act on the process's current one, which `activate` has set.
A backend's file holds only what differs.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from configs.errors import DeviceError, first_line
from configs.schema.model import Precision
from train.devices.base import Availability, Device, Memory
from train.devices.peaks import published_peak_flops
from train.versions import versions_of

HIDES_ALL = ("", "-1", "NoDevFiles")
"""Values of a visible-devices variable that leave no device."""


class AcceleratorDevice(Device):
    """One device per process, worked on through a module of functions like torch.cuda's."""

    plugin: str | None = None
    """Package whose import adds the device to torch; None: torch itself has it."""
    install_hint: str = ""
    """How to get `plugin`."""
    load_hint: str = ""
    """Why `plugin` mostly does not load."""
    unit = "card"
    lister: str
    """The vendor's command that lists the devices that the driver sees."""
    further_visible_variables: tuple[str, ...] = ()
    """Others that hide devices, too."""
    visible_entry = re.compile(r"\s*\d+\s*")
    """One entry of a visible-devices variable; entries are separated by commas."""

    @property
    def runtime(self) -> Any:
        """The module of functions: ``torch.<torch_type>``.

        Raises:
            DeviceError: its plugin does not load.
        """
        missing = self._missing_plugin()
        if missing:
            raise DeviceError(f"device={self.name}", missing)
        return getattr(torch, self.torch_type)

    # What is here.

    def availability(self) -> Availability:
        """Needs the plugin, or the right build of torch, and a visible device."""
        missing = self._missing_plugin() or self.missing_build()
        if missing:
            return Availability(False, missing)
        said: list[str] = []
        with warnings.catch_warnings(record=True) as heard:  # such as a driver that is too old
            warnings.simplefilter("always")
            try:
                if self.runtime.is_available():
                    return Availability(True, self._found())
            except Exception as error:  # some plugins raise where no device is; a broken one raises anything
                said.append(first_line(error) or type(error).__name__)
        said += [f"{variable}: {problem}" for variable, problem in self.visible_problems(counted=0)]
        said += [first_line(each.message) for each in heard[:1]]
        return Availability(False, f"no {self.unit} is visible; {'; '.join(said) or 'see ' + self.lister}")

    def _missing_plugin(self) -> str | None:
        """Why the plugin is not there."""
        if self.plugin is None:
            return None
        if not is_installed(self.plugin):
            return f"{self.plugin} is not installed; {self.install_hint}"
        fault = load_plugin(self.plugin, self.torch_type)
        return (
            f"{self.plugin} does not load ({fault}){'; ' + self.load_hint if self.load_hint else ''}" if fault else None
        )

    def missing_build(self) -> str | None:
        """Why this build of torch, or the process's state, does not do."""
        return None

    def _found(self) -> str:
        names = Counter(self.card_name(index) for index in range(self.count()))
        return ", ".join(f"{number} x {name}" for name, number in names.items())

    def card_name(self, index: int) -> str:
        """A device's name as its driver gives it."""
        return str(self.runtime.get_device_name(index))

    def count(self) -> int:
        """Visible devices."""
        return int(self.runtime.device_count())

    def versions(self) -> dict[str, str]:
        """See `Device.versions`."""
        return versions_of([self.plugin.partition(".")[0]]) if self.plugin else {}

    def memory(self) -> Memory:
        """What torch's allocator has reserved: what other processes cannot have."""
        return Memory(
            used_bytes=int(self.runtime.memory_reserved()),
            peak_bytes=int(self.runtime.max_memory_reserved()),
            total_bytes=int(self.runtime.get_device_properties(self.index).total_memory),
        )

    def _published_peak_flops(self, dtype: torch.dtype) -> float | None:
        return published_peak_flops(self.card_name(self.index), dtype)

    # What was asked for.

    def faults(self, nproc: int, precision: Precision) -> Iterator[DeviceError]:
        """See `Device.faults`."""
        counted = self.count()
        problems = list(self.visible_problems(counted))
        for variable, problem in problems:
            yield DeviceError(variable, problem, remedy=f"unset it, or name what {self.lister} shows")
        if nproc > counted and not problems and not self._shown_alone(counted):
            widen = "".join(f" or widen {variable}" for variable in self._narrowed()[:1])
            yield DeviceError(
                "nproc",
                f"{nproc} processes, but {counted} {self.name} devices are visible",
                allowed=f"1 to {counted}; each process takes a device of its own",
                remedy=f"lower nproc{widen}",
            )
        yield from super().faults(nproc, precision)

    def visible_problems(self, counted: int) -> Iterator[tuple[str, str]]:
        """What is wrong with the variables that hide devices, as (variable, problem).

        A variable that names what is not there is not refused by the runtimes: they take what comes before it.

        Args:
            counted: devices that the runtime found.
        """
        narrowest: tuple[str, list[str]] | None = None
        for variable in self._narrowed():
            value = os.environ[variable]
            if value.strip() in HIDES_ALL:
                yield variable, f"'{value}' hides every {self.unit}"
                return
            entries = value.split(",")
            strange = [entry for entry in entries if not self.visible_entry.fullmatch(entry)]
            twice = [entry for entry, times in Counter(entry.strip() for entry in entries).items() if times > 1]
            if strange:
                yield variable, f"'{value}': '{strange[0]}' names no {self.unit}, and what follows it is not read"
            elif twice:
                yield variable, f"'{value}' names {twice[0]} twice"
            elif narrowest is None or len(self._named(entries)) < len(narrowest[1]):
                narrowest = variable, self._named(entries)
        if narrowest is not None and len(narrowest[1]) > counted:
            variable, names = narrowest
            value = os.environ[variable]
            yield variable, f"'{value}' names {_counted(names, self.unit)}, but the runtime finds {counted} of them"

    def _narrowed(self) -> list[str]:
        """The variables that hide devices here."""
        first = [self.visible_devices_variable] if self.visible_devices_variable else []
        return [variable for variable in (*first, *self.further_visible_variables) if variable in os.environ]

    def _named(self, entries: list[str]) -> list[str]:
        """The devices that the entries of a variable stand for."""
        return [entry.strip() for entry in entries]

    # Use.

    def index_of(self, local_rank: int) -> int:
        """The process's only device where a launcher shows it no other."""
        return 0 if self._shown_alone(self.count()) else local_rank

    def _shown_alone(self, counted: int) -> bool:
        """Whether the one device that is visible is meant for this process alone, whatever its rank.

        Slurm and MPI can show each process a device of its own. The processes of torchrun see what torchrun sees.
        """
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
        return counted == 1 and several and "TORCHELASTIC_RUN_ID" not in os.environ

    def _activate(self, index: int) -> None:
        counted = self.count()
        if index >= counted:
            raise DeviceError(
                "nproc",
                f"process {index} of this machine has no {self.unit}: {counted} visible to it",
                remedy=f"lower nproc, or let every process see all of them ({self.visible_devices_variable})",
            )
        self._set_device(index)
        # fp32 means fp32 wherever it was asked for: torch's own default for matrices, said aloud. Formats with fewer
        # bits under the name fp32 (TF32 and its likes) would make losses differ between devices by 1e-3, not 1e-6.
        torch.set_float32_matmul_precision("highest")

    def _set_device(self, index: int) -> None:
        self.runtime.set_device(index)

    def seed(self, seed: int) -> None:
        """Seeds the device's generator by name, too: torch seeds only those types that it knows."""
        super().seed(seed)
        self._seed_device(seed)

    def _seed_device(self, seed: int) -> None:
        self.runtime.manual_seed_all(seed)

    def rng_state(self) -> torch.Tensor:
        """The device's generator."""
        state: torch.Tensor = self.runtime.get_rng_state()
        return state

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Puts the device's generator back."""
        self.runtime.set_rng_state(state)

    def synchronize(self) -> None:
        """Waits for the device."""
        self.runtime.synchronize()

    def variables(self) -> dict[str, str]:
        """See `Device.variables`."""
        further = {name: os.environ[name] for name in self.further_visible_variables if name in os.environ}
        return super().variables() | further


def is_installed(plugin: str) -> bool:
    """Whether a package can be found; imports nothing, of a dotted name only what it lies in."""
    if plugin in UNLOADABLE:
        return True
    root, _, inner = plugin.partition(".")
    if importlib.util.find_spec(root) is None:
        return False
    with suppress(ImportError):  # a package of that name, but not the one
        return not inner or importlib.util.find_spec(plugin) is not None
    return False


UNLOADABLE: dict[str, str] = {}
"""Plugins that did not load in this process, and why. They are not tried again."""


def load_plugin(plugin: str, torch_type: str) -> str | None:
    """Imports a plugin.

    Returns:
        Why it does not load; None if it did. What it left behind is taken away, so that other devices work.

    Raises:
        DeviceError: it failed so late that torch is changed for good, for other devices, too.
    """
    if plugin in UNLOADABLE:
        return UNLOADABLE[plugin]
    had, registered = hasattr(torch, torch_type), torch._C._get_privateuse1_backend_name()
    try:
        importlib.import_module(plugin)
    except Exception as error:  # whatever a vendor's package raises is a reason to go without it, never a crash
        fault = f"{type(error).__name__}: {first_line(error)}"
        if torch._C._get_privateuse1_backend_name() != registered:
            raise DeviceError(
                plugin,
                f"failed while it loaded, and has changed torch already ({fault})",
                remedy="mend or uninstall it; device=cpu, or another one by name, does not load it",
            ) from error
        root = plugin.partition(".")[0]
        for name in [name for name in sys.modules if name == root or name.startswith(f"{root}.")]:
            del sys.modules[name]
        # transformers, too, would import it wherever it is installed, and fail with it; None counts as not installed.
        sys.modules[root] = None  # type: ignore[assignment]  # what the import system documents
        if not had and hasattr(torch, torch_type):
            delattr(torch, torch_type)
        UNLOADABLE[plugin] = fault
    return UNLOADABLE.get(plugin)


def text_version(key: str, path: Path, pattern: str) -> dict[str, str]:
    """``{key: version}`` as the first group of `pattern` finds it in a file; empty where it does not."""
    try:
        found = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return {}
    return {key: found[1].strip()} if found else {}


def _counted(names: list[str], unit: str) -> str:
    return f"{len(names)} {unit}{'' if len(names) == 1 else 's'}"
