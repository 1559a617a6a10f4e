"""After a loss spike the run goes back to a checkpoint before the offending steps and leaves their data out.

What is left out is kept in ``RUN/guard.json``, written before the run goes back: a crash at any moment later, and every
resume, finds it. Where each machine keeps a folder of its own the file is on rank 0's; another machine in its place
knows nothing of former spikes and finds them again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, RunFailedError
from configs.schema.guard import GuardConfig
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.files import sync_folder, write_synced
from train.checkpoint.layout import TrainerState, checkpoints, step_folder, step_of
from train.checkpoint.restore import restore_latest
from train.checkpoint.together import together
from train.engine.base import World
from train.guard.spikes import Spike

FILE = "guard.json"


@dataclass
class Ledger:
    """``guard.json``: which steps' data are left out, and why. Every rank holds the same."""

    path: Path
    world: World
    run_id: str
    skipped: set[int] = field(default_factory=set)
    """Steps, counted from 1."""
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    pending: int | None = None
    """The run is on its way back to the checkpoint of this step: newer ones are void."""

    @classmethod
    def open(cls, path: Path, world: World, run_id: str) -> Ledger:
        """What rank 0 finds; called on all ranks. A file of another run that had this folder does not count.

        Raises:
            CheckpointError: the file is damaged; on every rank.
            StorageError: it cannot be read; on every rank.
        """

        def read() -> dict[str, Any] | None:
            if world.rank != 0 or not path.exists():
                return None
            try:
                return _checked(json.loads(path.read_bytes()))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(
                    str(path),
                    f"damaged: {error!r}",
                    remedy="it says which steps' data are left out after loss spikes; without it they are found again",
                ) from None

        content = together(world, path, read)[0]
        if content is None or content["run_id"] != run_id:
            return cls(path, world, run_id)
        return cls(path, world, run_id, set(content["skipped_steps"]), content["rollbacks"], content["pending"])

    def record(self, spike: Spike, skipped: Sequence[int], to: int) -> None:
        """Before the run goes back: all that a crash must not forget.

        Raises:
            StorageError: it cannot be written; on every rank.
        """
        self.skipped |= set(skipped)
        self.pending = to
        facts = {"skipped_steps": list(skipped), "to_step": to, "time": time.time()}
        self.rollbacks.append(asdict(spike) | facts)
        self._write()

    def done(self) -> None:
        """The newer checkpoints are gone.

        Raises:
            StorageError: it cannot be written; on every rank.
        """
        self.pending = None
        self._write()

    def _write(self) -> None:
        def write() -> None:
            if self.world.rank == 0:
                content = {
                    "run_id": self.run_id,
                    "skipped_steps": sorted(self.skipped),
                    "rollbacks": self.rollbacks,
                    "pending": self.pending,
                }
                partial = self.path.with_suffix(".tmp")
                write_synced(partial, json.dumps(content, indent=1).encode())
                partial.replace(self.path)
                sync_folder(self.path.parent)

        together(self.world, self.path, write)


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """The file's content if it is of the right form.

    Raises:
        ValueError: it is not; so do `KeyError` and `TypeError` say.
    """
    steps, pending = content["skipped_steps"], content["pending"]
    numbers = steps + ([] if pending is None else [pending])
    if not all(type(step) is int and step >= 0 for step in numbers):
        raise ValueError("steps are whole numbers")
    if not all(isinstance(entry, dict) for entry in content["rollbacks"]):
        raise ValueError("rollbacks are objects")
    return {name: content[name] for name in ("run_id", "skipped_steps", "rollbacks", "pending")}


class Rollback:
    """The way back. Every method is called on all ranks, between steps, while no checkpoint is being written.

    Args:
        cfg: the guard group.
        checkpointer: of the run.
    """

    def __init__(self, cfg: GuardConfig, checkpointer: Checkpointer) -> None:
        self.cfg, self.checkpointer, self.world = cfg, checkpointer, checkpointer.world
        self.ledger = Ledger.open(checkpointer.folder.parent / FILE, self.world, checkpointer.run_id)

    @property
    def skipped(self) -> set[int]:
        """Steps, counted from 1, whose data are left out."""
        return self.ledger.skipped

    def plan(self, spike: Spike) -> str:
        """Decides how far back and what is left out, and makes that durable; `go` follows.

        Returns:
            A line for the user.

        Raises:
            RunFailedError: too many spikes, or there is no checkpoint to go back to.
            StorageError: the decision cannot be written.
        """
        if len(self.ledger.rollbacks) >= self.cfg.spike_limit:
            raise RunFailedError(
                f"step {spike.step}",
                f"{spike}, after guard.spike_limit={self.cfg.spike_limit} roll-backs",
                remedy="lower optim.lr in a new run, or look at the data of these steps; "
                f"{self.ledger.path} lists all spikes",
            )
        first = max(1, spike.step - self.cfg.spike_skip_before)
        to = self._target(spike, first)
        steps = list(range(max(first, to + 1), spike.step + 1))
        self.ledger.record(spike, steps, to)
        of_limit = f"{len(self.ledger.rollbacks)} of guard.spike_limit={self.cfg.spike_limit}"
        return f"{spike}: back to step {to}, without the data of step {_span(steps)} ({of_limit})"

    def go(self) -> TrainerState:
        """Back to where `plan` has decided, or where a crash cut off the way."""
        to = self.ledger.pending
        assert to is not None, "plan comes first"
        self.checkpointer.discard_after(to)
        state = restore_latest(
            self.checkpointer.engine,
            self.checkpointer.folder,
            self.world,
            storage=self.checkpointer.storage,
            run_id=self.checkpointer.run_id,
            note=self.checkpointer.note,
            beat=self.checkpointer.beat,
        )
        self.ledger.done()
        return state

    def cut_off(self, state: TrainerState) -> bool:
        """Whether the run, just resumed at `state`, had not come all the way back when it ended."""
        pending = self.ledger.pending
        if pending is not None and state.step <= pending:
            self.ledger.done()
            return False
        return pending is not None

    def lacks_start(self, state: TrainerState) -> bool:
        """Whether a spike would find nowhere to go back to, since nothing is saved yet.

        A run resumed at its very beginning has that checkpoint: to write it again would put the only one at stake.
        """
        if not self.cfg.spike_zscore or state.step:
            return False
        folder = self.checkpointer.folder
        return not together(self.world, folder, lambda: step_folder(folder, 0) in checkpoints(folder))[0]

    def _target(self, spike: Spike, first: int) -> int:
        """The newest checkpoint before step `first`; where none was kept, the newest before the spike."""

        def choose() -> int | None:
            saved = [step_of(path) for path in checkpoints(self.checkpointer.folder)] if self.world.rank == 0 else []
            before = [step for step in saved if step < first] or [step for step in saved if step < spike.step]
            return max(before, default=None)

        to = together(self.world, self.checkpointer.folder, choose)[0]
        if to is None:
            raise RunFailedError(
                f"step {spike.step}",
                f"{spike}, and no earlier checkpoint to go back to",
                remedy="checkpoint.every=STEPS",
            )
        return int(to)


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else str(steps[0])
