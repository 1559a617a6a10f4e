"""A checkpoint -> an engine of any kind, at any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from configs.errors import CheckpointError
from configs.schema.outputs import Storage
from train.checkpoint.layout import CheckpointReader, Entry, TrainerState
from train.checkpoint.retention import latest
from train.checkpoint.rng import derived_seed, set_rng_states
from train.engine.base import Engine, Fragment, World

SHOWN = 8
"""Differences named in a message."""


def restore_latest(
    engine: Engine, folder: Path, world: World, *, storage: Storage, run_id: str, note: Callable[[str], None]
) -> TrainerState:
    """Goes on from the newest checkpoint that is whole, wherever its pieces are. Called on all ranks.

    Args:
        engine: see `restore`.
        folder: the run's ``checkpoints``.
        world: the engine's.
        storage: resolved, see `resolve_storage`.
        run_id: of the run; a checkpoint of another one is refused.
        note: takes lines for the user.

    Raises:
        CheckpointError: there is none, or see `restore`.
    """
    return restore(engine, latest(folder), world)


def restore(engine: Engine, path: Path, world: World) -> TrainerState:
    """Overwrites trained weights, optimizer state and random generators with those of `path`. Called on all ranks.

    Generators go on where they stood if the number of ranks (and, for the device's own, the kind of device) is the
    same, else from a seed made of (seed, step, rank).
    Memory: what the engine holds anyway, and pages of the mapped files.

    Returns:
        The trainer state at the time of the save.

    Raises:
        CheckpointError: incomplete or damaged, or of another model or optimizer; nothing has been overwritten then.
    """
    reader = _open_together(engine, path, world)
    with reader, torch.no_grad():
        engine.prepare_restore()
        for fragment in engine.fragments(owned=False):
            entry = reader.params[fragment.name]
            fragment.make_state(entry.kinds, entry.scalars)
            for kind in entry.kinds:
                reader.read_into(fragment.view(kind), fragment.name, kind, fragment.offset)
        engine.finish_restore(reader.state.step)
        seed = derived_seed(reader.state.seed, reader.state.step, world.rank)
        if reader.world_size == world.size:
            set_rng_states(reader.rng_states(world.rank), engine.device, otherwise=seed)
        else:
            engine.device.seed(seed)
    world.barrier()
    return reader.state


def _open_together(engine: Engine, path: Path, world: World) -> CheckpointReader:
    """Checks everything that can be wrong, the hashes shared out among the ranks; if one objects, all raise."""
    fault: CheckpointError | None = None
    reader: CheckpointReader | None = None
    try:
        reader = CheckpointReader(path, verify=False)
        reader.verify(sorted(reader.files)[world.rank :: world.size])
        _check_same_model(engine, reader)
        _check_counters(engine.fragments(owned=False), reader)
    except CheckpointError as error:
        fault = error
    failed = world.all_reduce_sum([float(fault is not None)])[0]
    if fault is not None:
        raise fault
    if failed:
        raise CheckpointError(str(path), f"{int(failed)} other rank(s) refused it; their messages say why")
    assert reader is not None
    return reader


def _check_same_model(engine: Engine, reader: CheckpointReader) -> None:
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.trained.items()}
    differences = [f"{name} is not in the checkpoint" for name in shapes if name not in reader.params]
    differences += [f"{name} is not trained in this run" for name in reader.params if name not in shapes]
    differences += [
        f"{name} is {list(shapes[name])} here, {list(entry.shape)} in the checkpoint"
        for name, entry in reader.params.items()
        if name in shapes and shapes[name] != entry.shape
    ]
    if reader.optimizer != engine.optim._target_:
        differences.append(f"the optimizer is {engine.optim._target_} here, {reader.optimizer} in the checkpoint")
    if differences:
        more = f"; and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        raise CheckpointError(
            str(reader.path),
            "belongs to another model: " + "; ".join(differences[:SHOWN]) + more,
            remedy="resume with the model, tuning and optim settings of the run that saved it",
        )


def _check_counters(fragments: list[Fragment], reader: CheckpointReader) -> None:
    """Where an engine keeps several parameters in one tensor, the optimizer has one step count for all of them."""
    first: dict[int, tuple[str, Entry]] = {}
    for fragment in fragments:
        entry = reader.params[fragment.name]
        name, other = first.setdefault(id(fragment.flat), (fragment.name, entry))
        if (entry.kinds, entry.scalars) != (other.kinds, other.scalars):
            raise CheckpointError(
                str(reader.path), f"{fragment.name} and {name} have different optimizer steps", remedy="sharding=plain"
            )
