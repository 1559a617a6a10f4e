"""Writing a checkpoint: every rank its own pieces, rank 0 the index, then one rename.

All is written and synced under a temporary name, COMPLETE last; the rename makes it the run's newest checkpoint. Killed
at any moment, the run is left with the previous one. The ranks must see one file system.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from configs.errors import CrosstuneError, StorageError
from train.checkpoint.layout import (
    COMPLETE,
    INDEX,
    PARTIAL,
    STALE,
    Entry,
    Piece,
    StoredFile,
    TrainerState,
    index_json,
    rank_file,
    step_folder,
    tensor_key,
)
from train.checkpoint.rng import rng_states
from train.engine.base import Engine, Fragment, World

Tensors = Sequence[tuple[str, torch.Tensor]]
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


def save(
    engine: Engine,
    folder: Path,
    state: TrainerState,
    world: World,
    *,
    run_id: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Writes ``folder/step-<state.step>``. Called on all ranks, between steps.

    Memory: one piece of one parameter at a time on the host.

    Args:
        engine: whose trained weights and optimizer state are saved.
        folder: the run's ``checkpoints``.
        state: equal on all ranks.
        world: the engine's.
        run_id: of the run.
        metrics: figures of the step.

    Returns:
        The folder of the checkpoint, complete.

    Raises:
        StorageError: a file cannot be written; on every rank, and earlier checkpoints are untouched.
    """
    final = step_folder(folder, state.step)
    partial = final.with_name(final.name + PARTIAL)
    _together(world, folder, lambda: _begin(folder, partial) if world.rank == 0 else None)
    _together(world, folder, lambda: _write_rank(engine, partial, world))

    def commit() -> None:
        parts = [json.loads(_part_file(partial, rank).read_bytes()) for rank in range(world.size)]
        params, files = _merged(parts, list(engine.trained))
        optimizer = engine.optim._target_
        index = index_json(
            params, state, files, world_size=world.size, optimizer=optimizer, run_id=run_id, metrics=metrics or {}
        )
        _commit(partial, final, index, world.size)

    _together(world, folder, lambda: commit() if world.rank == 0 else None)
    return final


def _together(world: World, folder: Path, work: Callable[[], None]) -> None:
    """Runs `work` on this rank and waits for all; if it failed on any, every rank raises instead of hanging."""
    fault: CrosstuneError | None = None
    try:
        work()
    except OSError as error:
        fault = StorageError(str(error.filename or folder), f"cannot be written: {error.strerror or error}")
        fault.__cause__ = error
    except CrosstuneError as error:
        fault = error
    failed = world.all_reduce_sum([float(fault is not None)])[0]
    if fault is not None:
        raise fault
    if failed:
        raise StorageError(str(folder), f"{int(failed)} other rank(s) could not write; their messages say why")


def _begin(folder: Path, partial: Path) -> None:
    """Clears what killed saves and removals left behind."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*"):
        if leftover.suffix in (PARTIAL, STALE):
            shutil.rmtree(leftover)
    partial.mkdir()


def _write_rank(engine: Engine, partial: Path, world: World) -> None:
    """This rank's tensors, and beside them a description for rank 0."""
    fragments = engine.fragments(owned=True)
    tensors = [
        (tensor_key(fragment.name, kind, fragment.offset), fragment.view(kind))
        for fragment in fragments
        for kind in fragment.kinds
    ]
    tensors += [(f"rng:{name}", data) for name, data in rng_states(engine.device).items()]
    name = rank_file(world.rank)
    facts = {
        "sha256": write_safetensors(partial / name, tensors),
        "bytes": (partial / name).stat().st_size,
        "leads_node": world.leads_node,
        "host": socket.gethostname(),
    }
    part = {"file": facts, "pieces": [_describe(fragment) for fragment in fragments]}
    _write_synced(_part_file(partial, world.rank), json.dumps(part).encode())


def _describe(fragment: Fragment) -> dict[str, Any]:
    return {
        "name": fragment.name,
        "shape": fragment.shape,
        "kinds": fragment.kinds,
        "scalars": fragment.scalars,
        "offset": fragment.offset,
        "numel": fragment.numel,
    }


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"rank{rank:05d}.json"


def _merged(parts: Sequence[dict[str, Any]], trained: Sequence[str]) -> tuple[dict[str, Entry], dict[str, StoredFile]]:
    """The ranks' descriptions as one: parameters in the order of `trained`, and files."""
    found: dict[str, Entry] = {}
    files: dict[str, StoredFile] = {}
    node = -1
    for rank, part in enumerate(parts):
        facts = part["file"]
        node += facts["leads_node"]  # the ranks of a machine follow one another
        files[rank_file(rank)] = StoredFile(facts["sha256"], facts["bytes"], node, facts["host"])
        for piece in part["pieces"]:
            _add_piece(found, piece, rank_file(rank))
    params = {name: _in_order(name, found[name]) for name in trained}
    assert len(params) == len(found), f"pieces of parameters that are not trained: {sorted(set(found) - set(params))}"
    return params, files


def _commit(partial: Path, final: Path, index: bytes, world_size: int) -> None:
    """Writes the index and COMPLETE, and gives the folder its name."""
    for rank in range(world_size):
        _part_file(partial, rank).unlink()
    _write_synced(partial / INDEX, index)
    _write_synced(partial / COMPLETE, hashlib.sha256(index).hexdigest().encode())
    _sync_folder(partial)
    stale = final.with_name(final.name + STALE)
    if final.exists():  # the same step of an earlier attempt
        final.rename(stale)
    partial.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(stale, ignore_errors=True)


def _add_piece(found: dict[str, Entry], piece: dict[str, Any], file: str) -> None:
    shape, kinds = tuple(piece["shape"]), tuple(piece["kinds"])
    entry = found.get(piece["name"]) or Entry(shape, kinds, piece["scalars"], ())
    assert (entry.shape, entry.kinds, entry.scalars) == (shape, kinds, piece["scalars"]), f"ranks disagree: {piece}"
    fragments = (*entry.fragments, Piece(file, piece["offset"], piece["numel"]))
    found[piece["name"]] = Entry(shape, kinds, entry.scalars, fragments)


def _in_order(name: str, entry: Entry) -> Entry:
    """The pieces by offset; they must cover the parameter exactly once."""
    fragments = tuple(sorted(entry.fragments, key=lambda piece: piece.offset))
    at = 0
    for piece in fragments:
        assert piece.offset == at, f"{name}: a piece at {piece.offset}, expected at {at}"
        at += piece.numel
    assert at == entry.numel, f"{name}: {at} of {entry.numel} elements"
    return Entry(entry.shape, entry.kinds, entry.scalars, fragments)


def write_safetensors(path: Path, tensors: Tensors) -> str:
    """Writes 1-d tensors from any device, one after the other, and syncs the file.

    The library's own writer wants all tensors in host memory at once; the format is a length, a JSON header and the
    data (https://github.com/huggingface/safetensors#format).

    Returns:
        SHA-256 of the file.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    at = 0
    for key, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for chunk in (struct.pack("<Q", len(head)), head):
            digest.update(chunk)
            file.write(chunk)
        for _, tensor in tensors:
            data = tensor.detach().cpu().contiguous().numpy().view(np.uint8).data
            digest.update(data)
            file.write(data)
        _sync(file)
    return digest.hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
