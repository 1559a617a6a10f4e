"""The ops of `train/ops` on a CPU that multiplies bf16: fewer passes over memory, and products of few different shapes.

There oneDNN makes new code for each new shape of a product, in 1 to 10 ms, and keeps it (up to a few MiB). torch's own
SDPA in bf16 does so for each length of sample, and for each block in its backward pass; samples of some ten to some
hundred tokens, of which instructions are made, then take longer than all the layer's other products. Here lengths are
rounded up: what is behind a sample's end, a causal mask keeps out of it. And attention's gradients come by products of
whole matrices, from weights that are computed again, which takes less time than SDPA's many small blocks.

Norms, rotary embeddings and SwiGLU wait for memory: norms pass over it in pieces that a core's cache holds, rotary
embeddings need no rotated copy, and SwiGLU keeps for the backward pass only what it takes.

Measured in docs/performance.md. In fp32 the reference is as fast, and runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from train.ops.kernel import Kernel, Needs
from train.ops.packed_attention import Lengths, attend_to_each_sample
from train.ops.rms_norm import rms_norm as reference
from train.ops.roomy import roomy_empty

STEP = 32
"""Lengths of samples are rounded up to a multiple of it."""
BY_PRODUCTS = 640
"""Up to so many tokens gradients come by plain products; beyond, SDPA's own backward pass is faster: it skips what
the mask hides."""
SCORES = 2**22
"""Of a sample, that are there together: 16 MiB in fp32, twice. Heads that share a key are not parted, whatever they
need."""
PIECE = 2**17
"""Elements of a piece of a norm: in fp32 half a MiB, of which a few fit into a core's own cache."""


def attention(
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    lengths: Lengths,
    *,
    scaling: float,
    dropout: float,
    sliding_window: int | None,
) -> torch.Tensor:
    """`train.ops.packed_attention.Attend`, in rounded lengths."""
    assert dropout == 0, "see `_attention_unmet`"
    if max(map(max, lengths)) <= BY_PRODUCTS:
        return _attend(query_BHTD, key_BKTD, value_BKTD, lengths, scaling, sliding_window)
    rows = []
    for row, sizes in enumerate(lengths):
        split = (torch.split(x[row : row + 1], list(sizes), dim=2) for x in (query_BHTD, key_BKTD, value_BKTD))
        outs = [_sample(q, k, v, scaling, sliding_window) for q, k, v in zip(*split, strict=True)]
        rows.append(torch.cat(outs, dim=1))
    return torch.cat(rows)


def _sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    """One sample, ``[1 x h x t x d]``."""
    tokens = q.shape[2]
    if tokens <= BY_PRODUCTS:
        return _attend(q, k, v, ((tokens,),), scaling, window)
    q, k, v = (_rounded(x) for x in (q, k, v))
    row = ((q.shape[2],),)
    return attend_to_each_sample(q, k, v, row, scaling=scaling, dropout=0.0, sliding_window=window)[:, :tokens]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """``[... x t x d]`` with zeros behind, up to a multiple of `STEP`."""
    more = -x.shape[-2] % STEP
    return F.pad(x, (0, 0, 0, more)) if more else x


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, scaling: float, window: int | None
) -> torch.Tensor:
    out: torch.Tensor = _Attention.apply(query, key, value, lengths, scaling, window)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Of all samples in one piece: what it takes is all that it keeps. SDPA forward, plain products for gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: torch.Tensor,
        key_BKTD: torch.Tensor,
        value_BKTD: torch.Tensor,
        lengths: Lengths,
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        batch, heads, tokens, _ = query_BHTD.shape
        assert [sum(sizes) for sizes in lengths] == [tokens] * batch, "all of each row is some sample's"
        out_BTHD = query_BHTD.new_empty(batch, tokens, heads, value_BKTD.shape[-1])
        for its in _places(lengths):
            q, k, v = (_rounded(x[its]) for x in (query_BHTD, key_BKTD, value_BKTD))
            out = out_BTHD.transpose(1, 2)[its]
            out.copy_(_values(q, k, v, scaling, window)[:, : out.shape[1]])
        ctx.save_for_backward(query_BHTD, key_BKTD, value_BKTD)
        ctx.asked = (lengths, scaling, window)
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = ctx.saved_tensors
        lengths, scaling, window = ctx.asked
        grads = [torch.empty_like(x) for x in inputs]
        for its in _places(lengths):
            q, k, v, grad = (_rounded(x[its]) for x in (*inputs, grad_BTHD.transpose(1, 2)))
            for whole, found in zip(grads, _gradients(q, k, v, grad, scaling, window), strict=True):
                part = whole[its]
                part.copy_(found[:, : part.shape[1]])
        return (*grads, None, None, None)


def _places(lengths: Lengths) -> list[tuple[int, slice, slice]]:
    """Of the samples, in ``[b x h x t x d]``."""
    return [
        (row, slice(None), slice(end - size, end))
        for row, sizes in enumerate(lengths)
        for end, size in zip(accumulate(sizes), sizes, strict=True)
    ]


def _values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    """What the queries of one sample, ``[h x t x d]``, find."""
    if q.shape[-1] != v.shape[-1]:  # SDPA would multiply in fp32
        q_KND = q.reshape(len(k), -1, q.shape[-1])
        some = _together(q_KND, k, v)
        found = [torch.bmm(_weights(q_, k_, scaling, window).to(q.dtype), v_) for q_, k_, v_ in some]
        return torch.cat(found).view(*q.shape[:2], -1)
    mask = None if window is None or window >= q.shape[1] else _mask(q.shape[1], window, q.device).to(q.dtype)
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=len(q) > len(k)
    )[0]


def _gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, scaling: float, window: int | None
) -> list[torch.Tensor]:
    """With respect to q, k and v of one sample; heads that share a key are one matrix."""
    q_KND, grad_KND = (x.reshape(len(k), -1, x.shape[-1]) for x in (q, grad))
    some = _together(q_KND, k, v, grad_KND)
    found = [_of_heads(q_, k_, v_, grad_, scaling, window) for q_, k_, v_, grad_ in some]
    q_grad, k_grad, v_grad = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return [q_grad.view(q.shape), k_grad, v_grad]


def _of_heads(
    q_KND: torch.Tensor,
    k_KTD: torch.Tensor,
    v_KTD: torch.Tensor,
    grad_KND: torch.Tensor,
    scaling: float,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weights = _weights(q_KND, k_KTD, scaling, window)
    v_grad = torch.bmm(weights.to(q_KND.dtype).transpose(1, 2), grad_KND)
    of_weights = _wide_product(grad_KND, v_KTD.transpose(1, 2))
    torch._softmax_backward_data(of_weights, weights, -1, torch.float32, grad_input=of_weights)
    del weights
    of_scores = of_weights.mul_(scaling).to(q_KND.dtype)
    return torch.bmm(of_scores, k_KTD), torch.bmm(of_scores.transpose(1, 2), q_KND), v_grad


def _together(q_KND: torch.Tensor, *others: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Heads of keys with what goes with each, as many as `SCORES` allows."""
    heads = max(1, SCORES // (q_KND.shape[1] * others[0].shape[1]))
    return zip(*(torch.split(x, heads) for x in (q_KND, *others)), strict=True)


def _weights(q_KND: torch.Tensor, k_KTD: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    """``[k x n x t]`` in fp32: of the queries of all heads that share a key, one head after the other."""
    shared, tokens, _ = k_KTD.shape
    scores = _wide_product(q_KND, k_KTD.transpose(1, 2))
    by_head = scores.view(shared, -1, tokens, tokens)
    torch.add(_mask(tokens, window, scores.device), by_head, alpha=scaling, out=by_head)
    return torch.softmax(scores, -1, out=scores)


def _wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of bf16 numbers in fp32, as SDPA has it inside.

    Keys that have much in common (a bias of Qwen2's) give large scores, of which bf16 would keep the common part: a
    softmax of rounded scores was 30 % off there, and Qwen2-7B's perplexity rose from 7.13 to 8.00
    (huggingface/transformers#33317). The inputs are exact in fp32, so that oneDNN may multiply them as bf16.
    """
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at run time
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return torch.bmm(left.float(), right.float())
    finally:
        matmul.fp32_precision = before


_masks: dict[tuple[int, int | None, torch.device], torch.Tensor] = {}


def _mask(tokens: int, window: int | None, device: torch.device) -> torch.Tensor:
    """``[t x t]``: what is added to scores; 12 MiB for all lengths that come here, and again for a window.

    The device is the CPU, but for those who only ask what memory all this takes.
    """
    key = (tokens, None if window is None or window >= tokens else window, device)
    if key not in _masks:
        at = torch.arange(tokens, device=device)
        back = at[:, None] - at[None, :]
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        with torch.inference_mode(False):
            _masks[key] = torch.zeros(tokens, tokens, device=device).masked_fill_(~seen, float("-inf"))
    return _masks[key]


def _attention_unmet(needs: Needs) -> str | None:
    """Heads of any size and number are taken."""
    return f"attention dropout {needs.dropout:g}, which is torch's to draw" if needs.dropout else None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """`train.ops.rms_norm.rms_norm`, of which only x and its inverse root mean squares are kept."""
    if weight.dtype != x.dtype:  # gives the wider one
        return reference(x, weight, epsilon)
    out: torch.Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """Piece by piece, a row of x in one of them; sums in fp32, rounded where the reference rounds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        width = x.shape[-1]
        out = x.new_empty(x.shape)
        x_NC = x.flatten(0, -2) if x.dim() > 1 else x[None]
        out_NC, inverse_N1 = out.view(x_NC.shape), x_NC.new_empty(len(x_NC), 1, dtype=torch.float32)
        for piece in _pieces(x_NC):
            wide = x_NC[piece].to(torch.float32, copy=True)  # written into below
            squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
            inverse_N1[piece] = squares.div_(width).add_(epsilon).rsqrt_()
            out_NC[piece] = wide.mul_(inverse_N1[piece])
            out_NC[piece].mul_(weight)
        ctx.save_for_backward(x_NC, inverse_N1, weight)
        return out  # no view: others may write into it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NC, inverse_N1, weight = ctx.saved_tensors
        grad_NC, width = grad.reshape(x_NC.shape), x_NC.shape[-1]
        x_grad, wide_weight = torch.empty_like(x_NC), weight.float()
        weight_grad = torch.zeros_like(wide_weight) if ctx.needs_input_grad[1] else None
        for piece in _pieces(x_NC):
            inverse = inverse_N1[piece]
            normal = x_NC[piece].to(torch.float32, copy=True).mul_(inverse)
            of_normal = grad_NC[piece].to(torch.float32, copy=True)
            if weight_grad is not None:
                weight_grad += (of_normal * normal).sum(0)
            of_normal.mul_(wide_weight)
            along = torch.linalg.vecdot(of_normal, normal).div_(-width)
            x_grad[piece] = of_normal.addcmul_(normal, along[:, None]).mul_(inverse)
        return x_grad.view(grad.shape), None if weight_grad is None else weight_grad.to(weight.dtype), None


def _pieces(x_NC: torch.Tensor) -> list[slice]:
    """Of the rows of a matrix, some `PIECE` elements each."""
    rows = max(1, PIECE // x_NC.shape[1])
    return [slice(first, first + rows) for first in range(0, len(x_NC), rows)]


def rotary(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`train.ops.rotary.rotary` without the rotated copy; it rounds twice where the reference rounds three times."""
    out: torch.Tensor = _Rotary.apply(x_BHTD, cos, sin)  # type: ignore[no-untyped-call]
    return out


class _Rotary(torch.autograd.Function):
    """A turn, and for gradients the turn back."""

    @staticmethod
    def forward(ctx: Any, x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BHTD, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_BHTD, cos, sin, -1), None, None


def _turned(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sense: int) -> torch.Tensor:
    half = x_BHTD.shape[-1] // 2
    out = x_BHTD * cos
    out[..., :half].addcmul_(x_BHTD[..., half:], sin[..., :half], value=-sense)
    out[..., half:].addcmul_(x_BHTD[..., :half], sin[..., half:], value=sense)
    return out


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`train.ops.swiglu.swiglu`, of which only what it takes is kept."""
    out: torch.Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    """Activates again for the gradients. Nothing is done in place: torch takes twice as long for that in bf16."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        active = roomy_empty(gate, *gate.shape)
        return torch.ops.aten.silu.out(gate, out=active) * up  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate) * grad


def _all_met(needs: Needs) -> None:
    """Any sizes are taken."""


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention": Kernel(attention, _attention_unmet),
        "rms_norm": Kernel(rms_norm, _all_met),
        "rotary": Kernel(rotary, _all_met),
        "swiglu": Kernel(swiglu, _all_met),
    }
)
"""By the names of `train.ops.kernel.REFERENCES`."""
