"""A linear layer and its low-rank adapter in one piece: fewer passes over activations than layer by layer.

peft adds ``scaling * B(A(x))`` to the layer's output by four more operators, and autograd adds up three gradients of
x, each over all of a layer's activations. Here both sums are made by the products that write them
(``addmm``), in fp32 inside and rounded once. Not covered: dropout, DoRA and its like, several adapters, and ZeRO-3,
which gathers weights when the modules that hold them are called; those run as peft has them.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from train.ops.roomy import roomy_empty


class _Adapted(torch.autograd.Function):
    """``x W' + bias + scaling x A' B'``, of a frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_OI: torch.Tensor,
        bias_O: torch.Tensor | None,
        down_RI: torch.Tensor,
        up_OR: torch.Tensor,
        scaling: float,
        on_host: bool,
    ) -> torch.Tensor:
        x_NI = x.flatten(0, -2)
        low_NR = x_NI @ down_RI.t()
        # What is returned is no view: others may write into it.
        shape = (*x.shape[:-1], len(weight_OI))
        out = roomy_empty(x, *shape) if on_host else x.new_empty(shape)
        out_NO = out.view(len(x_NI), len(weight_OI))
        if bias_O is None:
            torch.mm(x_NI, weight_OI.t(), out=out_NO)
        else:
            torch.addmm(bias_O, x_NI, weight_OI.t(), out=out_NO)
        out_NO.addmm_(low_NR, up_OR.t(), alpha=scaling)
        ctx.save_for_backward(x_NI, low_NR, weight_OI, down_RI, up_OR)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_NI, low_NR, weight_OI, down_RI, up_OR = ctx.saved_tensors
        grad_NO = grad.flatten(0, -2)
        low_grad_NR = grad_NO @ (up_OR * ctx.scaling)
        to_x = None
        if ctx.needs_input_grad[0]:  # nothing below the lowest adapter is gone through
            to_x = grad_NO @ weight_OI
            to_x = to_x.addmm_(low_grad_NR, down_RI).view(*grad.shape[:-1], down_RI.shape[1])
        to_down = low_grad_NR.t() @ x_NI if ctx.needs_input_grad[3] else None
        to_up = (grad_NO.t() @ low_NR).mul_(ctx.scaling) if ctx.needs_input_grad[4] else None
        return to_x, None, None, to_down, to_up, None, None


def fuse_adapters(module: nn.Module, *, on_host: bool = False) -> int:
    """Has each layer that peft adapted compute as one; only these objects are touched, and copies of them copied.

    Args:
        module: a model with adapters.
        on_host: whether a CPU computes, or is stood in for.

    Returns:
        how many layers do.
    """
    from peft.tuners.lora.layer import Linear

    found = [layer for layer in module.modules() if type(layer) is Linear and _is_plain(layer)]
    for layer in found:
        layer.forward = MethodType(_forward_on_host if on_host else _forward, layer)
    return len(found)


def _is_plain(layer: Any) -> bool:
    """One adapter of the simplest kind on a frozen matrix, all in one dtype."""
    if len(layer.active_adapters) != 1 or layer.lora_variant or layer.fan_in_fan_out:
        return False
    [name] = layer.active_adapters
    base = layer.get_base_layer()
    if type(base) is not nn.Linear or name not in layer.lora_A or not isinstance(layer.lora_dropout[name], nn.Identity):
        return False
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    parts = (base.weight, layer.lora_A[name].weight, layer.lora_B[name].weight)
    return frozen and layer.lora_B[name].bias is None and len({part.dtype for part in parts}) == 1


def _forward_on_host(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _forward(self, x, *args, on_host=True, **kwargs)


def _forward(self: Any, x: torch.Tensor, *args: Any, on_host: bool = False, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or self.disable_adapters or self.merged or x.dim() < 2 or not _is_plain(self):
        return type(self).forward(self, x, *args, **kwargs)  # type: ignore[no-any-return]
    [name] = self.active_adapters
    base, down = self.base_layer, self.lora_A[name].weight
    if x.dtype != down.dtype:
        return type(self).forward(self, x)  # type: ignore[no-any-return]
    return _Adapted.apply(  # type: ignore[no-any-return, no-untyped-call]
        x, base.weight, base.bias, down, self.lora_B[name].weight, self.scaling[name], on_host
    )
