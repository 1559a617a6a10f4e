"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), first half of a head paired with the second."""

from __future__ import annotations

import torch


def rotary(x_BHTD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x * cos + rotate_half(x) * sin``, as transformers' ``apply_rotary_pos_emb`` of Llama, Mistral and Qwen.

    Args:
        x_BHTD: queries or keys, ``[b x h x t x d]``, d even.
        cos: ``[b or 1 x 1 x t x d]``; its two halves are equal. No gradient is asked for.
        sin: as `cos`.

    Returns:
        as `x_BHTD`.
    """
    half = x_BHTD.shape[-1] // 2
    rotated = torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), dim=-1)
    return (x_BHTD * cos) + (rotated * sin)
