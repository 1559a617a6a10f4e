"""The one step loop. It knows the bases only: engine, objective, sampler, schedule, hooks."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import RunFailedError
from train.checkpoint.layout import TrainerState
from train.checkpoint.retention import prune
from train.checkpoint.save import save
from train.data.prepared import PreparedSplit
from train.data.sampler import RowLayout, StepSampler, batches_of, chunks, share_of
from train.devices.base import Device
from train.engine.base import Engine, World
from train.objectives.base import Objective
from train.schedule import Schedule

Record = dict[str, Any]
"""A line of metrics.jsonl."""


class Hook:
    """What may happen around the steps, in this order, on every rank.

    ``on_start`` once; ``on_step`` after each optimizer step, and after the validation loss was measured where that was
    due; ``on_checkpoint`` when one is complete; ``on_end`` once, also when the loop fails.
    """

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Before the first step; `first_step` is above 0 when resumed."""

    def on_step(self, record: Record) -> None:
        """After a step."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is complete."""

    def on_end(self) -> None:
        """After the last step."""


@dataclass
class Loop:
    """All that a run needs to take its steps."""

    engine: Engine
    objective: Objective
    sampler: StepSampler
    schedule: Schedule
    device: Device
    world: World
    peak_lr: float
    total_steps: int
    checkpoints: Path
    checkpoint_every: int
    keep_last: int
    validation: PreparedSplit | None
    eval_every: int
    hooks: Sequence[Hook]

    def run(self, state: TrainerState) -> TrainerState:
        """Takes the steps from `state.step` to `total_steps` and leaves a checkpoint of the last.

        Raises:
            RunFailedError: the loss or the gradient is not finite.
        """
        for hook in self.hooks:
            hook.on_start(state.step, self.total_steps)
        try:
            while state.step < self.total_steps:
                record = self.take_step(state)
                if self._due(self.eval_every, state.step) and self.validation is not None:
                    record["validation_loss"] = self.validation_loss(self.validation)
                for hook in self.hooks:
                    hook.on_step(record)
                if self._due(self.checkpoint_every, state.step) or state.step == self.total_steps:
                    self.save(state)
        finally:
            for hook in self.hooks:
                hook.on_end()
        return state

    def take_step(self, state: TrainerState) -> Record:
        """One global step; advances `state`."""
        started = time.perf_counter()
        step = self.sampler.step(state.step)
        lr = self.peak_lr * self.schedule(state.step)
        self.engine.module.train()
        losses: list[torch.Tensor] = []
        last = len(step.micro_batches) - 1
        for i, batch in enumerate(self.sampler.batches(step)):
            loss = self.objective.loss_sum(self.engine.forward, batch)
            self.engine.backward(loss / step.num_targets, last=i == last)
            losses.append(loss.detach())  # to be read once the step is queued: reading waits for the device
        grad_norm = self.engine.step(lr)
        loss_sum = torch.stack(losses).cpu().double().sum().item()  # not every device knows fp64
        [total] = self.world.all_reduce_sum([loss_sum])
        state.epoch = self.sampler.plan.position(state.step).epoch
        state.step += 1
        state.samples_seen += len(step.samples)
        state.tokens_seen += step.num_tokens
        self._must_be_finite(state.step, total, grad_norm)
        return {
            "step": state.step,
            "loss": total / step.num_targets,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": step.num_tokens,
            "supervised_tokens": step.num_targets,
            "tokens_per_second": step.num_tokens / (time.perf_counter() - started),
            "peak_gib": self.device.peak_memory_bytes() / 2**30,
            "data_hash": self.sampler.data_hash(step),
        }

    @torch.no_grad()
    def validation_loss(self, split: PreparedSplit) -> float:
        """Mean loss per supervised token over a split, all ranks together."""
        rows: RowLayout = self.sampler.rows
        self.engine.module.eval()
        loss_sum, targets = 0.0, 0
        for samples in chunks(split, rows.micro_batch_tokens * rows.world_size):
            step = share_of(split, samples, rows)
            targets += step.num_targets
            for batch in batches_of(split, step, rows):
                loss_sum += self.objective.loss_sum(self.engine.forward, batch).item()
        [total] = self.world.all_reduce_sum([loss_sum])
        return total / targets

    def save(self, state: TrainerState) -> None:
        """Writes a checkpoint, then removes the old ones."""
        path = save(self.engine, self.checkpoints, state, self.world)
        if self.world.rank == 0:
            prune(self.checkpoints, self.keep_last)
        for hook in self.hooks:
            hook.on_checkpoint(path)

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    @staticmethod
    def _must_be_finite(step: int, loss: float, grad_norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise RunFailedError(
                f"step {step}",
                f"loss sum {loss}, gradient norm {grad_norm}: not finite",
                remedy="lower optim.lr, or model.precision=fp32; the checkpoints before this step are whole",
            )
