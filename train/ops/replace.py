"""A model's layers compute with given versions of the ops: each layer object for itself, nothing global.

transformers' own seam (``use_kernel_forward_from_hub``) is not used: without the ``kernels`` package its decorators
leave no trace to hook into, with it they ask the hub. Patching classes or modules, as others do, outlives the model
and meets every other model of the process. Here a layer gets a bound method ``forward`` of its own, which its
``__call__`` runs with all hooks (ZeRO-3 gathers weights there), which a deep copy binds to the copy, and which no
state dict, saved file or export knows.

Before that, the layer's own ``forward`` is compared with the op's reference on random input, bit by bit, so that a
layer which computes anything else (``1 + weight``, another order of rounding, another activation) is left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from train.models.families import Layers
from train.ops.kernel import Version
from train.ops.rms_norm import rms_norm
from train.ops.rotary import rotary
from train.ops.swiglu import swiglu

ROTARY_FUNCTION = "apply_rotary_pos_emb"
Forward = Callable[..., Any]


def layers_of(op: str, model: nn.Module, layers: Layers) -> list[Any]:
    """The layers of a model that compute an op: of exactly the class that family data names, no subclass."""
    wanted = (layers.module, getattr(layers, op))
    return [module for module in model.modules() if (type(module).__module__, type(module).__qualname__) == wanted]


def another_formula(op: str, found: list[Any], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why layers cannot take a version of an op; None: their own code computes exactly the reference.

    Args:
        op: `rms_norm`, `rotary` or `swiglu`.
        found: layers that compute it.
        dtype: the working dtype.
        device: where the model is.
    """
    name = type(found[0]).__name__
    if any("forward" in vars(layer) for layer in found):
        return f"something else has replaced the forward pass of a {name}"
    same = {"rms_norm": _is_rms_norm, "rotary": _is_rotary, "swiglu": _is_swiglu}[op]
    draw = torch.Generator().manual_seed(0)
    try:
        if all(same(layer, lambda *shape: torch.randn(*shape, generator=draw).to(device, dtype)) for layer in found):
            return None
    except (AttributeError, TypeError, KeyError) as error:
        return f"{name} has other parts ({error})"
    return f"{name} computes another formula here"


def replace(op: str, found: list[Any], version: Version) -> None:
    """Has layers compute an op by `version`."""
    forward_of = {"rms_norm": _with_rms_norm, "rotary": _with_rotary, "swiglu": _with_swiglu}[op]
    forward = forward_of(type(found[0]), version)
    for layer in found:
        # A bound method, not a closure over the layer: copy.deepcopy binds it to the copy.
        layer.forward = MethodType(forward, layer)


def _is_rms_norm(layer: Any, normal: Callable[..., torch.Tensor]) -> bool:
    # The layer's own code on other weights: its own are often all ones, with which many formulas agree. Small inputs
    # among them, where epsilon counts.
    weight, epsilon = 1 + normal(64) / 2, layer.variance_epsilon
    x = normal(5, 64) * torch.tensor([1e-4, 1e-3, 0.01, 1.0, 10.0])[:, None].to(weight)
    with torch.no_grad():
        own = type(layer).forward(SimpleNamespace(weight=weight, variance_epsilon=epsilon), x)
    return torch.equal(own, rms_norm(x, weight, epsilon))


def _with_rms_norm(kind: type, version: Version) -> Forward:
    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return version(hidden_states, self.weight, self.variance_epsilon)

    return forward


def _is_swiglu(layer: Any, normal: Callable[..., torch.Tensor]) -> bool:
    # The layer's own code and activation between projections that give known numbers.
    gate, up = 3 * normal(4, 64), normal(4, 64)
    parts = {"gate_proj": lambda _: gate, "up_proj": lambda _: up, "down_proj": lambda y: y, "act_fn": layer.act_fn}
    with torch.no_grad():
        own = type(layer).forward(SimpleNamespace(**parts), gate)
    return torch.equal(own, swiglu(gate, up))


def _with_swiglu(kind: type, version: Version) -> Forward:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(version(self.gate_proj(x), self.up_proj(x)))
        return out

    return forward


def _is_rotary(layer: Any, normal: Callable[..., torch.Tensor]) -> bool:
    own = type(layer).forward
    if not isinstance(own, FunctionType) or ROTARY_FUNCTION not in own.__code__.co_names:
        return False
    width = layer.head_dim
    query, key, cos, sin = normal(2, 4, 5, width), normal(2, 2, 5, width), normal(2, 5, width), normal(2, 5, width)
    found = own.__globals__[ROTARY_FUNCTION](query, key, cos, sin)
    return all(torch.equal(y, rotary(x, cos[:, None], sin[:, None])) for x, y in zip((query, key), found, strict=True))


def _with_rotary(kind: type, version: Version) -> Forward:
    """The class's own forward, in which the one global name means another function."""

    def turn(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return version(q, cos, sin), version(k, cos, sin)

    own: Any = kind.forward  # type: ignore[attr-defined]  # every module has one
    forward = FunctionType(
        own.__code__, {**own.__globals__, ROTARY_FUNCTION: turn}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward
