"""Tensors whose place another one can take, on a host whose malloc is glibc's."""

from __future__ import annotations

import math

import torch

SLACK = 128
"""Bytes. For aligned memory glibc wants a hole of the size, the alignment (64) and the smallest hole (32) together."""


def roomy_empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """An uninitialised tensor that leaves, once it is gone, a hole which an ordinary tensor of its shape fits into.

    torch asks malloc for aligned memory, for which glibc takes no hole of just the size. What goes between tensors that
    stay for the backward pass would then leave a hole too small for its like in every layer, a tenth of all that a LoRA
    step holds. (Another roomy tensor of the shape does not fit either: make those so that go, not those that come.)

    Args:
        like: gives format and device.
        shape: of the tensor.

    Returns:
        ``shape``, contiguous, no view: others may write into it.
    """
    return like.new_empty(math.prod(shape) + SLACK // like.element_size()).resize_(shape)
