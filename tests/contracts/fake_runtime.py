"""A pretended runtime module of an accelerator, for backends whose plugin or card is not here.

Its functions work on the host and record their calls. Each call is bound to the signature that torch.cuda's function
of that name has, so that a call which no torch.cuda-like module takes fails here as it would there.
"""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from train.devices.accelerator import AcceleratorDevice
from train.devices.base import Device
from train.devices.table import ROWS

GIB = 2**30
KNOWN_TO_TORCH = ("cuda", "xpu", "mps", "hpu")
"""Types that ``torch.device`` takes without a plugin that registers them."""


class FakeRuntime(ModuleType):
    """Stands for torch.cuda and its likes: `cards` devices of 4 GiB, one generator."""

    def __init__(self, name: str, real: ModuleType | None = None, cards: int = 2) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls: list[str] = []
        self.cards, self.current, self.held, self.peak = cards, 0, 0, 0
        self.generator = torch.Generator()
        self.bf16, self.card = True, "Pretended Card"
        self.properties = SimpleNamespace(
            total_memory=4 * GIB,
            gcnArchName="gfx942:sramecc+:xnack-",
            has_bfloat16_conversions=True,
            has_subgroup_matrix_multiply_accumulate=True,
            gpu_eu_count=512,
            driver_version="1.6",
        )
        self.config = SimpleNamespace()
        self._real = real
        for known, function in self._functions().items():
            setattr(self, known, self._recorded(known, function))

    def __getattr__(self, name: str) -> Any:
        """What torch itself asks of the module that this one stands in front of."""
        real = self.__dict__.get("_real")
        if real is None:
            raise AttributeError(name)
        return getattr(real, name)

    def hold(self, size: int) -> None:
        """As if tensors of `size` bytes were made."""
        self.held += size
        self.peak = max(self.peak, self.held)

    def _functions(self) -> dict[str, Callable[..., Any]]:
        return {
            "is_available": lambda: self.cards > 0,
            "device_count": lambda: self.cards,
            "set_device": lambda device: setattr(self, "current", device),
            "synchronize": lambda *a: None,
            "get_device_name": lambda *a: self.card,
            "get_device_properties": lambda *a: self.properties,
            "memory_reserved": lambda *a: self.held,
            "max_memory_reserved": lambda *a: self.peak,
            "memory_allocated": lambda *a: self.held,
            "max_memory_allocated": lambda *a: self.peak,
            "current_allocated_memory": lambda: self.held,
            "driver_allocated_memory": lambda: self.peak,
            "recommended_max_memory": lambda: 4 * GIB,
            "mem_get_info": lambda *a: (4 * GIB - self.held, 4 * GIB),
            "memory_stats": lambda *a: {"Limit": 4 * GIB},
            "manual_seed": lambda seed: self.generator.manual_seed(seed) and None,
            "manual_seed_all": lambda seed: self.generator.manual_seed(seed) and None,
            "get_rng_state": lambda *a: self.generator.get_state(),
            "set_rng_state": lambda state, *a: self.generator.set_state(state) and None,
            "is_bf16_supported": lambda *a, **k: self.bf16,
            "set_compile_mode": lambda *, jit_compile: None,
            "_is_compiled": lambda: True,
        }

    def _recorded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        like = getattr(torch.cuda, name, None)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if inspect.isfunction(like):
                inspect.signature(like).bind(*arguments, **keywords)
            self.calls.append(name)
            return function(*arguments, **keywords)

        return call


def pretend(backend: type[Device], patch: pytest.MonkeyPatch, tmp_path: Any, cards: int = 2) -> FakeRuntime:
    """Makes `backend` find a plugin, where it needs one, and `cards` devices."""
    kind = backend.torch_type
    fake = FakeRuntime(f"torch.{kind}", getattr(torch, kind, None), cards)
    patch.setattr(torch, kind, fake, raising=False)
    patch.setattr(dist, "is_backend_available", lambda name: True)
    assert issubclass(backend, AcceleratorDevice)
    for name in _packages(backend):
        module = fake if name == f"habana_frameworks.torch.{kind}" else ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        patch.setitem(sys.modules, name, module)
    if backend.name == "hpu":
        fake.random = fake  # its generator's functions lie one level deeper
    if kind not in KNOWN_TO_TORCH:
        patch.setattr(backend, "torch_device", torch.device("cpu"))
    patch.setattr(torch.version, "cuda", "13.0" if backend.name == "cuda" else None)
    patch.setattr(torch.version, "hip", "7.2" if backend.name == "rocm" else None)
    patch.setattr(torch.backends.mps, "is_built", lambda: True)
    patch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: fake.bf16)
    patch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    if backend.visible_devices_variable:
        patch.delenv(backend.visible_devices_variable, raising=False)
    return fake


def _packages(backend: type[AcceleratorDevice]) -> list[str]:
    """The plugin's modules with the packages that they lie in."""
    row = ROWS.get(backend.name)
    wanted = [backend.plugin, row and row.runtime, row and row.collectives]
    names = [name for name in wanted if name]
    return sorted({".".join(name.split(".")[: n + 1]) for name in names for n in range(name.count(".") + 1)})
