"""One process, or several that each hold the whole model (data parallel)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.schema.optim import OptimConfig
from configs.schema.sharding import ShardingConfig
from train.devices.base import Device
from train.engine.base import Engine, Fragment, World, fragments_of_whole
from train.engine.needs import ModelNeeds
from train.engine.optimizer import build_optimizer
from train.engine.reduce import GradientReducer


class PlainEngine(Engine):
    """Everything on every rank. Parameters in fp32 are their own masters; bf16 ones have fp32 masters beside them.

    A parameter that a step does not use has a zero gradient, not none, as under every other engine.
    """

    def __init__(
        self,
        config: ShardingConfig,
        module: nn.Module,
        *,
        optim: OptimConfig,
        device: Device,
        world: World,
        working_dtype: torch.dtype,
        needs: ModelNeeds = ModelNeeds(),  # noqa: B008  # immutable
    ) -> None:
        super().__init__(
            config, module, optim=optim, device=device, world=world, working_dtype=working_dtype, needs=needs
        )
        if world.size > 1:
            for parameter in self.trained.values():
                dist.broadcast(parameter.data, src=0)
        self._masters = {name: self._master_of(parameter) for name, parameter in self.trained.items()}
        self._optimizer = build_optimizer(optim, self._masters.items(), fused=device.fused_optimizer)
        self._reducer = GradientReducer(list(self.trained.values()), list(self._masters.values()), world)

    def _master_of(self, parameter: torch.Tensor) -> torch.Tensor:
        if parameter.dtype == torch.float32:
            return parameter
        return parameter.detach().float().requires_grad_()

    def forward(self, **batch: Any) -> Any:
        """Calls the model."""
        return self.module(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Ranks talk only in the last micro-batch."""
        self._reducer.backward(loss, last=last)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """See `Engine.step`. All ranks hold the same sums, so all take the same step."""
        gradients = [master.grad for master in self._masters.values() if master.grad is not None]
        total = nn.utils.get_total_norm(gradients)
        norm = float(total)
        if math.isfinite(norm):
            if 0 < self.optim.max_grad_norm < norm:  # torch would multiply by 1 as well
                nn.utils.clip_grads_with_norm_(self._masters.values(), self.optim.max_grad_norm, total)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._refresh()
        self._reducer.zero()
        return norm

    def _refresh(self) -> None:
        """Masters -> working weights."""
        for name, parameter in self.trained.items():
            master = self._masters[name]
            if master is not parameter:
                parameter.data.copy_(master)

    def fragments(self, owned: bool) -> list[Fragment]:
        """Rank r answers for the r-th part of every parameter, so that all ranks write about equally much."""
        return fragments_of_whole(self._masters, self._optimizer, self.world if owned else World())

    def prepare_restore(self) -> None:
        """Drops gradients of an unfinished step."""
        self._reducer.zero()

    def finish_restore(self, step: int) -> None:
        """Refreshes the working weights."""
        self._refresh()

    def close(self) -> None:
        """Takes the hooks off the parameters."""
        self._reducer.close()
