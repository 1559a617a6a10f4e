"""The stand-in's fused operators compute what Huawei documents, and refuse what a card refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.nn import functional

from launchers.doctor.standin.inside import fused_attention, fused_operators

TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def on_a2(monkeypatch):
    """The functions work on any tensor; only the question for the chip needs the device."""
    for module in (fused_attention, fused_operators):
        monkeypatch.setattr(module, "on_fused_chip", lambda name: None)


def heads(batch=2, heads=4, tokens=6, width=8, seed=0):
    return torch.randn(batch, heads, tokens, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def attend(q, k, v, layout="BNSD", **options):
    options = {"head_num": 4, "scale": 0.5} | options
    return fused_attention.npu_fusion_attention(q, k, v, input_layout=layout, **options)


def same(got, expected, inputs):
    """Values, and gradients of a weighted sum."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    ours = torch.autograd.grad((got * weight).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs, retain_graph=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "BNSD": lambda x: x,
    "BSND": lambda x: x.transpose(1, 2),
    "BSH": lambda x: x.transpose(1, 2).flatten(2),
    "SBH": lambda x: x.transpose(1, 2).flatten(2).transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_attention_in_every_layout_with_shared_heads(layout):
    q, k, v = heads(), heads(heads=2, seed=1), heads(heads=2, seed=2)
    put = LAYOUTS[layout]
    got, top, total, *_ = attend(put(q), put(k), put(v), layout, atten_mask=TRIANGLE, sparse_mode=2)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    same(got, put(expected), (q, k, v))
    assert top.shape == total.shape == (2, 4, 6, 8)
    scores = (q[0, 0] @ k[0, 0].T * 0.5).masked_fill(TRIANGLE[:6, :6], float("-inf"))
    torch.testing.assert_close(top[0, 0, :, 0] + total[0, 0, :, 0].log(), scores.logsumexp(-1))


def test_packed_samples_see_only_themselves():
    q, k, v = heads(1, 4, 9), heads(1, 2, 9, seed=1), heads(1, 2, 9, seed=2)
    ends = [2, 2, 9]  # the second sample is empty
    packed = [x[0].transpose(0, 1) for x in (q, k, v)]
    got, top, *_ = attend(
        *packed, "TND", actual_seq_qlen=ends, actual_seq_kvlen=ends, atten_mask=TRIANGLE, sparse_mode=3
    )
    parts = [
        functional.scaled_dot_product_attention(
            q[:, :, s], k[:, :, s], v[:, :, s], is_causal=True, scale=0.5, enable_gqa=True
        )
        for s in (slice(0, 2), slice(2, 9))
    ]
    same(got, torch.cat(parts, 2)[0].transpose(0, 1), (q, k, v))
    assert top.shape == (9, 4, 8)


def test_samples_left_out_at_the_end_are_zero():
    q = heads(1, 4, 5)[0].transpose(0, 1)
    got = attend(q, q, q, "TND", actual_seq_qlen=[3, 0], actual_seq_kvlen=[3, 0])[0]
    assert not got[3:].any() and got[:3].all()


@pytest.mark.parametrize(
    ("mode", "rows", "columns", "before", "behind", "visible"),
    [
        (2, 3, 5, 0, 0, "10000 11000 11100"),
        (3, 3, 5, 0, 0, "11100 11110 11111"),
        (4, 3, 5, 1, 0, "01100 00110 00011"),
        (4, 4, 4, 1, 1, "1100 1110 0111 0011"),
        (4, 3, 5, 9, -1, "11000 11100 11110"),
    ],
)
def test_which_scores_count(mode, rows, columns, before, behind, visible):
    q, k = heads(1, 1, rows), heads(1, 1, columns, seed=1)
    options = {"sparse_mode": mode, "pre_tockens": before, "next_tockens": behind}
    got = attend(q, k, k, head_num=1, atten_mask=TRIANGLE.to(torch.uint8), **options)[0]
    mask = torch.tensor([[sign == "1" for sign in row] for row in visible.split()])
    same(got, functional.scaled_dot_product_attention(q, k, k, attn_mask=mask, scale=0.5), (q, k))


def test_a_given_mask_hides_where_it_is_true():
    q = heads()
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[..., 0] = False
    expected = functional.scaled_dot_product_attention(q, q, q, attn_mask=~mask, scale=0.5)
    for mode in (0, 1):
        same(attend(q, q, q, atten_mask=mask, sparse_mode=mode)[0], expected, (q,))
    everything = functional.scaled_dot_product_attention(q, q, q, scale=0.5)
    same(attend(q, q, q, pre_tockens=1, next_tockens=0)[0], everything, (q,))


def test_dropout_keeps_the_share_and_scale():
    torch.manual_seed(0)
    q = heads(1, 4, 64)
    got = attend(q, q, torch.ones_like(q), keep_prob=0.75)[0]
    assert 0.9 < got.mean() < 1.1 and got.std() > 0.01


FAULTS = {
    "keep_prob": ({"keep_prob": 0.0}, "keep_prob is 0.0"),
    "layout": ({"layout": "BNDS"}, "input_layout is 'BNDS'"),
    "a mode beyond": ({"sparse_mode": 6}, "sparse_mode 6"),
    "causal without mask": ({"sparse_mode": 3}, "needs atten_mask"),
    "mask of the scores' size": ({"sparse_mode": 2, "atten_mask": TRIANGLE[:6, :6]}, "with atten_mask"),
    "mask of the other polarity": ({"sparse_mode": 3, "atten_mask": ~TRIANGLE}, "True above the diagonal"),
    "float mask": ({"atten_mask": torch.zeros(6, 6)}, "not bool or uint8"),
    "mask of another length": ({"atten_mask": TRIANGLE[:6, :7]}, "not one of"),
    "hidden row": ({"atten_mask": torch.ones(6, 6, dtype=torch.bool)}, "look at nothing"),
    "window against mask": ({"atten_mask": TRIANGLE[:6, :6], "pre_tockens": 2}, "leave out"),
    "heads": ({"head_num": 2}, "head_num is 2"),
    "ends without TND": ({"actual_seq_qlen": [6], "actual_seq_kvlen": [6]}, "not TND"),
    "pse": ({"pse": torch.zeros(2, 4, 6, 6)}, "not reproduced"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_attention_refuses(fault):
    options, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=message):
        attend(heads(), heads(), heads(), **options)


@pytest.mark.parametrize(
    ("q_ends", "kv_ends", "message"),
    [
        (None, None, "TND needs"),
        ([4, 9], [9], "of one length"),
        ([4, 8], [4, 9], "actual_seq_qlen"),
        ([4, 5], [4, 5], "rising ends"),  # lengths in place of ends
        ([6, 4, 9], [6, 4, 9], "rising ends"),
    ],
)
def test_packed_attention_refuses_wrong_ends(q_ends, kv_ends, message):
    q = heads(1, 4, 9)[0].transpose(0, 1)
    with pytest.raises(RuntimeError, match=message):
        attend(q, q, q, "TND", actual_seq_qlen=q_ends, actual_seq_kvlen=kv_ends)


def test_attention_refuses_dtypes_and_head_sizes():
    q = heads()
    with pytest.raises(RuntimeError, match="one of float16"):
        attend(q, q.bfloat16(), q)
    with pytest.raises(RuntimeError, match="one of float16"):
        attend(q.double(), q.double(), q.double())
    with pytest.raises(RuntimeError, match="head sizes"):
        attend(q, q, torch.cat((q, q), -1))


def test_rms_norm():
    x, gamma = heads(), (torch.arange(8) / 7.0).requires_grad_()
    got, rstd = fused_operators.npu_rms_norm(x, gamma, epsilon=1e-3)
    same(got, functional.rms_norm(x, (8,), gamma, 1e-3), (x, gamma))
    assert rstd.shape == (2, 4, 6, 1) and rstd.dtype == torch.float32
    with pytest.raises(RuntimeError, match="one of float16"):
        fused_operators.npu_rms_norm(x.bfloat16(), gamma)
    with pytest.raises(RuntimeError, match="not the end"):
        fused_operators.npu_rms_norm(x, gamma[:1])


def test_rotary_against_complex_numbers():
    x = heads()
    angle = torch.outer(torch.arange(6.0), 1 / 10 ** torch.arange(4.0))
    turn = torch.polar(torch.ones_like(angle), angle)
    for mode, pairs, spread in (
        ("half", torch.complex(x[..., :4], x[..., 4:]), lambda a: torch.cat((a, a), -1)),
        ("interleave", torch.view_as_complex(x.unflatten(-1, (4, 2))), lambda a: a.repeat_interleave(2, -1)),
    ):
        turned = pairs * turn
        parts = (turned.real, turned.imag)
        expected = torch.cat(parts, -1) if mode == "half" else torch.stack(parts, -1).flatten(-2)
        r1, r2 = (spread(part)[None, None] for part in (angle.cos(), angle.sin()))
        same(fused_operators.npu_rotary_mul(x, r1, r2, mode), expected, (x,))


def test_rotary_refuses():
    x = heads()
    good = torch.ones(1, 1, 6, 8)
    for fault, (a, r1, options) in {
        "must have 4": (x, good[0], {}),
        "does not fit": (x, torch.ones(1, 4, 6, 8), {}),
        "one of float16": (x, good.double(), {}),
        "rotary_mode is": (x, good, {"rotary_mode": "quarter"}),
        "head size": (x[..., :7], good[..., :7], {}),
    }.items():
        with pytest.raises(RuntimeError, match=fault):
            fused_operators.npu_rotary_mul(a, r1, r1, **options)


def test_swiglu():
    x = heads()
    gate, up = x.chunk(2, 1)
    same(fused_operators.npu_swiglu(x, dim=1), functional.silu(gate) * up, (x,))
    for fault, (value, dim) in {
        "odd": (x[..., :7], -1),
        "contiguous": (x.transpose(1, 2), -1),
        "dim 4": (x, 4),
    }.items():
        with pytest.raises(RuntimeError, match=fault):
            fused_operators.npu_swiglu(value, dim)


THROUGH_THE_DISPATCHER = """
import json, torch, torch_npu
x = torch.randn(1, 2, 4, 8, device="npu", requires_grad=True)
half = torch.ones(1, 1, 4, 8, device="npu")
mask = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
out = torch_npu.npu_fusion_attention(x, x, x, head_num=2, input_layout="BNSD", atten_mask=mask, sparse_mode=3)[0]
out = torch_npu.npu_swiglu(torch_npu.npu_rotary_mul(torch_npu.npu_rms_norm(out, half[0, 0, 0])[0], half, half))
out.sum().backward()
found = {"device": out.device.type, "grad": bool(x.grad.abs().sum() > 0), "refused": []}
with torch.inference_mode():
    found["inference"] = list(torch.ops.npu.npu_swiglu(torch.ones(2, 4, device="npu")).shape)
for wrong in ({"pre_tokens": 1}, {"atten_mask": torch.zeros(2048, 2048, dtype=torch.bool).triu(1), "sparse_mode": 3}):
    try:
        torch_npu.npu_fusion_attention(x, x, x, head_num=2, input_layout="BNSD", **wrong)
    except (RuntimeError, TypeError) as error:
        found["refused"].append(type(error).__name__)
print(json.dumps(found))
"""


def test_torch_npu_calls_them_with_its_own_schema(standin):
    done = standin.run([sys.executable, "-c", THROUGH_THE_DISPATCHER])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"device": "npu", "grad": True, "refused": ["RuntimeError", "RuntimeError"], "inference": [2, 2]}
