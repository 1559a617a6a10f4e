"""Root mean square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), as Llama, Mistral and Qwen compute it."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``weight * x / sqrt(mean(x ** 2) + epsilon)``.

    The quotient is computed in fp32 or better and rounded to x's dtype before the weight is multiplied on, in this
    order, as transformers' ``LlamaRMSNorm`` does.

    Args:
        x: ``[... x n]``.
        weight: ``[n]``, of x's dtype.
        epsilon: added to the mean square.

    Returns:
        as `x`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)
