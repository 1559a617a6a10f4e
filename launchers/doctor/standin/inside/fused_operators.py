"""What torch_npu's fused operators compute, in plain aten, with the checks that the real ones make.

They take the place of the kernels behind ``torch.ops.npu.npu_rms_norm``, ``npu_rotary_mul``, ``npu_swiglu`` and
``npu_fusion_attention`` (``torch_npu.npu_x`` is the same object), so the dispatcher goes on checking the real schema:
names, types and defaults of the arguments are those of the installed wheel. Written from Huawei's documentation alone
(the wheel's ``_op_plugin_docs.py`` and ``op_plugin/meta``; op-plugin's ``docs/context``; ops-transformer's
``aclnnFlashAttentionScore.md`` and ``aclnnFlashAttentionVarLenScore.md``), not from crosstune's kernels, whose examiner
it is.

Two kinds of refusal, both RuntimeError as from the real operator: *documented* ones, which a card makes too, and
*strict* ones, where the documents say that a card computes something wrong or undefined without a word.

Not covered: a card's rounding and speed; position shift (pse), prefix, sink, given dropout masks, rotation matrices and
the sparse modes 5 to 8, which are refused by name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from launchers.doctor.standin.inside.fused_attention import npu_fusion_attention
from launchers.doctor.standin.inside.fused_checks import on_fused_chip, require, same_dtype, shape

CALLS: Counter[str] = Counter()
"""Calls of each operator in this process, by its full name such as ``npu::npu_swiglu``."""

DTYPES: defaultdict[str, set[str]] = defaultdict(set)
"""Of their tensors."""

_library: torch.library.Library | None = None


def install(uncounted: Callable[[bool], None]) -> None:
    """Puts the operators into the dispatcher; torch_npu must have been imported. Calling it again does nothing.

    Args:
        uncounted: called with True before an operator and False after it. What it is made of here is one kernel on a
            card, and not the program's; its backward pass is plain aten, and shows as such.
    """
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("npu", "IMPL")  # type: ignore[no-untyped-call]
    for operator in (npu_rms_norm, npu_rotary_mul, npu_swiglu, npu_fusion_attention):
        # Above autograd the aten calls inside are recorded, so that no backward has to be written; below it are the
        # calls of inference mode.
        for key in ("AutogradPrivateUse1", "PrivateUse1"):
            _library.impl(operator.__name__, _counted(operator, uncounted), key)  # type: ignore[no-untyped-call]


def _counted(operator: Callable[..., Any], uncounted: Callable[[bool], None]) -> Callable[..., Any]:
    name = f"npu::{operator.__name__}"

    @wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        DTYPES[name].update(str(x.dtype).removeprefix("torch.") for x in tensors)
        uncounted(True)
        try:
            return operator(*args, **kwargs)
        finally:
            uncounted(False)

    return call


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``input * gamma / sqrt(mean(input ** 2) + epsilon)``, computed in fp32 and rounded once.

    Args:
        input: [..., *gamma.shape], 1 to 8 dimensions, fp16, bf16 or fp32.
        gamma: the last dimensions of `input`, in its dtype.
        epsilon: against a division by zero.

    Returns:
        the normed input, and 1 / rms in fp32, its normed dimensions of size 1.
    """
    name = "npu_rms_norm"
    same_dtype(name, input=input, gamma=gamma)
    require(1 <= input.dim() <= 8, name, f"input has {input.dim()} dimensions, not 1 to 8")
    fits = 1 <= gamma.dim() <= input.dim() and input.shape[input.dim() - gamma.dim() :] == gamma.shape
    require(fits, name, f"gamma {shape(gamma)} is not the end of input's shape {shape(input)}")
    x = input.float()
    rstd = torch.rsqrt(x.pow(2).mean(list(range(-gamma.dim(), 0)), keepdim=True) + epsilon)
    return (x * rstd * gamma.float()).to(input.dtype), rstd.detach()


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """``input * r1 + rotated(input) * r2``: r1 is the cosine, r2 the sine.

    Args:
        input: [B, N, S, D], [B, S, N, D] or [S, B, N, D]; D even and under 896, B and N under 1000.
        r1: as input, with 1 for N, and 1 or B for B; in mode interleave 1 for both.
        r2: of r1's shape.
        rotary_mode: ``half`` (GPT-NeoX, Llama) or ``interleave`` (GPT-J).
        rotate: a rotation matrix; not reproduced here.
    """
    name = "npu_rotary_mul"
    require(rotary_mode in ("half", "interleave"), name, f"rotary_mode is '{rotary_mode}', not half or interleave")
    require(rotate is None, name, "rotate: not reproduced by the stand-in")
    same_dtype(name, input=input, r1=r1, r2=r2)
    require(input.dim() == r1.dim() == r2.dim() == 4, name, "input, r1 and r2 must have 4 dimensions")
    require(r1.shape == r2.shape, name, f"r1 {shape(r1)} and r2 {shape(r2)} differ")
    require(_rotary_fits(input, r1, rotary_mode), name, f"r1 {shape(r1)} does not fit input {shape(input)}")
    width = input.shape[-1]
    require(width % 2 == 0 and width < 896, name, f"head size {width}: it must be even and under 896")
    if rotary_mode == "half":
        first, second = input.chunk(2, -1)
        rotated = torch.cat((-second, first), -1)
    else:
        rotated = torch.stack((-input[..., 1::2], input[..., ::2]), -1).flatten(-2)
    return (input.float() * r1.float() + rotated.float() * r2.float()).to(input.dtype)


def _rotary_fits(input: Tensor, r1: Tensor, mode: str) -> bool:
    """Whether r1 is one of the documented forms: S given, N 1, B 1 or given; or, in mode half, all of input."""
    if r1.shape[-1] != input.shape[-1]:
        return False
    if mode == "half" and r1.shape == input.shape:
        return True
    # Which dimension is B, N or S is not said by the layout of a plain tensor: one of the three must fit.
    for batch, heads, tokens in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        batches = (1,) if mode == "interleave" else (1, input.shape[batch])
        if (
            r1.shape[heads] == 1
            and r1.shape[batch] in batches
            and r1.shape[tokens] == input.shape[tokens]
            and max(input.shape[batch], input.shape[heads]) < 1000
        ):
            return True
    return False


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """``silu(first half) * second half`` along `dim`, computed in fp32 and rounded once.

    Args:
        input: 1 to 8 dimensions, contiguous, not empty, even along `dim`; fp16, bf16 or fp32.
        dim: dimension to cut in two.
    """
    name = "npu_swiglu"
    on_fused_chip(name)
    same_dtype(name, input=input)
    require(1 <= input.dim() <= 8, name, f"input has {input.dim()} dimensions, not 1 to 8")
    require(-input.dim() <= dim < input.dim(), name, f"dim {dim} of a tensor with {input.dim()} dimensions")
    require(input.shape[dim] % 2 == 0, name, f"size {input.shape[dim]} along dim {dim} is odd")
    require(input.numel() > 0 and input.is_contiguous(), name, "input must be contiguous and not empty")
    gate, up = input.float().chunk(2, dim)
    return (functional.silu(gate) * up).to(input.dtype)
