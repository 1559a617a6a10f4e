"""Tensors that are gone before the next of their size is asked for."""

from __future__ import annotations

import math

import torch

SLACK = 128
"""Bytes. glibc's aligned_alloc looks for a hole of its size, the alignment (64) and the smallest hole (32) together."""


def transient_empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An uninitialised tensor that leaves a hole which the next one of its size fits into.

    torch asks malloc for aligned memory. What lies between tensors that stay for the backward pass is then a hole just
    too small for its like, in every layer: a sixth of the resident set of a LoRA step. Other allocators lose nothing.

    Args:
        like: gives format and device.
        shape: of the tensor.

    Returns:
        ``shape``, contiguous, no view: others may write into it.
    """
    return like.new_empty(math.prod(shape) + SLACK // like.element_size()).resize_(shape)
