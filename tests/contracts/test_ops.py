"""Every op of `train/ops`: the reference against its formula, the device's version against the reference, and what the
agreement check must refuse.

`test_on_the_stand_in` runs this file once more, and `tests/unit/test_ops_model.py`, behind the real torch_npu.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.unit.ops_kit import EXTENDED, NEEDS, ON_NPU, device_with, operators  # noqa: F401 - a fixture
from train.devices.ascend_kernels import KERNELS
from train.ops.agreement import disagreement
from train.ops.kernel import REFERENCES
from train.ops.packed_attention import attend_to_each_sample
from train.ops.rms_norm import rms_norm
from train.ops.rotary import rotary
from train.ops.swiglu import swiglu
from train.ops.trials import trials

DTYPES = [torch.float32, torch.bfloat16]
DEVICE = device_with().torch_device


def by_hand_attention(q, k, v, lengths, *, scaling, dropout, sliding_window):
    """One output after the other, by the definition."""
    out = torch.zeros_like(q)
    for b, row in enumerate(lengths):
        begin = 0
        for length in row:
            for h in range(q.shape[1]):
                shared = h // (q.shape[1] // k.shape[1])
                for t in range(begin, begin + length):
                    first = begin if sliding_window is None else max(begin, t - sliding_window + 1)
                    weights = torch.softmax(scaling * k[b, shared, first : t + 1] @ q[b, h, t], dim=0)
                    out[b, h, t] = weights @ v[b, shared, first : t + 1]
            begin += length
    return out.transpose(1, 2)


def by_hand_rms_norm(x, weight, epsilon):
    return x / ((x**2).sum(-1, keepdim=True) / x.shape[-1] + epsilon) ** 0.5 * weight


def by_hand_rotary(x, cos, sin):
    """Each pair (x_i, x_{i + d/2}) is a complex number that is turned."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos[..., :half], sin[..., :half])
    return torch.cat((turned.real, turned.imag), -1)


def by_hand_swiglu(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


BY_HAND = {
    "attention": (attend_to_each_sample, by_hand_attention),
    "rms_norm": (rms_norm, by_hand_rms_norm),
    "rotary": (rotary, by_hand_rotary),
    "swiglu": (swiglu, by_hand_swiglu),
}


def small_case(op, window):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    if op == "attention":
        options = {"scaling": 0.4, "dropout": 0.0, "sliding_window": window}
        return [normal(2, 4, 7, 6), normal(2, 2, 7, 6), normal(2, 2, 7, 6)], [((4, 1, 2), (7,))], options
    if op == "rms_norm":
        return [normal(2, 3, 8), normal(8)], [0.3], {}
    if op == "rotary":
        angles = torch.linspace(0, 9, 20, dtype=torch.float64).view(1, 1, 5, 4).repeat(1, 1, 1, 2)
        return [normal(2, 3, 5, 8)], [angles.cos(), angles.sin()], {}
    return [normal(2, 3, 8), normal(2, 3, 8)], [], {}


@pytest.mark.parametrize(
    ("op", "window"), [("attention", None), ("attention", 2), ("rms_norm", None), ("rotary", None), ("swiglu", None)]
)
def test_the_reference_is_the_formula_in_values_and_gradients(op, window):
    assert set(BY_HAND) == set(REFERENCES) and REFERENCES[op] is BY_HAND[op][0]
    inputs, rest, options = small_case(op, window)
    results = []
    for version in BY_HAND[op]:
        out = version(*inputs, *rest, **options)
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for ours, by_hand in zip(*results, strict=True):
        # RMSNorm goes through fp32 only where it is wider than the input: all of this is fp64.
        torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [NEEDS, EXTENDED], ids=["plain", "window and dropout"])
@pytest.mark.parametrize("op", KERNELS)
def test_the_devices_version_agrees_with_the_reference(op, needs, dtype, operators):  # noqa: F811
    assert disagreement(op, KERNELS[op], needs, dtype, DEVICE) is None
    assert operators[op] >= len(list(trials(op, needs))) and set(operators) == {op}


def test_more_samples_than_one_call_takes_go_in_several(operators):  # noqa: F811
    lengths = (tuple([1, 2] * 1025),)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, n, 3 * 1025, 8, generator=draw).to(DEVICE) for n in (2, 1, 1))
    options = {"scaling": 0.3, "dropout": 0.0, "sliding_window": None}
    out = KERNELS["attention"](query, key, value, lengths, **options)
    assert operators["attention"] == 3
    torch.testing.assert_close(out, attend_to_each_sample(query, key, value, lengths, **options), rtol=1e-5, atol=1e-5)


# --- what the check must refuse ---------------------------------------------------------------------------------


def dense(sees, q, k, v, lengths, *, scaling, dropout, sliding_window, keep=None):
    """Attention over whole rows, where `sees(same sample, distance, window)` says what a query looks at."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    sample = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    places = torch.arange(q.shape[2])
    seen = sees(sample[:, :, None] == sample[:, None, :], places[:, None] - places[None, :], sliding_window)
    scores = (q.float() @ k.float().mT * scaling).masked_fill(~seen[:, None].to(q.device), float("-inf"))
    weights = F.dropout(scores.softmax(-1), dropout if keep is None else keep)
    return (weights @ v.float()).transpose(1, 2).to(q.dtype)


def right(same, back, window):
    return same & (back >= 0) & (back < (window or 1 << 30))


def dense_with(sees):
    return lambda *args, **options: dense(sees, *args, **options)


class WrongGradient(torch.autograd.Function):
    """Values right, gradients 3 % too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 1.03 * gradient


class FaintGradient(torch.autograd.Function):
    """Values right, gradients right within every tolerance, but a trace of another sample's in them."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 1e-8 * gradient.sum(dim=2, keepdim=True)


def faint_gradient(q, k, *rest, **options):
    return attend_to_each_sample(q, FaintGradient.apply(k), *rest, **options)


def dropout_drawn_twice(*args, **options):
    """What comes out is one draw, what is differentiated another."""
    shown, differentiated = (attend_to_each_sample(*args, **options) for _ in range(2))
    return differentiated + (shown - differentiated).detach()


def wrong_gradient(op, position):
    def version(*args, **options):
        args = list(args)
        args[position] = WrongGradient.apply(args[position])
        return REFERENCES[op](*args, **options)

    return version


def swapped_heads(q, k, v, lengths, **options):
    order = torch.arange(q.shape[1], device=q.device) % k.shape[1]
    return attend_to_each_sample(q, k[:, order], v[:, order], lengths, **options)


def faint_leak(q, k, v, lengths, **options):
    """Below every tolerance of rounding, and yet another sample's."""
    return attend_to_each_sample(q, k, v, lengths, **options) + 1e-7 * v.detach()[:, :1, :1].transpose(1, 2)


def raises(*args, **options):
    raise RuntimeError("call aclnnFlashAttentionVarLenScore failed\nmore")


PLANTED = {
    "mask of the other polarity": ("attention", dense_with(lambda s, b, w: s & (b <= 0)), NEEDS, "values are off"),
    "no mask": ("attention", dense_with(lambda s, b, w: s), NEEDS, "values are off"),
    "leak between samples": (
        "attention",
        dense_with(lambda s, b, w: (s | True) & (b >= 0)),
        NEEDS,
        "samples of 300.*values are off",
    ),
    "faint leak": ("attention", faint_leak, NEEDS, "tokens of the sample before reach outputs"),
    "mask ends after 2048": ("attention", dense_with(lambda s, b, w: right(s, b, 2048)), NEEDS, "2100.*values are off"),
    "no window": ("attention", dense_with(lambda s, b, w: right(s, b, None)), EXTENDED, "window.*values are off"),
    "window one short": ("attention", dense_with(lambda s, b, w: right(s, b, w and w - 1)), EXTENDED, "window.*off"),
    "heads in another order": ("attention", swapped_heads, NEEDS, "values are off"),
    "scaling ignored": (
        "attention",
        lambda q, *rest, scaling, **o: attend_to_each_sample(q, *rest, scaling=q.shape[-1] ** -0.5, **o),
        NEEDS,
        "values are off",
    ),
    "dropout the wrong way round": (
        "attention",
        lambda *a, dropout, **o: dense(right, *a, dropout=dropout, keep=dropout and 1 - dropout, **o),
        EXTENDED,
        "dropout 0.2: outputs vary",
    ),
    "no dropout": ("attention", lambda *a, dropout, **o: dense(right, *a, dropout=0.0, **o), EXTENDED, "dropout 0.2"),
    "gradient of the query": ("attention", wrong_gradient("attention", 0), NEEDS, "gradients of query are off"),
    "gradient of the value": ("attention", wrong_gradient("attention", 2), NEEDS, "gradients of value are off"),
    "faint leak in gradients": ("attention", faint_gradient, NEEDS, "get gradients of key from outputs"),
    "dropout drawn twice": ("attention", dropout_drawn_twice, EXTENDED, "backward pass drops other weights"),
    "attention raises": ("attention", raises, NEEDS, "raised RuntimeError: call aclnn.*failed$"),
    "tokens before heads": (
        "attention",
        lambda *a, **o: dense(right, *a, **o).mT,
        NEEDS,
        "values are .*not",
    ),
    "off by epsilon": ("rms_norm", lambda x, w, e: rms_norm(x, w, 1e-6), NEEDS, "values are off"),
    "epsilon outside": (
        "rms_norm",
        lambda x, w, e: w * (x / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + e)).to(x.dtype),
        NEEDS,
        "values are off",
    ),
    "one plus weight": ("rms_norm", lambda x, w, e: rms_norm(x, 1 + w, e), NEEDS, "values are off"),
    "gradient of the weight": ("rms_norm", wrong_gradient("rms_norm", 1), NEEDS, "gradients of weight are off"),
    "pairs next to each other": (
        "rotary",
        lambda x, c, s: x * c + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * s,
        NEEDS,
        "values are off",
    ),
    "turned backwards": ("rotary", lambda x, c, s: rotary(x, c, -s), NEEDS, "values are off"),
    "halves exchanged": ("swiglu", lambda g, u: swiglu(u, g), NEEDS, "values are off"),
    "another activation": ("swiglu", lambda g, u: F.gelu(g) * u, NEEDS, "values are off"),
    "result in fp32": ("swiglu", lambda g, u: swiglu(g.double(), u.double()), NEEDS, "values are torch.float64"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_version_with_a_fault_is_refused(fault):
    op, version, needs, message = PLANTED[fault]
    if ON_NPU:
        pytest.skip("faults are planted on the CPU")
    torch.manual_seed(0)  # dropout draws
    found = disagreement(op, version, needs, torch.float32, DEVICE)
    assert found is not None and re.search(message, found), found


@pytest.mark.parametrize(
    "fault", ["leak between samples", "no mask", "window one short", "off by epsilon", "no dropout"]
)
def test_faults_show_through_the_rounding_of_bf16(fault):
    if ON_NPU:
        pytest.skip("faults are planted on the CPU")
    op, version, needs, _ = PLANTED[fault]
    assert disagreement(op, version, needs, torch.bfloat16, DEVICE)


def test_what_is_right_is_not_refused():
    """The check tells faults from rounding: the dense version rounds at other places than the reference."""
    if not ON_NPU:
        for dtype in DTYPES:
            assert disagreement("attention", dense_with(right), EXTENDED, dtype, DEVICE) is None


def test_nothing_of_the_check_stays_in_memory(operators):  # noqa: F811
    """But the one mask that later calls use as well."""
    alive = []

    def watched(*args, **options):
        alive.extend(weakref.ref(x) for x in args if isinstance(x, torch.Tensor))
        return KERNELS["attention"](*args, **options)

    assert disagreement("attention", watched, EXTENDED, torch.float32, DEVICE) is None
    gc.collect()
    assert alive and all(ref() is None for ref in alive)


@pytest.mark.skipif(ON_NPU, reason="this is the stand-in")
def test_on_the_stand_in(standin):
    """This file and the models', with the real torch_npu, on tensors of a pretended NPU."""
    root = Path(__file__).parents[2]
    files = ["tests/contracts/test_ops.py", "tests/unit/test_ops_model.py"]
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-k", "not formula", *files]
    environment = standin.environment() | {"CROSSTUNE_TEST_DEVICE": "ascend"}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 20, done.stdout[-4000:] + done.stderr[-2000:]
