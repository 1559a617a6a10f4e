"""The one step loop. It knows the bases only: engine, objective, sampler, schedule, hooks."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from configs.errors import RunFailedError, StoppedError
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import TrainerState
from train.data.collate import Batch
from train.data.prepared import PreparedSplit
from train.data.sampler import GlobalStep, RowLayout, StepSampler, batches_of, chunks, share_of
from train.devices.base import Device
from train.engine.base import Engine, World
from train.guard.heartbeat import Heartbeat, Phase
from train.guard.stop import StopRequests
from train.objectives.base import Objective
from train.schedule import Schedule

Record = dict[str, Any]
"""A line of metrics.jsonl."""
FIGURES = ("loss", "validation_loss")
"""What a checkpoint says of its step, so that the best ones can be told."""


class Hook:
    """What may happen around the steps, in this order, on every rank.

    ``on_start`` once; ``on_step`` after each optimizer step, and after the validation loss was measured where that was
    due; ``on_save`` and ``on_checkpoint`` around a save; ``on_end`` once, also when the loop fails.
    """

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Before the first step; `first_step` is above 0 when resumed."""

    def on_step(self, record: Record) -> None:
        """After a step."""

    def on_save(self, step: int) -> None:
        """A checkpoint of this step is about to be written."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is complete, maybe that of an earlier step: they are written while the steps go on."""

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
    checkpointer: Checkpointer
    checkpoint_every: int
    validation: PreparedSplit | None
    eval_every: int
    stop: StopRequests
    heartbeat: Heartbeat
    hooks: Sequence[Hook]
    _stopping: bool = field(default=False, init=False)
    """Some rank was asked to stop; the same on all."""
    _reason: str = field(default="another rank", init=False)

    def run(self, state: TrainerState) -> TrainerState:
        """Takes the steps from `state.step` to `total_steps` and leaves a checkpoint of the last.

        Raises:
            RunFailedError: the loss or the gradient is not finite.
            StoppedError: a rank was asked to stop; there is a checkpoint of the last step taken.
            StorageError: a checkpoint could not be written.
        """
        for hook in self.hooks:
            hook.on_start(state.step, self.total_steps)
        try:
            self.checkpointer.require_room()
            while state.step < self.total_steps:
                record = self.take_step(state)
                if self._due(self.eval_every, state.step) and self.validation is not None:
                    record["validation_loss"] = self.validation_loss(self.validation)
                for hook in self.hooks:
                    hook.on_step(record)
                last = state.step == self.total_steps
                if self._due(self.checkpoint_every, state.step) or last or self._stopping:
                    self.save(state, record)
                if last or self._stopping:
                    self.finish_saves()
                if self._stopping and not last:
                    raise self._stopped(state)
                self._tell_of_checkpoints()
        finally:
            for hook in self.hooks:
                hook.on_end()
        return state

    def take_step(self, state: TrainerState) -> Record:
        """One global step; advances `state`."""
        started = time.perf_counter()
        self.heartbeat.enter(Phase.data, state.step + 1)
        step = self.sampler.step(state.step)
        lr = self.peak_lr * self.schedule(state.step)
        self.engine.module.train()
        losses: list[torch.Tensor] = []
        last = len(step.micro_batches) - 1
        for i, batch in enumerate(self._batches(step)):
            self.heartbeat.enter(Phase.forward)
            loss = self.objective.loss_sum(self.engine.forward, batch)
            self.heartbeat.enter(Phase.backward)
            self.engine.backward(loss / step.num_targets, last=i == last)
            losses.append(loss.detach())  # to be read once the step is queued: reading waits for the device
        self.heartbeat.enter(Phase.optimizer)
        grad_norm = self.engine.step(lr)
        loss_sum = torch.stack(losses).cpu().double().sum().item()  # not every device knows fp64
        total = self._agree(loss_sum)
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

    def _batches(self, step: GlobalStep) -> Iterator[Batch]:
        """This rank's micro-batches; their making is a phase of its own."""
        batches = self.sampler.batches(step)
        while True:
            self.heartbeat.enter(Phase.data)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _agree(self, loss_sum: float) -> float:
        """The loss over all ranks; on the way each hears whether any wants to stop or could not save."""
        self.heartbeat.enter(Phase.collective)
        wish, fault = self.stop.wanted(), self.checkpointer.fault()
        if wish is not None:
            self._reason = wish
        sums = self.world.all_reduce_sum([loss_sum, float(wish is not None), float(fault is not None)])
        total, wishes, faults = sums
        self._stopping = wishes > 0
        if faults:
            self.checkpointer.wait()  # raises on every rank
        return total

    @torch.no_grad()
    def validation_loss(self, split: PreparedSplit) -> float:
        """Mean loss per supervised token over a split, all ranks together."""
        self.heartbeat.enter(Phase.validation)
        rows: RowLayout = self.sampler.rows
        self.engine.module.eval()
        loss_sum, targets = 0.0, 0
        for samples in chunks(split, rows.micro_batch_tokens * rows.world_size):
            step = share_of(split, samples, rows)
            targets += step.num_targets
            for batch in batches_of(split, step, rows):
                self.heartbeat.beat()
                loss_sum += self.objective.loss_sum(self.engine.forward, batch).item()
        [total] = self.world.all_reduce_sum([loss_sum])
        return total / targets

    def save(self, state: TrainerState, record: Record) -> None:
        """Begins a checkpoint; a former one that is still being written is waited for."""
        self.heartbeat.enter(Phase.save)
        for hook in self.hooks:
            hook.on_save(state.step)
        figures: dict[str, float] = {
            name: float(record[name]) for name in ("loss", "validation_loss") if name in record
        }
        self.checkpointer.save(state, figures)

    def finish_saves(self) -> None:
        """Waits until the last checkpoint is complete."""
        self.heartbeat.enter(Phase.save)
        self.checkpointer.wait()
        self._tell_of_checkpoints()

    def _tell_of_checkpoints(self) -> None:
        for path in self.checkpointer.finished():
            for hook in self.hooks:
                hook.on_checkpoint(path)

    def _stopped(self, state: TrainerState) -> StoppedError:
        folder = self.checkpointer.folder.parent
        return StoppedError(
            str(folder),
            f"stopped by {self._reason} after step {state.step} of {self.total_steps}, saved",
            remedy=f"crosstune resume {shlex.quote(str(folder))}",
        )

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
