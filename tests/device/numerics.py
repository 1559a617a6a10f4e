"""Arithmetic, generators and collectives of a device against the host's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from tests.device.board import SKIPPED, Result, checked
from train.devices.base import Device
from train.engine.base import World
from train.ops.agreement import disagreement
from train.ops.kernel import REFERENCES, Needs
from train.ops.trials import trials

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Largest error of a product of 512 terms relative to its norm. Reduced-precision fp32 (10 bits) is off by 3e-4."""
OPS_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""The same of an op, which is several products in a row."""
NEEDS = Needs(
    heads=8,
    kv_heads=2,
    head_dim=64,
    hidden=512,
    intermediate=1408,
    epsilon=1e-6,
    sliding_window=None,
    dropout=0.0,
    rotary_factor=1.0,
)


def dtypes_of(device: Device) -> list[torch.dtype]:
    """Working formats to try: those at full speed, and fp32."""
    return list(dict.fromkeys([torch.float32, *device.fast_dtypes()]))


def numerics(device: Device) -> Iterator[Result]:
    """Products, ops and generators, on this process's own device."""
    for dtype in dtypes_of(device):
        name = str(dtype).removeprefix("torch.")
        yield checked(f"matmul {name}", lambda dtype=dtype: _matmul(device, dtype))
        for op in REFERENCES:
            yield checked(f"{op} {name}", lambda op=op, dtype=dtype: _reference(device, op, dtype))
            if op in device.kernels(dtype):
                yield checked(f"{op} {name}, own kernel", lambda op=op, dtype=dtype: _kernel(device, op, dtype))
    yield checked("generator", lambda: _generator(device))


def _matmul(device: Device, dtype: torch.dtype) -> tuple[bool, str]:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((256, 512), (512, 384)))
    error = _error(a.to(device.torch_device) @ b.to(device.torch_device), a.double() @ b.double())
    return error <= TOLERANCE[dtype], f"off by {error:.1e} of the host's fp64, allowed {TOLERANCE[dtype]:.0e}"


def _reference(device: Device, op: str, dtype: torch.dtype) -> tuple[bool, str]:
    worst = 0.0
    for trial in trials(op, NEEDS):
        rounded = {key: value.to(dtype) for key, value in trial.inputs.items()}
        exact = trial.call(REFERENCES[op], {key: value.double() for key, value in rounded.items()})
        found = trial.call(REFERENCES[op], {key: value.to(device.torch_device) for key, value in rounded.items()})
        worst = max(worst, _error(found, exact))
    return worst <= OPS_TOLERANCE[dtype], f"off by {worst:.1e} of the host's fp64, allowed {OPS_TOLERANCE[dtype]:.0e}"


def _kernel(device: Device, op: str, dtype: torch.dtype) -> tuple[bool, str]:
    kernel = device.kernels(dtype)[op]
    if unmet := kernel.unmet(NEEDS):
        return True, f"not used: {unmet}"
    found = disagreement(op, kernel, NEEDS, dtype, device.torch_device)
    return found is None, found or "values, gradients and masks agree with plain torch"


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.cpu().double() - exact).norm() / exact.norm())


def _generator(device: Device) -> tuple[bool, str]:
    def draws() -> torch.Tensor:
        return torch.rand(1000, device=device.torch_device)

    device.seed(7)
    first = draws()
    device.seed(7)
    again, state = draws(), device.rng_state()
    if state is None:  # the host's own generator
        return bool(first.equal(again)), "the same seed draws the same numbers"
    second = draws()
    device.set_rng_state(state)
    ok = first.equal(again) and second.equal(draws()) and not first.equal(second)
    return bool(ok), "the same seed and the same state draw the same numbers"


def collectives(device: Device, world: World) -> Iterator[Result]:
    """What the engines call, on small whole numbers, of which every sum is exact. Called on all ranks."""
    if world.size == 1:
        yield Result("collectives", SKIPPED, "one process: they need two devices or more")
        return
    for dtype in dtypes_of(device):
        for name, check in COLLECTIVES.items():
            ok = check(device, world, dtype)
            bad = int(world.all_reduce_sum([float(not ok)])[0])
            title = f"{name} {str(dtype).removeprefix('torch.')}"
            yield checked(title, lambda bad=bad: (bad == 0, f"{device.backend}, wrong on {bad} of {world.size} ranks"))


def _mine(device: Device, world: World, dtype: torch.dtype, count: int) -> torch.Tensor:
    return torch.arange(count, device=device.torch_device).to(dtype) + world.rank


def _all_reduce(device: Device, world: World, dtype: torch.dtype) -> bool:
    values = _mine(device, world, dtype, 8)
    dist.all_reduce(values)
    return _is(values, [world.size * i + sum(range(world.size)) for i in range(8)])


def _all_gather(device: Device, world: World, dtype: torch.dtype) -> bool:
    out = torch.empty(4 * world.size, dtype=dtype, device=device.torch_device)
    dist.all_gather_into_tensor(out, _mine(device, world, dtype, 4))
    return _is(out, [i + rank for rank in range(world.size) for i in range(4)])


def _reduce_scatter(device: Device, world: World, dtype: torch.dtype) -> bool:
    out = torch.empty(2, dtype=dtype, device=device.torch_device)
    dist.reduce_scatter_tensor(out, _mine(device, world, dtype, 2 * world.size))
    return _is(out, [world.size * (2 * world.rank + i) + sum(range(world.size)) for i in range(2)])


def _broadcast(device: Device, world: World, dtype: torch.dtype) -> bool:
    values = _mine(device, world, dtype, 4)
    dist.broadcast(values, src=world.size - 1)
    return _is(values, [i + world.size - 1 for i in range(4)])


def _is(found: torch.Tensor, expected: list[int]) -> bool:
    return found.cpu().tolist() == expected


COLLECTIVES: dict[str, Callable[[Device, World, torch.dtype], bool]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "broadcast": _broadcast,
}
