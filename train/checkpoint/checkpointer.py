"""The checkpoints of a running run: when there is room they are written behind the steps, and old ones go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from configs.errors import CrosstuneError
from configs.schema.outputs import CheckpointConfig, Storage
from train.checkpoint.layout import TrainerState
from train.checkpoint.retention import prune
from train.checkpoint.save import save
from train.engine.base import Engine, World

Note = Callable[[str], None]


class Checkpointer:
    """Saves a run's state. Every method but `fault` is called on all ranks, between steps.

    Args:
        engine: whose trained weights and optimizer state are saved.
        folder: the run's ``checkpoints``.
        cfg: the checkpoint group.
        world: the engine's.
        storage: resolved, see `resolve_storage`.
        run_id: of the run, written into each checkpoint.
        note: takes lines for the user.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        cfg: CheckpointConfig,
        world: World,
        *,
        storage: Storage,
        run_id: str,
        note: Note,
    ) -> None:
        self.engine, self.folder, self.cfg, self.world = engine, folder, cfg, world
        self.storage, self.run_id, self.note = storage, run_id, note
        self._finished: list[Path] = []

    def require_room(self) -> None:
        """Before the first step: there is room for the next checkpoint.

        Raises:
            StorageError: there is not; says how much is missing.
        """

    def save(self, state: TrainerState, metrics: Mapping[str, float]) -> None:
        """Begins a checkpoint of this state; it is complete when `finished` names it, or after `wait`."""
        path = save(self.engine, self.folder, state, self.world, run_id=self.run_id, metrics=metrics)
        self._finished.append(path)
        if self.world.rank == 0:
            prune(self.folder, self.cfg.keep_last)

    def finished(self) -> list[Path]:
        """Checkpoints that became complete since the last call."""
        found, self._finished = self._finished, []
        return found

    def fault(self) -> CrosstuneError | None:
        """What befell this rank's writer since the last `save`; the loop tells the other ranks and calls `wait`."""
        return None

    def wait(self) -> None:
        """Returns when no checkpoint is being written.

        Raises:
            StorageError: one could not be written, on every rank; the earlier ones are untouched.
        """

    def close(self) -> None:
        """Gives up what is still being written; nothing of it is left under its final name."""
