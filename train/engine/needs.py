"""What a model asks of the engine that holds it, read off the loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd


@dataclass(frozen=True)
class ModelNeeds:
    """The parts that cannot be treated like the rest."""

    fp32: frozenset[str] = frozenset()
    """Names of parameters that are fp32 whatever the working dtype."""
    as_one: tuple[type[nn.Module], ...] = ()
    """Classes of modules whose weights are gathered together, since ranks use different ones of them."""


def needs_of(module: nn.Module) -> ModelNeeds:
    """The needs of a model as it was loaded, with adapters or without."""
    return ModelNeeds(_kept_in_fp32(module), tuple(sorted(set(_gathered_as_one(module)), key=lambda cls: cls.__name__)))


def _kept_in_fp32(module: nn.Module) -> frozenset[str]:
    """What is fp32 beside weights that are not: the family's class kept it so in loading, and peft follows the base."""
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    if set(dtypes.values()) <= {torch.float32}:
        return frozenset()
    return frozenset(name for name, dtype in dtypes.items() if dtype == torch.float32)


def _gathered_as_one(module: nn.Module) -> Iterator[type[nn.Module]]:
    for path, part in module.named_modules():
        parent, _, last = path.rpartition(".")
        if last == "experts" and isinstance(part, nn.ModuleList):
            yield type(module.get_submodule(parent))  # a rank whose tokens miss an expert never calls it
        elif type(part).__name__ == "ParamWrapper":
            yield type(part)  # peft's, of adapters on weights: it reads its base's weight before that is called
        elif not isinstance(part, _ConvNd) and any(p.dim() == 3 for p in part.parameters(recurse=False)):
            yield type(part)  # stacked experts; eager ones call their activation once for each expert that is hit
