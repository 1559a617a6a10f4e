"""The gated activation of Llama, Mistral and Qwen (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``.

    Args:
        gate: ``[... x n]``.
        up: as `gate`.

    Returns:
        as `gate`.
    """
    return F.silu(gate) * up
