"""How far the residual mixing of hyper-connections is from doubly stochastic.

Manifold-constrained hyper-connections (mHC, arXiv:2512.24880: DeepSeek-V4, GLM-5.3) mix their residual streams by a
matrix whose rows and columns add up to 1, so that no stream grows from layer to layer. Some twenty Sinkhorn-Knopp
iterations bring it there; how well shows only in its sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from train.ops.watch import Watch


def hyper_connections_of(module: nn.Module) -> list[nn.Module]:
    """The modules that mix residual streams."""
    return [each for each in module.modules() if type(each).__name__.endswith("HyperConnection")]


class MixingError(Watch):
    """Watches the hyper-connections of a model.

    Args:
        module: the model, maybe inside an adapter's, with `hyper_connections_of` it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._worst: list[torch.Tensor] = []
        for each in hyper_connections_of(module):
            each.register_forward_hook(self._hear)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """During the forward pass of a micro-batch; the last one's figure stays."""
        self._worst.clear()
        with super().listening():
            yield

    @torch.no_grad()
    def _hear(self, connection: nn.Module, args: Any, output: Any) -> None:
        if self._listening:
            _, mix, _ = output
            self._worst.append(torch.stack([(mix.float().sum(dim) - 1).abs().amax() for dim in (-1, -2)]).amax())

    def highest(self) -> float:
        """The largest difference from 1 of a row's or column's sum, over all layers and tokens."""
        return float(torch.stack(self._worst).amax())
