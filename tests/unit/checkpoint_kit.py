"""A small engine of one process, its steps and a state of a trainer: what the checkpoint tests share."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from configs.schema.device import DeviceConfig
from configs.schema.optim import AdamWConfig, OptimConfig
from configs.schema.sharding import PlainConfig
from train.checkpoint.layout import TrainerState
from train.devices.cpu import CpuDevice
from train.engine.base import World
from train.engine.plain import PlainEngine

WORLD = World()


@dataclass
class NAdamConfig(OptimConfig):
    _target_: str = "torch.optim.NAdam"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])


@dataclass
class MomentumConfig(OptimConfig):
    _target_: str = "torch.optim.SGD"
    momentum: float = 0.9


def engine(optim=None, dtype=torch.float32, width=5, seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 1))
    net[0].bias.requires_grad_(False).zero_()  # frozen: of the base model, the same whatever the seed
    optim = optim or AdamWConfig(weight_decay=0.1)
    device = CpuDevice(DeviceConfig(threads=1))
    return PlainEngine(PlainConfig(), net, optim=optim, device=device, world=WORLD, working_dtype=dtype)


def steps(built, first, count):
    losses = []
    for step in range(first, first + count):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        loss = built.forward(input=x.to(built.working_dtype)).float().square().mean()
        built.backward(loss, last=True)
        built.step(0.05)
        losses.append(loss.item())
    return losses


def state(step):
    return TrainerState(step, epoch=1, samples_seen=8 * step, tokens_seen=99, seed=3, extra={"note": "x"})


def all_tensors(built):
    return {(f.name, kind): f.view(kind).clone() for f in built.fragments(owned=False) for kind in f.kinds}
