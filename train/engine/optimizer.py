"""The optimizer of a run, from the optim group: any element-wise optimizer of torch, by its class name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from hydra.utils import get_class

from configs.errors import ConfigError
from configs.schema.optim import OptimConfig

OURS = {"_target_", "lr", "max_grad_norm"}
"""Fields of the optim group that are not arguments of the optimizer."""


def build_optimizer(
    optim: OptimConfig, parameters: Iterable[tuple[str, torch.Tensor]], *, fused: bool = False
) -> torch.optim.Optimizer:
    """Makes ``optim._target_`` with the group's further fields.

    Weight decay acts on parameters of two or more dimensions: shrinking norms' gains and biases towards zero
    only harms (Goyal et al. 2017, arXiv:1706.02677, section 5.3).

    Args:
        optim: the group.
        parameters: what it steps, by name.
        fused: the device's `fused_optimizer`: where the class can, a step is one pass over memory, not about ten.

    Raises:
        ConfigError: the class is not there, is no optimizer, or does not take the fields.
    """
    cls = _optimizer_class(optim._target_)
    arguments: dict[str, Any] = {}
    for field in fields(optim):
        if field.name not in OURS:
            value = getattr(optim, field.name)
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    if fused and has_fused(optim):
        arguments["fused"] = True
    decay = arguments.pop("weight_decay", 0.0)
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for _, parameter in parameters:
        (matrices if parameter.dim() >= 2 else others).append(parameter)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    try:
        optimizer: torch.optim.Optimizer = cls([group for group in groups if group["params"]], lr=optim.lr, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError("optim", f"{optim._target_} refuses {arguments}: {error}") from error
    return optimizer


def has_fused(optim: OptimConfig) -> bool:
    """Whether torch has a fused step of the optimizer, on every device where it has any.

    Not of a class derived from one of torch's, which may take other arguments and step in another way.
    """
    return is_torchs(optim) and issubclass(_optimizer_class(optim._target_), (torch.optim.Adam, torch.optim.SGD))


def is_torchs(optim: OptimConfig) -> bool:
    """Whether the optimizer is one of torch itself, whose step needs no other rank."""
    return _optimizer_class(optim._target_).__module__.startswith("torch.optim.")


def _optimizer_class(target: str) -> type[Any]:
    try:
        cls: type[Any] = get_class(target)
    except Exception as error:  # hydra wraps import errors of any kind
        raise ConfigError("optim._target_", f"{target} cannot be imported: {error}") from error
    if not issubclass(cls, torch.optim.Optimizer):
        raise ConfigError("optim._target_", f"{target} is no optimizer", allowed="a torch.optim.Optimizer")
    return cls
