"""Checks of arguments that the fused operators share."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FUSED_CHIPS = ("Ascend910B", "Ascend910_93", "Ascend950")
"""Atlas A2, A3 and later, by what their chips' names begin with: attention and SwiGLU have no kernel elsewhere."""


def require(holds: bool, name: str, fault: str) -> None:
    """Refuses a call of the operator `name`.

    Raises:
        RuntimeError: with the number that op-plugin gives to wrong parameters, as the real operator.
    """
    if not holds:
        raise RuntimeError(f"{name}: {fault}. [ERROR] ERR01001 OPS invalid parameter")


def on_fused_chip(name: str) -> None:
    """Refuses a chip without a kernel for the operator."""
    chip = str(torch.get_device_module("npu").get_device_name())
    require(chip.startswith(FUSED_CHIPS), name, f"no kernel for {chip}")


def same_dtype(name: str, **tensors: Tensor) -> None:
    """Refuses tensors of several dtypes, or of one without a kernel."""
    dtypes = {argument: tensor.dtype for argument, tensor in tensors.items()}
    one = len(set(dtypes.values())) == 1 and next(iter(dtypes.values())) in FLOATS
    found = ", ".join(f"{argument} {dtype}" for argument, dtype in dtypes.items())
    require(one, name, f"{found}: one of float16, bfloat16, float32 for all of them")


def shape(tensor: Tensor) -> str:
    """The tensor's shape for a message."""
    return str(list(tensor.shape))
