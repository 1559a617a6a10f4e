"""What the tests of the ops share: a device with Ascend's kernels, on the CPU or where the stand-in pretends one."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from types import ModuleType

import pytest
import torch

from configs.schema.device import DeviceConfig, KernelChoice
from launchers.doctor.standin.inside import fused_attention, fused_operators
from train.devices.ascend_kernels import KERNELS, _causal_mask
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.ops import select
from train.ops.agreement import disagreement
from train.ops.kernel import Kernel, Needs

OPERATORS = {
    "attention": "npu_fusion_attention",
    "rms_norm": "npu_rms_norm",
    "rotary": "npu_rotary_mul",
    "swiglu": "npu_swiglu",
}
ON_NPU = os.environ.get("CROSSTUNE_TEST_DEVICE") == "ascend"
"""In a process of the stand-in the operators are behind the real torch_npu, and tensors lie on a pretended NPU."""

NEEDS = Needs(
    heads=6,
    kv_heads=2,
    head_dim=8,
    hidden=48,
    intermediate=64,
    epsilon=1e-5,
    sliding_window=None,
    dropout=0.0,
    rotary_factor=1.0,
)
EXTENDED = replace(NEEDS, sliding_window=512, dropout=0.2)


class DeviceWithKernels(CpuDevice):
    """The CPU with kernels of its own."""

    name = "ascend"

    def __init__(self, cfg: DeviceConfig, kernels: Mapping[str, Kernel] = KERNELS) -> None:
        super().__init__(cfg)
        self.own = kernels

    def kernels(self, dtype: torch.dtype) -> Mapping[str, Kernel]:
        return self.own

    @property
    def torch_device(self) -> torch.device:
        return torch.device("npu", 0) if ON_NPU else torch.device("cpu")


def device_with(kernels: Mapping[str, Kernel] = KERNELS, **choices: str) -> Device:
    """Such a device; `choices` are kernel switches without the ending: ``attention="device"``."""
    switches = {f"{op}_kernel": KernelChoice(choice) for op, choice in choices.items()}
    return DeviceWithKernels(DeviceConfig(**switches), kernels)


def kernel(run: Callable[..., torch.Tensor]) -> Kernel:
    """A version without limits."""
    return Kernel(run, lambda needs: None)


_compared = cache(disagreement)


@pytest.fixture(autouse=True)
def compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version is compared once for all models of the same sizes: the comparison has tests of its own."""
    monkeypatch.setattr(select, "disagreement", _compared)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts the calls of torch_npu's operators; on the CPU the stand-in's own functions are in their place."""
    calls: Counter[str] = Counter()
    if ON_NPU:
        import torch_npu

        plugin = torch_npu
    else:
        functions = {name: getattr(fused_operators, name, None) for name in OPERATORS.values()}
        functions["npu_fusion_attention"] = fused_attention.npu_fusion_attention
        plugin = ModuleType("torch_npu")
        vars(plugin).update(functions)
        monkeypatch.setitem(sys.modules, "torch_npu", plugin)
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where something imports it, takes this for an NPU
        for module in (fused_attention, fused_operators):
            monkeypatch.setattr(module, "on_fused_chip", lambda name: None)
    for op, name in OPERATORS.items():
        monkeypatch.setattr(plugin, name, _counting(calls, op, getattr(plugin, name)))
    yield calls
    _causal_mask.cache_clear()


def _counting(calls: Counter[str], op: str, operator: Callable[..., object]) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        calls[op] += 1
        return operator(*args, **kwargs)

    return call
