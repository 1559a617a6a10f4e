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

from configs.errors import StoppedError
from configs.schema.guard import GuardConfig
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import TrainerState
from train.data.collate import Batch
from train.data.prepared import PreparedSplit
from train.data.sampler import GlobalStep, RowLayout, StepSampler, batches_of, chunks, share_of
from train.devices.base import Device
from train.engine.base import Engine, World
from train.guard.agreement import must_agree, not_compared
from train.guard.heartbeat import Heartbeat, Phase
from train.guard.nonfinite import NonFinite
from train.guard.rollback import Rollback
from train.guard.spikes import Spike, SpikeDetector
from train.guard.stop import StopRequests
from train.objectives.base import Objective
from train.objectives.totals import Totals
from train.schedule import Schedule

Record = dict[str, Any]
"""A line of metrics.jsonl. ``loss`` and ``grad_norm`` are None where there is none, or none that is finite; such a step
says in ``skipped`` why it changed no weight: ``nonfinite``, or ``spike`` where its data were left out."""
FIGURES = ("loss", "validation_loss")
"""What a checkpoint says of its step, so that the best ones can be told."""


class Hook:
    """What may happen around the steps, in this order, on every rank.

    ``on_start`` once; ``on_step`` after each optimizer step, and after the validation loss was measured where that was
    due; ``on_save`` and ``on_checkpoint`` around a save; ``on_end`` once, also when the loop fails. ``on_note`` and
    ``on_rollback`` at any time between.
    """

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Before the first step; `first_step` is above 0 when resumed."""

    def on_step(self, record: Record) -> None:
        """After a step."""

    def on_save(self, step: int) -> None:
        """A checkpoint of this step is about to be written."""

    def on_checkpoint(self, path: Path) -> None:
        """A checkpoint is complete, maybe that of an earlier step: they are written while the steps go on."""

    def on_note(self, text: str) -> None:
        """Something out of the ordinary that the user should know of; the same text on every rank."""

    def on_rollback(self, step: int) -> None:
        """The run goes on from this earlier step: what came after it will be taken again."""

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
    guard: GuardConfig = field(default_factory=GuardConfig)
    _stopping: bool = field(default=False, init=False)
    """Some rank was asked to stop; the same on all."""

    def __post_init__(self) -> None:
        run = self.checkpointer.folder.parent
        self._nonfinite = NonFinite(run, self.guard.nonfinite_limit, self.world, self.sampler.split)
        self._spikes = SpikeDetector(self.guard.spike_zscore, self.guard.spike_window)

    def run(self, state: TrainerState) -> TrainerState:
        """Takes the steps from `state.step` to `total_steps` and leaves a checkpoint of the last.

        Raises:
            RunFailedError: too many steps were not finite, or too many losses spikes; or ranks hold different weights.
            StoppedError: a rank was asked to stop; there is a checkpoint of the last step taken.
            StorageError: a checkpoint could not be written.
        """
        for hook in self.hooks:
            hook.on_start(state.step, self.total_steps)
        try:
            self.checkpointer.require_room()
            self._rollback = Rollback(self.guard, self.checkpointer)
            state = self._begin(state)
            while state.step < self.total_steps:
                record = self.take_step(state)
                if (spike := self._spike(state, record)) is not None:
                    state = self._go_back(spike)
                else:
                    self._finish_step(state, record)
        finally:
            for hook in self.hooks:
                hook.on_end()
        return state

    def _begin(self, state: TrainerState) -> TrainerState:
        """What the guards need before the first step."""
        if self.guard.agreement_every and (left_out := not_compared(self.engine)):
            self._note(left_out)
        if self._rollback.cut_off(state):
            return self._return()
        if self._rollback.lacks_start(state):
            self.save(state, {})
            self.finish_saves()
        return state

    def _finish_step(self, state: TrainerState, record: Record) -> None:
        """What follows a step that counts."""
        if self._due(self.eval_every, state.step) and self.validation is not None:
            record["validation_loss"] = _finite(self.validation_loss(self.validation))
        for hook in self.hooks:
            hook.on_step(record)
        last = state.step == self.total_steps
        save = self._due(self.checkpoint_every, state.step) or last or self._stopping
        if self.guard.agreement_every and (save or self._due(self.guard.agreement_every, state.step)):
            self.heartbeat.enter(Phase.guard)
            must_agree(self.engine, state.step)
        if save:
            self.save(state, record)
        if last or self._stopping:
            self.finish_saves(last=True)
        if self._stopping:  # after the last step too: an export that would follow was asked to stop as well
            raise self._stopped(state)
        self._tell_of_checkpoints()

    def take_step(self, state: TrainerState) -> Record:
        """One global step; advances `state`."""
        started = time.perf_counter()
        self.heartbeat.enter(Phase.data, state.step + 1)
        step = self.sampler.step(state.step)
        lr = self.peak_lr * self.schedule(state.step)
        skip = state.step + 1 in self._rollback.skipped
        totals, grad_norm = (None, math.nan) if skip else self._train_on(step, lr)
        sums, gauges, sound = self._agree(totals, grad_norm)
        means = totals.means(sums) if totals else {}
        state.epoch = self.sampler.plan.position(state.step).epoch
        state.step += 1
        record = {
            "step": state.step,
            "loss": _finite(means.pop("loss", math.nan)),
            "lr": lr,
            "grad_norm": _finite(grad_norm),
            "tokens": step.num_tokens if totals else 0,
            "supervised_tokens": step.num_targets if totals else 0,
            "tokens_per_second": (step.num_tokens if totals else 0) / (time.perf_counter() - started),
            "peak_gib": self.device.peak_memory_bytes() / 2**30,
            "data_hash": self.sampler.data_hash(step),
        }
        if totals is None:
            return record | {"skipped": "spike"}
        record |= {name: _finite(value) for name, value in (means | gauges).items()}
        state.samples_seen += len(step.samples)
        state.tokens_seen += step.num_tokens
        if not sound:
            self.heartbeat.enter(Phase.guard)
            self._note(self._nonfinite.skip(state, step, totals.losses, sums["loss"], grad_norm))
            record["skipped"] = "nonfinite"
        return record

    def _train_on(self, step: GlobalStep, lr: float) -> tuple[Totals, float]:
        """What this rank's micro-batches add up to, and the gradient's norm; the weights have taken the step."""
        self.engine.module.train()
        totals = Totals(step)
        last = len(step.micro_batches) - 1
        for i, batch in enumerate(self._batches(step)):
            self.heartbeat.enter(Phase.forward)
            loss = totals.add(self.objective.terms(self.engine.forward, batch))
            self.heartbeat.enter(Phase.backward)
            self.engine.backward(loss, last=i == last)
            # The graph goes with it: its nodes are small, but on a host they lie between the holes that activations
            # left, which the optimizer can use once they are one.
            del loss
        self.heartbeat.enter(Phase.optimizer)
        grad_norm = self.engine.step(lr)
        totals.read()
        return totals, grad_norm

    def _batches(self, step: GlobalStep) -> Iterator[Batch]:
        """This rank's micro-batches; their making is a phase of its own."""
        batches = self.sampler.batches(step)
        while True:
            self.heartbeat.enter(Phase.data)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _agree(self, totals: Totals | None, grad_norm: float) -> tuple[dict[str, float], dict[str, float], bool]:
        """Over all ranks: what the terms add up to, the highest of each gauge, and whether all is finite.

        On the way each rank hears whether any wants to stop or could not save.
        """
        self.heartbeat.enter(Phase.collective)
        wish, fault = self.stop.wanted(), self.checkpointer.fault()
        flags = (not math.isfinite(grad_norm), wish is not None, fault is not None)
        sums, gauges = (totals.sums, self.objective.gauges()) if totals else ({}, {})
        # A gauge is summed with zeros of the other ranks, in a place for each: so one collective does.
        size, mine = self.world.size, self.world.rank
        places = [value if rank == mine else 0.0 for value in gauges.values() for rank in range(size)]
        found = self.world.all_reduce_sum([*map(float, flags), *sums.values(), *places])
        odd, wishes, faults = found[: len(flags)]
        self._stopping = wishes > 0
        if faults:
            self.checkpointer.wait()  # raises on every rank
        rest = iter(found[len(flags) :])
        summed = {name: next(rest) for name in sums}
        highest = {name: max(next(rest) for _ in range(size)) for name in gauges}
        return summed, highest, all(map(math.isfinite, summed.values())) and not odd

    def _spike(self, state: TrainerState, record: Record) -> Spike | None:
        """The spike that the step's loss is."""
        return None if "skipped" in record else self._spikes.spike(state, record["loss"])

    def _go_back(self, spike: Spike) -> TrainerState:
        """To a checkpoint before the spike; the data that made it are left out from now on."""
        self.finish_saves()
        self.heartbeat.enter(Phase.guard)
        self._note(self._rollback.plan(spike))
        return self._return()

    def _return(self) -> TrainerState:
        self.heartbeat.enter(Phase.guard)
        state = self._rollback.go()
        for hook in self.hooks:
            hook.on_rollback(state.step)
        return state

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
        self.checkpointer.save(state, {name: record[name] for name in FIGURES if record.get(name) is not None})

    def finish_saves(self, last: bool = False) -> None:
        """Waits until the last checkpoint is complete; at the last of all it must be."""
        self.heartbeat.enter(Phase.save)
        self.checkpointer.wait(last=last)
        self._tell_of_checkpoints()

    def _tell_of_checkpoints(self) -> None:
        for path in self.checkpointer.finished():
            for hook in self.hooks:
                hook.on_checkpoint(path)

    def _note(self, text: str) -> None:
        for hook in self.hooks:
            hook.on_note(text)

    def _stopped(self, state: TrainerState) -> StoppedError:
        folder = self.checkpointer.folder.parent
        self.stop.honoured()
        return StoppedError(
            str(folder),
            f"stopped by {self.stop.reason()} after step {state.step} of {self.total_steps}, saved",
            remedy=f"crosstune resume {shlex.quote(str(folder))}",
        )

    @staticmethod
    def _due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0


def _finite(value: float) -> float | None:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else None
