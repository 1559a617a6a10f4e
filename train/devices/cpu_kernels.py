"""The ops of `train/ops` on a CPU that multiplies bf16: fewer passes over memory, and products of few different shapes.

There oneDNN makes new code for each new shape of a product, in 1 to 10 ms, and keeps it (up to a few MiB). torch's own
SDPA in bf16 does so for each length of sample, and for each block in its backward pass; samples of some ten to some
hundred tokens, of which instructions are made, then take longer than all the layer's other products. Here lengths are
rounded up: what is behind a sample's end, a causal mask keeps out of it. Norms and rotary embeddings wait for memory:
they pass over it in pieces that a core's cache holds, and keep less for the backward pass.

Measured in docs/performance.md. In fp32 the reference is as fast, and runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from train.ops.kernel import Kernel, Needs
from train.ops.packed_attention import Lengths, attend_to_each_sample
from train.ops.rms_norm import rms_norm as reference

STEP = 32
"""Lengths of samples are rounded up to a multiple of it."""
SHORT = 384
"""Up to so many tokens the weights of a sample's attention are written down (2 bytes a head and pair of tokens)."""
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
    """`train.ops.packed_attention.Attend`: short samples by plain products, long ones by SDPA, in rounded lengths."""
    assert dropout == 0, "see `_attention_unmet`"
    rows = []
    for row, sizes in enumerate(lengths):
        split = (torch.split(x[row], list(sizes), dim=1) for x in (query_BHTD, key_BKTD, value_BKTD))
        outs = [_sample(q, k, v, scaling, sliding_window) for q, k, v in zip(*split, strict=True)]
        rows.append(torch.cat(outs, dim=1))
    return torch.stack(rows).transpose(1, 2).contiguous()


def _sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None) -> torch.Tensor:
    """One sample: ``[h x t x d]`` and twice ``[k x t x d]``."""
    tokens = q.shape[1]
    more = -tokens % STEP
    q, k, v = (F.pad(x, (0, 0, 0, more)) if more else x for x in (q, k, v))
    if tokens <= SHORT:
        out: torch.Tensor = _ShortAttention.apply(q, k, v, scaling, window)  # type: ignore[no-untyped-call]
    else:
        row = ((tokens + more,),)
        whole = attend_to_each_sample(
            q[None], k[None], v[None], row, scaling=scaling, dropout=0.0, sliding_window=window
        )
        out = whole[0].transpose(0, 1)
    return out[:, :tokens]


class _ShortAttention(torch.autograd.Function):
    """Softmax attention by four products, of the heads that share a key together."""

    @staticmethod
    def forward(
        ctx: Any, q_HTD: torch.Tensor, k_KTD: torch.Tensor, v_KTD: torch.Tensor, scaling: float, window: int | None
    ) -> torch.Tensor:
        shared, tokens, _ = k_KTD.shape
        q = q_HTD.reshape(shared, -1, q_HTD.shape[-1])
        scores = _wide_product(q, k_KTD.transpose(1, 2))
        scores.view(shared, -1, tokens, tokens).mul_(scaling).add_(_mask(tokens, window))
        weights = torch.softmax(scores, -1).to(q.dtype)
        ctx.save_for_backward(q, k_KTD, v_KTD, weights)
        ctx.scaling = scaling
        return torch.bmm(weights, v_KTD).view_as(q_HTD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_HTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        grad = grad_HTD.reshape(q.shape)
        v_grad = torch.bmm(weights.transpose(1, 2), grad)
        of_weights = _wide_product(grad, v.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_weights, weights.float(), -1, torch.float32)
        of_scores = of_scores.mul_(ctx.scaling).to(q.dtype)
        q_grad = torch.bmm(of_scores, k)
        return q_grad.view_as(grad_HTD), torch.bmm(of_scores.transpose(1, 2), q), v_grad, None, None


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


_masks: dict[tuple[int, int | None], torch.Tensor] = {}


def _mask(tokens: int, window: int | None) -> torch.Tensor:
    """``[t x t]``: what is added to scores; a few MiB for all lengths that come here."""
    if (tokens, window) not in _masks:
        at = torch.arange(tokens, device="cpu")
        back = at[:, None] - at[None, :]
        seen = (back >= 0) if window is None else (back >= 0) & (back < window)
        with torch.inference_mode(False):
            _masks[tokens, window] = torch.zeros(tokens, tokens, device="cpu").masked_fill_(~seen, float("-inf"))
    return _masks[tokens, window]


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


def _all_met(needs: Needs) -> None:
    """Any sizes are taken."""


KERNELS: Mapping[str, Kernel] = MappingProxyType(
    {
        "attention": Kernel(attention, _attention_unmet),
        "rms_norm": Kernel(rms_norm, _all_met),
        "rotary": Kernel(rotary, _all_met),
    }
)
"""By the names of `train.ops.kernel.REFERENCES`."""
