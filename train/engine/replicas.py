"""Parameters that stay whole and in fp32 on every rank while DeepSpeed spreads and casts the rest.

DeepSpeed casts all parameters of a module to the working dtype and, in stage 3, cuts all of them into pieces. Buffers
it leaves alone. So these parameters stand among the buffers of their modules while it holds the model, where a forward
pass finds them just the same. They are small: norms, convolutions, hyper-connections.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import nn

from configs.schema.optim import OptimConfig
from train.engine.base import Fragment, World, fragments_of_whole
from train.engine.optimizer import build_optimizer
from train.engine.reduce import GradientReducer


class Replicas:
    """Takes parameters out of DeepSpeed's sight and trains those that require gradients beside it.

    Args:
        module: the model, on its device, before DeepSpeed sees it.
        names: of the parameters, trained or frozen.
        optim: the optim group.
        world: ranks that hold the same values.
        fused: see `build_optimizer`.
    """

    def __init__(
        self, module: nn.Module, names: Collection[str], optim: OptimConfig, world: World, *, fused: bool = False
    ) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if name in names}
        """Trained or frozen, by name."""
        self._places = _hide(module, list(self.parameters.values()))
        self._trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._max_norm, self._world = optim.max_grad_norm, world
        if world.size > 1:
            for parameter in self._trained.values():
                dist.broadcast(parameter.data, src=0)
        trained = self._trained.items()
        self._optimizer = build_optimizer(optim, trained, fused=fused) if trained else None
        whole = list(self._trained.values())
        self._reducer = GradientReducer(whole, whole, world)

    def finish_gradients(self, scale: float) -> None:
        """After the last backward pass of a step: sums over the ranks, times `scale`.

        Not before: DeepSpeed's own sums go through the same process group, and ranks that use different experts
        would meet there in different orders.
        """
        self._reducer.sum_up()
        for parameter in self._trained.values():
            assert parameter.grad is not None
            parameter.grad.mul_(scale)

    def norm(self) -> torch.Tensor:
        """L2 norm of the gradients; a scalar in fp32, 0 where nothing trains."""
        return nn.utils.get_total_norm([p.grad for p in self._trained.values() if p.grad is not None])

    @torch.no_grad()
    def step(self, lr: float, norm: float) -> None:
        """Clips and steps, unless `norm`, that of the whole gradient before clipping, is not finite."""
        if self._optimizer is not None and math.isfinite(norm):
            if self._max_norm:
                nn.utils.clip_grads_with_norm_(self._trained.values(), self._max_norm, torch.tensor(norm))
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Zeroes them."""
        self._reducer.zero()

    def fragments(self, owned: bool) -> list[Fragment]:
        """See `Engine.fragments`."""
        if self._optimizer is None:
            return []
        return fragments_of_whole(self._trained, self._optimizer, self._world if owned else World())

    def close(self) -> None:
        """Makes them parameters of their modules again."""
        self._reducer.close()
        for holder, own, parameter in self._places:
            del holder._buffers[own]
            holder._parameters[own] = parameter


def _hide(module: nn.Module, parameters: list[nn.Parameter]) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Makes them buffers wherever they are held; returns where that was."""
    hidden, places = {id(parameter) for parameter in parameters}, []
    for holder in module.modules():
        for own, parameter in list(holder._parameters.items()):
            if parameter is not None and id(parameter) in hidden:
                del holder._parameters[own]
                # A frozen one as a plain tensor: peft puts a buffer back where it was, but not a parameter.
                holder._buffers[own] = parameter if parameter.requires_grad else parameter.detach()
                places.append((holder, own, parameter))
    return places
