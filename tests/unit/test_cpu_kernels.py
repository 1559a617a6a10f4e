"""The CPU's own ops: what the references compute, by products of few shapes and with less kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema.device import DeviceConfig
from tests.unit.ops_kit import NEEDS
from train.devices import cpu_kernels
from train.devices.cpu import CpuDevice
from train.ops.agreement import disagreement
from train.ops.packed_attention import attend_to_each_sample
from train.ops.rms_norm import rms_norm
from train.ops.swiglu import swiglu

CPU = torch.device("cpu")


@pytest.mark.parametrize(("by_products", "scores"), [(0, 2**22), (200, 2**22), (2**20, 1)])
@pytest.mark.parametrize(
    "needs",
    [
        replace(NEEDS, dropout=0.0),
        replace(NEEDS, heads=9, kv_heads=3, head_dim=64),
        replace(NEEDS, heads=4, kv_heads=4, head_dim=80),
        replace(NEEDS, sliding_window=512, dropout=0.0),
    ],
)
def test_short_and_long_samples_have_the_values_gradients_and_masks_of_the_reference(
    needs, by_products, scores, monkeypatch
):
    monkeypatch.setattr(cpu_kernels, "BY_PRODUCTS", by_products)
    monkeypatch.setattr(cpu_kernels, "SCORES", scores)
    kernel = cpu_kernels.KERNELS["attention"]
    assert kernel.unmet(needs) is None
    assert disagreement("attention", kernel, needs, torch.bfloat16, CPU) is None


@pytest.mark.parametrize("part", ["_values", "_gradients"])
def test_a_fault_in_it_is_found(part, monkeypatch):
    right = getattr(cpu_kernels, part)
    monkeypatch.setattr(cpu_kernels, part, lambda q, k, *others: right(q, k.roll(1, 1), *others))
    found = disagreement("attention", cpu_kernels.KERNELS["attention"], NEEDS, torch.bfloat16, CPU)
    assert found is not None and ("gradient" in found) == (part == "_gradients")


@pytest.mark.parametrize("piece", [1, 2**17])
@pytest.mark.parametrize("op", ["rms_norm", "rotary", "swiglu"])
def test_the_others_have_the_values_and_gradients_of_the_reference(op, piece, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "PIECE", piece)
    kernel = cpu_kernels.KERNELS[op]
    assert kernel.unmet(NEEDS) is None
    assert disagreement(op, kernel, NEEDS, torch.bfloat16, CPU) is None


def test_a_norm_leaves_its_input_alone_and_keeps_no_wide_copy():
    x = torch.randn(300, 64, dtype=torch.bfloat16)
    before, weight = x.clone(), torch.rand(64, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = cpu_kernels.rms_norm(x.requires_grad_(), weight, 1e-5)
    y.sum().backward()
    assert torch.equal(x.detach(), before)
    assert sum(t.nbytes for t in kept) == x.nbytes + 300 * 4 + weight.nbytes
    assert weight.grad is None


def test_a_gated_activation_keeps_what_it_takes_and_has_the_reference_to_the_bit():
    gate, up, grad = (torch.randn(7, 96, dtype=torch.bfloat16) for _ in range(3))
    found, kept = [], list[torch.Tensor]()
    for version in (cpu_kernels.swiglu, swiglu):
        mine = [x.clone().requires_grad_() for x in (gate, up)]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = version(*mine)
        found.append((out, *torch.autograd.grad(out, mine, grad)))
        if version is cpu_kernels.swiglu:
            assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in mine]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_norm_takes_what_the_reference_takes():
    """A norm in fp32 in a bf16 model, rows laid out otherwise, no rows; what comes out may be written into."""
    for x, weight in (
        (torch.randn(2, 3, 64), torch.rand(64)),
        (torch.randn(2, 3, 64).bfloat16(), torch.rand(64)),
        (torch.randn(3, 2, 64).bfloat16().transpose(0, 1), torch.rand(64).bfloat16()),
        (torch.randn(0, 64).bfloat16(), torch.rand(64).bfloat16()),
    ):
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, expected = cpu_kernels.rms_norm(mine, weight, 1e-5), rms_norm(theirs, weight, 1e-5)
        assert found.dtype == expected.dtype and torch.equal(mine, x)
        torch.testing.assert_close(found, expected, rtol=2**-6, atol=1e-6)
        found.mul_(2).sum().backward()
        expected.mul(2).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2**-5, atol=2**-6)


def test_large_scores_keep_what_tells_their_keys_apart():
    """In bf16 a score of 300 is one of 298 and 300: the products of queries and keys are kept in fp32."""
    q, k, v = (torch.randn(1, 2, 48, 32, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
    q, k, row = 10 * q, 10 * k, ((48,),)
    asked = {"scaling": 32**-0.5, "dropout": 0.0, "sliding_window": None}
    exact = attend_to_each_sample(q.double(), k.double(), v.double(), row, **asked)
    found = cpu_kernels.attention(q, k, v, row, **asked).double()
    assert (found - exact).norm() < 4e-3 * exact.norm()


@pytest.mark.parametrize("scores", [1, 2**22])
def test_keys_may_be_longer_than_values(scores, monkeypatch):
    """As in multi-head latent attention."""
    monkeypatch.setattr(cpu_kernels, "SCORES", scores)
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, h, 70, d, generator=draw).bfloat16() for h, d in ((4, 24), (2, 24), (2, 16))]
    rows, asked = ((70,), (33, 37)), {"scaling": 0.2, "dropout": 0.0, "sliding_window": None}
    found, expected = [], []
    for version, wide, results in ((cpu_kernels.attention, False, found), (attend_to_each_sample, True, expected)):
        mine = [(x.double() if wide else x).clone().requires_grad_() for x in inputs]
        out = version(*mine, rows, **asked)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        results += [out, *torch.autograd.grad((out * weights).sum(), mine)]
    for mine, exact in zip(found, expected, strict=True):
        assert (mine.double() - exact).norm() < 2**-7 * exact.norm()


def test_what_attention_takes_is_all_that_it_keeps():
    lengths = ((100, 60, 31), (64, 127))
    q = torch.randn(2, 191, 4, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
    k, v = (torch.randn(2, 191, 2, 16, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(2))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = cpu_kernels.attention(q, k, v, lengths, scaling=0.25, dropout=0.0, sliding_window=None)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in (q, k, v)]
    assert out.is_contiguous()


def test_masks_are_made_where_they_are_used():
    cpu_kernels._masks.clear()
    with torch.device("meta"):
        assert cpu_kernels._mask(32, None, CPU).device == CPU
    cpu_kernels._masks.clear()


def test_dropout_is_left_to_the_reference_and_fp32_too():
    assert "dropout 0.1" in (cpu_kernels.KERNELS["attention"].unmet(replace(NEEDS, dropout=0.1)) or "")
    assert CpuDevice(DeviceConfig()).kernels(torch.float32) == {}


class Shapes(TorchDispatchMode):
    """Those of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[object, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "bmm" in str(func) or "attention" in str(func):
            self.seen.add((str(func), *(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


def test_samples_of_many_lengths_ask_for_few_products():
    lengths = tuple(range(1, 500, 7))
    row = sum(lengths)
    counted = []
    for version in (cpu_kernels.attention, attend_to_each_sample):
        q = torch.randn(1, 4, row, 16, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.randn(1, 2, row, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        with Shapes() as shapes:
            version(q, k, v, (lengths,), scaling=0.25, dropout=0.0, sliding_window=None).sum().backward()
        counted.append(len(shapes.seen))
    assert counted[0] <= 16 * 6 < counted[1] <= 2 * len(lengths)
