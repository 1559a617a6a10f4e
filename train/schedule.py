"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from configs.schema.optim import ConstantConfig, CosineConfig, LinearConfig, ScheduleConfig


class Schedule(ABC):
    """Share of the peak learning rate at each step: linear warm-up, then the subclass's shape."""

    def __init__(self, cfg: ScheduleConfig, total_steps: int) -> None:
        self.total_steps = total_steps
        self.warmup_steps = cfg.warmup_steps or round(cfg.warmup_fraction * total_steps)

    def __call__(self, step: int) -> float:
        """The factor for `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, done))

    @abstractmethod
    def after_warmup(self, done: float) -> float:
        """The factor when `done`, from 0 to 1, of the steps after the warm-up lie behind."""


class Constant(Schedule):
    """The peak rate."""

    def __init__(self, cfg: ConstantConfig, total_steps: int) -> None:
        super().__init__(cfg, total_steps)

    def after_warmup(self, done: float) -> float:
        """1."""
        return 1.0


class Linear(Schedule):
    """A straight line to `min_fraction`."""

    def __init__(self, cfg: LinearConfig, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.min_fraction = cfg.min_fraction

    def after_warmup(self, done: float) -> float:
        """1 down to `min_fraction`."""
        return 1 - (1 - self.min_fraction) * done


class Cosine(Schedule):
    """A half cosine to `min_fraction` (Loshchilov & Hutter 2016, arXiv:1608.03983)."""

    def __init__(self, cfg: CosineConfig, total_steps: int) -> None:
        super().__init__(cfg, total_steps)
        self.min_fraction = cfg.min_fraction

    def after_warmup(self, done: float) -> float:
        """1 down to `min_fraction`."""
        return self.min_fraction + (1 - self.min_fraction) * (1 + math.cos(math.pi * done)) / 2
