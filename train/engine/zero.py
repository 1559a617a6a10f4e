"""DeepSpeed ZeRO stages 1, 2 and 3, with or without optimizer offload."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.errors import ConfigError
from configs.schema.optim import OptimConfig
from configs.schema.sharding import ZeroConfig
from train.devices.base import Device
from train.engine.base import Engine, Fragment, World
from train.engine.needs import ModelNeeds
from train.engine.optimizer import build_optimizer
from train.engine.replicas import Replicas
from train.engine.zero_config import deepspeed_config
from train.engine.zero_layout import layout_of


class ZeroEngine(Engine):
    """State (stage 1), gradients (2) and parameters (3) are spread over the ranks; one rank works too."""

    config: ZeroConfig

    def __init__(
        self,
        config: ZeroConfig,
        module: nn.Module,
        *,
        optim: OptimConfig,
        device: Device,
        world: World,
        working_dtype: torch.dtype,
        needs: ModelNeeds = ModelNeeds(),  # noqa: B008  # immutable
    ) -> None:
        _refuse_experts_of_their_own(config, module, world)
        settings = deepspeed_config(
            config,
            world_size=world.size,
            precision="bf16" if working_dtype == torch.bfloat16 else "fp32",
            max_grad_norm=optim.max_grad_norm,
            model_numel=sum(parameter.numel() for parameter in module.parameters()),
            pin_memory=device.torch_device.type != "cpu",
        )
        super().__init__(
            config, module, optim=optim, device=device, world=world, working_dtype=working_dtype, needs=needs
        )
        deepspeed = import_deepspeed()
        _ensure_group(device)
        self._replicas = Replicas(module, needs.fp32, optim, world, fused=device.fused_optimizer)
        spread = {name: p for name, p in self.trained.items() if name not in self._replicas.parameters}
        if not spread:
            raise ConfigError(
                "sharding",
                f"stage {config.stage}, but all that trains is kept in fp32 on every rank: nothing is left to shard",
                remedy="sharding=plain, or train more parts",
            )
        self._hooks = _gather_as_one(module, needs.as_one) if config.stage == 3 else []
        optimizer = build_optimizer(optim, spread.items(), fused=device.fused_optimizer)
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in spread.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory reports, asked or not
            self._deepspeed, self._zero, *_ = deepspeed.initialize(
                model=module, model_parameters=list(spread.values()), optimizer=optimizer, config=settings
            )
        world.adopt_groups()
        self._layout = layout_of(self._zero, names)
        self._layout.count_in(self._replicas.norm)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """See `Engine.weights`."""
        yield from super().weights()
        yield from self._replicas.parameters.items()

    def forward(self, **batch: Any) -> Any:
        """Calls the model; stage 3 gathers each layer's weights on the way."""
        return self._deepspeed(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """DeepSpeed averages over the ranks; the factor makes it the sum again."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)
        if last:
            self._replicas.finish_gradients(1 / self.world.size)

    def step(self, lr: float) -> float:
        """See `Engine.step`. DeepSpeed clips, and drops a step whose norm is not finite."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        self._layout.forget_gradients()
        norm = float(self._deepspeed.get_global_grad_norm())
        self._replicas.step(lr, norm)
        return norm

    def fragments(self, owned: bool) -> list[Fragment]:
        """Each rank holds just what it owns, and the replicas."""
        return self._layout.fragments() + self._replicas.fragments(owned)

    def prepare_restore(self) -> None:
        """See `zero_layout`."""
        self._layout.prepare_restore()
        self._replicas.forget_gradients()

    def finish_restore(self, step: int) -> None:
        """See `zero_layout`; DeepSpeed's own counters follow."""
        self._layout.finish_restore()
        self._deepspeed.global_steps = self._deepspeed.micro_steps = step
        self._deepspeed.skipped_steps = 0

    def close(self) -> None:
        """Takes DeepSpeed's hooks and ours off the model."""
        self._deepspeed.destroy()
        self._replicas.close()
        for hook in self._hooks:
            hook.remove()


def _gather_as_one(module: nn.Module, classes: Sequence[type[nn.Module]]) -> list[torch.utils.hooks.RemovableHandle]:
    """Has stage 3 treat each module of these classes as if it had no submodules. Before DeepSpeed holds the model."""
    if not classes:
        return []
    from deepspeed.utils import set_z3_leaf_modules

    parts = set_z3_leaf_modules(module, list(classes))
    trained = [part for part in parts if any(p.requires_grad for p in part.parameters())]
    return [part.register_forward_pre_hook(_reached_by_gradients) for part in trained]


def _reached_by_gradients(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """DeepSpeed sums such a module's gradients when that of its input comes, so one must come.

    It does not where the module is the first that trains, as with adapters on experts only.
    """
    tensors = [x for x in inputs if torch.is_tensor(x) and x.is_floating_point()]
    if not torch.is_grad_enabled() or not tensors or any(x.requires_grad for x in tensors):
        return None
    return tuple(x.detach().requires_grad_() if x is tensors[0] else x for x in inputs)


_EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a parameter: an expert is a module of its own."""


def _refuse_experts_of_their_own(config: ZeroConfig, module: nn.Module, world: World) -> None:
    """Stages 1 and 2 sum gradients as they arrive: a rank whose tokens miss an expert would sum another one's instead.

    Stacked experts, which all listed families have, get one gradient for all of them.

    Raises:
        ConfigError: experts train that are modules of their own.
    """
    own = [n for n, p in module.named_parameters() if p.requires_grad and _EXPERT.search(n)]
    if own and config.stage < 3 and world.size > 1:
        raise ConfigError(
            "sharding",
            f"zero{config.stage} on {world.size} ranks, but experts of this model are modules of their own ({own[0]}): "
            "a rank whose tokens miss one has no gradient for it, and sums would mix up weights",
            allowed="plain, zero3",
            remedy="sharding=zero3, or tuning.targets without experts",
        )


def import_deepspeed() -> ModuleType:
    """DeepSpeed without its chatter. `Device.activate` has set DS_ACCELERATOR, which it reads on import."""
    assert "DS_ACCELERATOR" in os.environ, "the device must be activated before an engine is built"
    import deepspeed
    from deepspeed.runtime import compiler

    # Its engine imports its Muon, whose decorator would import all of torch's compiler: seconds of every rank's start,
    # for an optimizer that is none of ours.
    compile_it, compiler.compile = compiler.compile, lambda: lambda function: function
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401

    compiler.compile = compile_it
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch is about to retire.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # A host kernel that serves inference only, yet would be compiled for over a minute when the group is made.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    module: ModuleType = deepspeed
    return module


def _ensure_group(device: Device) -> None:
    """A process that runs alone needs a group of one; an in-memory store needs no port."""
    os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed refuses to start without it, and takes that device
    if not dist.is_initialized():
        dist.init_process_group(device.backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
