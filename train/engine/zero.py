"""DeepSpeed ZeRO stages 1, 2 and 3, with or without optimizer offload."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from configs.schema.optim import OptimConfig
from configs.schema.sharding import ZeroConfig
from train.devices.base import Device
from train.engine.base import Engine, Fragment, World
from train.engine.optimizer import build_optimizer
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
    ) -> None:
        settings = deepspeed_config(
            config,
            world_size=world.size,
            precision="bf16" if working_dtype == torch.bfloat16 else "fp32",
            max_grad_norm=optim.max_grad_norm,
            model_numel=sum(parameter.numel() for parameter in module.parameters()),
            pin_memory=device.torch_device.type != "cpu",
        )
        super().__init__(config, module, optim=optim, device=device, world=world, working_dtype=working_dtype)
        deepspeed = import_deepspeed()
        _ensure_group(device)
        optimizer = build_optimizer(optim, self.trained.items())
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.trained.items()}
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory reports, asked or not
            self._deepspeed, self._zero, *_ = deepspeed.initialize(
                model=module, model_parameters=list(self.trained.values()), optimizer=optimizer, config=settings
            )
        world.adopt_groups()
        self._layout = layout_of(self._zero, names)

    def forward(self, **batch: Any) -> Any:
        """Calls the model; stage 3 gathers each layer's weights on the way."""
        return self._deepspeed(**batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """DeepSpeed averages over the ranks; the factor makes it the sum again."""
        self._deepspeed.set_gradient_accumulation_boundary(last)
        self._deepspeed.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """See `Engine.step`. DeepSpeed clips, and drops a step whose norm is not finite."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        self._deepspeed.step()
        self._layout.forget_gradients()
        return float(self._deepspeed.get_global_grad_norm())

    def fragments(self, owned: bool) -> list[Fragment]:
        """Each rank holds just what it owns."""
        return self._layout.fragments()

    def prepare_restore(self) -> None:
        """See `zero_layout`."""
        self._layout.prepare_restore()

    def finish_restore(self, step: int) -> None:
        """See `zero_layout`; DeepSpeed's own counters follow."""
        self._layout.finish_restore()
        self._deepspeed.global_steps = self._deepspeed.micro_steps = step
        self._deepspeed.skipped_steps = 0

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model."""
        self._deepspeed.destroy()


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
