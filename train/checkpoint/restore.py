"""A checkpoint -> an engine of any kind, at any number of ranks, wherever its pieces are."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import torch

from configs.errors import CheckpointError
from configs.schema.outputs import Storage
from train.checkpoint.collect import Machines
from train.checkpoint.layout import CheckpointReader, Entry, Index, TrainerState, rank_file, read_index, way_back
from train.checkpoint.rng import check_rng_states, derived_seed, set_rng_states
from train.checkpoint.together import together
from train.engine.base import Engine, Fragment, World

T = TypeVar("T")
SHOWN = 8
"""Differences named in a message."""
Note = Callable[[str], None]
Beat = Callable[[], None]


def restore_latest(
    engine: Engine,
    folder: Path,
    world: World,
    *,
    storage: Storage,
    run_id: str,
    note: Note,
    beat: Beat = lambda: None,
) -> TrainerState:
    """Goes on from the newest checkpoint, wherever its pieces are. Called on all ranks.

    A damaged one is not passed over: steps would be done again unasked. The message offers the one before it.

    Args:
        engine: see `restore`.
        folder: the run's ``checkpoints``.
        world: the engine's.
        storage: resolved, see `resolve_storage`.
        run_id: of the run; a checkpoint of another one is refused.
        note: takes lines for the user.
        beat: called after each file that was checked and each piece that was read.

    Raises:
        CheckpointError: there is none, or see `restore`.
    """
    machines = Machines(folder, world, storage, note)
    return _restore(engine, machines.newest(), machines, run_id, beat)


def restore(
    engine: Engine, path: Path, world: World, *, storage: Storage = Storage.shared, run_id: str | None = None
) -> TrainerState:
    """Overwrites trained weights, optimizer state and random generators with those of `path`. Called on all ranks.

    Generators go on where they stood if the number of ranks (and, for the device's own, the kind of device) is the
    same, else from a seed made of (seed, step, rank).
    Memory: what the engine holds anyway, and pages of the mapped files.

    Args:
        engine: of any kind; also one that has taken steps.
        path: a ``step-...`` folder.
        world: the engine's.
        storage: resolved, see `resolve_storage`.
        run_id: of the run; None: any.

    Returns:
        The trainer state at the time of the save.

    Raises:
        CheckpointError: incomplete or damaged, or of another model, optimizer or run; on every rank, and nothing has
            been overwritten then.
        StorageError: a piece of another machine cannot be written where it is needed.
    """
    return _restore(engine, path, Machines(path.parent, world, storage, lambda line: None), run_id, lambda: None)


def _restore(engine: Engine, path: Path, machines: Machines, run_id: str | None, beat: Beat) -> TrainerState:
    world = machines.world
    index = _agreed(world, path, lambda: _fitting_index(engine, path, run_id))
    needed = _needed(engine, index, world)
    share = machines.collect(path, index, needed)
    reader = _agreed(world, path, lambda: _verified(engine, path, needed, share, world, beat))
    with reader, torch.no_grad():
        engine.prepare_restore()
        for fragment in engine.fragments(owned=False):
            entry = reader.params[fragment.name]
            fragment.make_state(entry.kinds, entry.scalars)
            for kind in entry.kinds:
                reader.read_into(fragment.view(kind), fragment.name, kind, fragment.offset)
                beat()
        engine.finish_restore(reader.state.step)
        seed = derived_seed(reader.state.seed, reader.state.step, world.rank)
        if reader.world_size == world.size:
            set_rng_states(reader.rng_states(world.rank), engine.device, otherwise=seed)
        else:
            engine.device.seed(seed)
    world.barrier()
    return reader.state


def _agreed(world: World, path: Path, work: Callable[[], T]) -> T:
    """What `work` gives on this rank, once it has succeeded on all; if it failed on any, all raise."""
    found: list[T] = []
    together(world, path, lambda: found.append(work()))
    return found[0]


def _fitting_index(engine: Engine, path: Path, run_id: str | None) -> Index:
    index = read_index(path)
    if run_id is not None and index.run_id != run_id:
        raise CheckpointError(
            str(path),
            f"belongs to another run: its run_id is {index.run_id or 'empty'}, that of this run {run_id or 'empty'}",
            remedy=f"put it back into the folder of its run; here, {way_back(path)}",
        )
    _check_same_model(engine, path, index)
    _check_counters(engine.fragments(owned=False), path, index)
    return index


def _needed(engine: Engine, index: Index, world: World) -> set[str]:
    """Files that hold something of this rank."""
    files = {rank_file(world.rank)} if index.world_size == world.size else set()
    for fragment in engine.fragments(owned=False):
        begin, end = fragment.offset, fragment.offset + fragment.numel
        pieces = index.params[fragment.name].fragments
        files |= {piece.file for piece in pieces if piece.offset < end and begin < piece.offset + piece.numel}
    return files


def _verified(
    engine: Engine, path: Path, needed: Collection[str], share: Collection[str], world: World, beat: Beat
) -> CheckpointReader:
    """The checkpoint, opened; the hashes of a folder's files are shared out among its ranks."""
    reader = CheckpointReader(path, verify=False, only=needed)
    for file in share:
        reader.verify([file])
        beat()
    if reader.world_size == world.size:
        try:
            check_rng_states(reader.rng_states(world.rank), engine.device)
        except ValueError as error:
            raise CheckpointError(str(path / rank_file(world.rank)), str(error), remedy=way_back(path)) from error
    return reader


def _check_same_model(engine: Engine, path: Path, index: Index) -> None:
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.trained.items()}
    differences = [f"{name} is not in the checkpoint" for name in shapes if name not in index.params]
    differences += [f"{name} is not trained in this run" for name in index.params if name not in shapes]
    differences += [
        f"{name} is {list(shapes[name])} here, {list(entry.shape)} in the checkpoint"
        for name, entry in index.params.items()
        if name in shapes and shapes[name] != entry.shape
    ]
    if index.optimizer != engine.optim._target_:
        differences.append(f"the optimizer is {engine.optim._target_} here, {index.optimizer} in the checkpoint")
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(
            str(path),
            "belongs to another model: " + "; ".join(differences[:SHOWN]) + more,
            remedy="resume with the model, tuning and optim settings of the run that saved it; if an older version of "
            "crosstune began it and these are the same, go on with that version (run.json says which), or export what "
            f"it has: crosstune export run_dir={shlex.quote(str(path.parent.parent))}",
        )


def _check_counters(fragments: list[Fragment], path: Path, index: Index) -> None:
    """Where an engine keeps several parameters in one tensor, the optimizer has one step count for all of them."""
    first: dict[int, tuple[str, Entry]] = {}
    for fragment in fragments:
        entry = index.params[fragment.name]
        name, other = first.setdefault(id(fragment.flat), (fragment.name, entry))
        if (entry.kinds, entry.scalars) != (other.kinds, other.scalars):
            raise CheckpointError(
                str(path), f"{fragment.name} and {name} have different optimizer steps", remedy="sharding=plain"
            )
