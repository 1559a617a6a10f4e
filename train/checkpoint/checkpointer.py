"""The checkpoints of a running run: when there is room they are written behind the steps, and old ones go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from configs.errors import NoRoomError, OutOfMemoryError
from configs.schema.outputs import CheckpointConfig, OnFullDisk, SaveMode, Storage
from train.checkpoint.files import discard
from train.checkpoint.host_memory import available_bytes
from train.checkpoint.layout import TrainerState, checkpoints, step_of
from train.checkpoint.retention import Retention
from train.checkpoint.room import copies_by_machine, expected_bytes, memory_holds, require_room
from train.checkpoint.save import Moment, clear_torn, needed_in, site_of, write_checkpoint
from train.checkpoint.snapshot import HostCopy, Share, Tensors, live_share
from train.checkpoint.together import together
from train.engine.base import Engine, World
from train.units import in_gib

Note = Callable[[str], None]
LOOK_SECONDS = 1
"""How often a rank that waits for its writer tells that the writer advances."""
CLOSE_SECONDS = 20
"""Time that a save under way has to finish when the run ends by a fault."""


class Checkpointer:
    """Saves a run's state. Every method but `fault`, `finished` and `close` is called on all ranks, between steps.

    At most one checkpoint is being written; the next save waits for it.

    Memory: with asynchronous saves a copy of what this rank answers for, kept for the next save.

    Args:
        engine: whose trained weights and optimizer state are saved.
        folder: the run's ``checkpoints``.
        cfg: the checkpoint group.
        world: the engine's.
        storage: resolved, see `resolve_storage`.
        run_id: of the run, written into each checkpoint.
        note: takes lines for the user, from any thread.
        beat: called while the steps wait for a writer that advances, or for a load in a roll-back.
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
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.folder, self.cfg, self.world = engine, folder, cfg, world
        self.storage, self.run_id, self.note, self.beat = storage, run_id, note, beat
        self._site = site_of(engine, folder, world, storage, run_id)
        self._retention = Retention(folder, cfg)
        self._copy = HostCopy(engine.device, note)
        self._writer: _Writer | None = None
        self._finished: list[Path] = []
        self._missing: NoRoomError | None = None
        self._waits_said = False

    def require_room(self) -> None:
        """Before the first step: there is room for the next checkpoint. Clears what killed saves left behind.

        Raises:
            NoRoomError: there is not; says how much is missing.
        """
        site, world = self._site, self.world
        clear_torn(site, world)
        answers = together(world, self.folder, lambda: {"owner": site.owner, "bytes": expected_bytes(self.engine)})
        needed = needed_in(site, answers)
        together(world, self.folder, lambda: require_room(self.folder, needed) if site.owned_by(world) else None)

    def save(self, state: TrainerState, metrics: Mapping[str, float]) -> None:
        """Begins a checkpoint of this state; it is complete when `finished` names it, or after `wait`.

        Raises:
            StorageError: this or the former one could not be written; on every rank.
            OutOfMemoryError: the host does not hold the copy of an asynchronous save; on every rank.
        """
        self._settle()
        share, tensors, answers = self._look()
        asynchronous = self._asynchronous(answers)
        if asynchronous:
            share = self._copied(share, tensors)
        # The steps go on changing theirs.
        moment = Moment(share, copy.deepcopy(state), dict(metrics), needed_in(self._site, answers))
        if asynchronous:
            self._writer = _Writer(lambda on_chunk: self._write(self.world.in_background(), moment, on_chunk))
            self._writer.start()
        else:
            self._take(_outcome(lambda: self._write(self.world, moment, self.beat)))

    def finished(self) -> list[Path]:
        """Checkpoints that became complete since the last call."""
        if self._writer is not None and not self._writer.is_alive() and self.fault() is None:
            self._settle()
        found, self._finished = self._finished, []
        return found

    def fault(self) -> Exception | None:
        """What befell the writers since the last `save`; the loop tells the other ranks and calls `wait`.

        All writers fail together, but the ranks may hear of it at different steps.
        """
        done = self._writer is not None and not self._writer.is_alive()
        outcome = self._writer.outcome if self._writer is not None and done else None
        return outcome if isinstance(outcome, Exception) and not self._tolerated(outcome) else None

    def wait(self, last: bool = False) -> None:
        """Returns when no checkpoint is being written.

        Args:
            last: nothing will be saved after this, so that also a full disk that the run went on with is a fault.

        Raises:
            StorageError: one could not be written, on every rank; the earlier ones are untouched.
        """
        self._settle()
        if last and self._missing is not None:
            raise self._missing

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints of later steps: the run goes back before them. Nothing may be under way.

        Raises:
            StorageError: one cannot be renamed; on every rank.
        """

        def discard_later() -> None:
            for path in checkpoints(self.folder) if self._site.owned_by(self.world) else ():
                if step_of(path) > step:
                    discard(path)

        together(self.world, self.folder, discard_later)

    def close(self) -> None:
        """Gives a save under way a little time, then leaves it; nothing of it is left under its final name.

        Unless `wait` has been called, the run has failed, and other ranks may be gone: then a writer would wait long.
        """
        if self._writer is not None:
            self._writer.join(CLOSE_SECONDS)
            self._writer = None

    def _look(self) -> tuple[Share, Tensors, list[dict[str, Any]]]:
        """This rank's share, live, and what every rank says of its own."""
        found: list[tuple[Share, Tensors]] = []

        def look() -> dict[str, Any]:
            share, tensors = live_share(self.engine)
            found.append((share, tensors))
            return {
                "owner": self._site.owner,
                "bytes": share.nbytes,
                "copy": max(0, share.nbytes - self._copy.capacity),
                "memory": available_bytes(),
                "leads_node": self.world.leads_node,
            }

        answers = together(self.world, self.folder, look)
        return *found[0], answers

    def _asynchronous(self, answers: list[dict[str, Any]]) -> bool:
        """Whether to write behind the steps; the same on all ranks."""
        if self.cfg.mode is SaveMode.synchronous:
            return False
        if self.cfg.mode is SaveMode.asynchronous:
            for needed, free in copies_by_machine(answers):
                if needed > free:  # Linux would grant it, and then kill a process without a word
                    raise self._no_memory(needed, "the copies of a machine's ranks")
            return True
        if self.cfg.every == 0:  # one checkpoint, at the end: no step could go on meanwhile
            return False
        if memory_holds(answers):
            return True
        if not self._waits_said:
            self._waits_said = True
            self.note("checkpoint.mode=auto: the host's memory does not hold a copy of the state: steps wait for saves")
        return False

    def _copied(self, share: Share, tensors: Tensors) -> Share:
        """The share as it is now, on the host."""
        found: list[Share] = []

        def copied() -> None:
            try:
                found.append(self._copy.take(share, tensors))
            except (RuntimeError, MemoryError) as error:
                if not self.engine.device.is_out_of_memory(error):
                    raise
                raise self._no_memory(share.nbytes, f"the copy of rank {self.world.rank}") from error

        together(self.world, self.folder, copied)
        return found[0]

    def _no_memory(self, size: int, what: str) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"checkpoint.mode={self.cfg.mode.value}",
            f"free host memory does not hold {what}, {in_gib(size)}",
            remedy="checkpoint.mode=auto (asynchronous where it fits), or synchronous",
        )

    def _write(self, world: World, moment: Moment, on_chunk: Callable[[], None]) -> Path:
        """Writes and then prunes; in the writer's thread, or in that of the steps."""
        path = write_checkpoint(self._site, world, moment, on_chunk)
        if self._site.owned_by(world):
            try:
                gone = self._retention.after(path, moment.metrics)
            except OSError as error:  # the new one stands; the next save tries again
                self.note(f"checkpoint: an old one cannot be removed: {error}")
            else:
                if later := [old.name for old in gone if step_of(old) > moment.state.step]:
                    self.note(f"checkpoint: the run went back before {', '.join(later)}, which no longer count")
        return path

    def _settle(self) -> None:
        """Waits for the writer and takes what came of it."""
        if self._writer is None:
            return
        seen = -1
        while self._writer.is_alive():
            self._writer.join(LOOK_SECONDS)
            if self._writer.chunks != seen:
                seen = self._writer.chunks
                self.beat()
        outcome, self._writer = self._writer.outcome, None
        self._take(outcome)

    def _take(self, outcome: Path | Exception | None) -> None:
        assert outcome is not None, "a writer ends with a path or a fault"
        if isinstance(outcome, Path):
            self._finished.append(outcome)
            self._missing = None
        elif self._tolerated(outcome):
            assert isinstance(outcome, NoRoomError)
            self._missing = outcome
            self.note(f"checkpoint not saved, the run goes on (checkpoint.on_full_disk): {outcome}")
        else:
            raise outcome

    def _tolerated(self, fault: Exception) -> bool:
        return isinstance(fault, NoRoomError) and self.cfg.on_full_disk is OnFullDisk.go_on


class _Writer(Thread):
    """Writes one checkpoint. A daemon: a process that ends by a fault does not wait for it."""

    def __init__(self, work: Callable[[Callable[[], None]], Path]) -> None:
        super().__init__(name="checkpoint-writer", daemon=True)
        self._work = work
        self.outcome: Path | Exception | None = None
        self.chunks = 0

    def run(self) -> None:
        self.outcome = _outcome(lambda: self._work(self._advanced))

    def _advanced(self) -> None:
        self.chunks += 1


def _outcome(work: Callable[[], Path]) -> Path | Exception:
    try:
        return work()
    except Exception as error:
        return error
