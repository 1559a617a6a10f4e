"""The optim and schedule groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from configs.errors import ConfigError


@dataclass
class OptimConfig:
    """What every optimizer has. The optimizer works on fp32 masters."""

    _target_: str = MISSING
    """A subclass of ``torch.optim.Optimizer``."""
    lr: float = 2e-4
    """Peak learning rate."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this L2 norm over all parameters and ranks. 0: no clipping."""

    def __post_init__(self) -> None:
        if not 0 <= self.lr < math.inf:
            raise ConfigError("optim.lr", str(self.lr), allowed="0 or more")
        if self.max_grad_norm < 0:
            raise ConfigError("optim.max_grad_norm", str(self.max_grad_norm), allowed="0 (off) or more")


@dataclass
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101)."""

    _target_: str = "torch.optim.AdamW"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to parameters of two or more dimensions only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ConfigError("optim.betas", str(self.betas), allowed="two numbers, each 0 up to, not including, 1")


@dataclass
class SGDConfig(OptimConfig):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

    _target_: str = "torch.optim.SGD"
    momentum: float = 0.9
    """Share of the last update carried into the next one. 0: none."""
    nesterov: bool = False
    """Looks ahead along the momentum; needs a momentum above 0."""
    weight_decay: float = 0.0
    """Applied to parameters of two or more dimensions only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ConfigError("optim.momentum", str(self.momentum), allowed="0 up to, not including, 1")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("optim.nesterov", "true with optim.momentum=0", remedy="set optim.momentum above 0")


@dataclass
class ScheduleConfig:
    """What every learning-rate schedule has."""

    _target_: str = MISSING
    """A subclass of ``train.schedule.Schedule``."""
    warmup_steps: int = 0
    warmup_fraction: float = 0.0
    """Share of all steps, used when `warmup_steps` is 0."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError("schedule.warmup_steps", str(self.warmup_steps), allowed="0 or more")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError("schedule.warmup_fraction", str(self.warmup_fraction), allowed="0 to 1")


@dataclass
class ConstantConfig(ScheduleConfig):
    """The peak rate after the warm-up."""

    _target_: str = "train.schedule.Constant"


@dataclass
class LinearConfig(ScheduleConfig):
    """Falls on a straight line towards `min_fraction` of the peak, which it would reach after the last step."""

    _target_: str = "train.schedule.Linear"
    min_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_min_fraction(self.min_fraction)


@dataclass
class CosineConfig(ScheduleConfig):
    """Falls on a half cosine towards `min_fraction` of the peak, reached after the last step (arXiv:1608.03983)."""

    _target_: str = "train.schedule.Cosine"
    min_fraction: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_min_fraction(self.min_fraction)


def _check_min_fraction(fraction: float) -> None:
    if not 0 <= fraction <= 1:
        raise ConfigError("schedule.min_fraction", str(fraction), allowed="0 to 1")
