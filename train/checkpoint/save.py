"""Writing a checkpoint: every rank its own pieces, the owner of a folder the index, then one rename.

All is written and synced under a temporary name, COMPLETE last; the rename makes it the run's newest checkpoint. Killed
at any moment, the run is left with the previous one.

Where each machine has a folder of its own, its pieces stay there, beside an index and a COMPLETE that are the same on
all. Folders are renamed only when all are complete, and nothing older is removed before all are renamed. Killed between
the renames, some machines have the newer checkpoint and the others lack only a rename, which a resume makes up for
(`collect`).
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema.outputs import Storage
from train.checkpoint.files import discard, sync_folder, write_safetensors, write_synced
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
)
from train.checkpoint.room import require_room
from train.checkpoint.snapshot import Share, live_share
from train.checkpoint.storage import MARK, owner_of
from train.checkpoint.together import LostContactError, together
from train.engine.base import Engine, World


@dataclass(frozen=True)
class Site:
    """Where a run's checkpoints go, as one rank sees it, and what is the same in all of them."""

    folder: Path
    """The run's ``checkpoints``."""
    owner: int
    """The rank that acts for this folder, see `owner_of`."""
    run_id: str
    optimizer: str
    """Its class, as the config names it."""
    trained: tuple[str, ...]
    """Names in the order of the model."""

    def owned_by(self, world: World) -> bool:
        """Whether this rank acts for the folder."""
        return self.owner == world.rank


@dataclass(frozen=True)
class Moment:
    """What is written, and what is the same on all ranks about it."""

    share: Share
    state: TrainerState
    metrics: Mapping[str, float]
    needed: int
    """Bytes that the ranks of this folder will write."""


def save(
    engine: Engine,
    folder: Path,
    state: TrainerState,
    world: World,
    *,
    storage: Storage = Storage.shared,
    run_id: str = "",
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Writes ``folder/step-<state.step>`` while the steps wait. Called on all ranks, between steps.

    Memory: one piece of one parameter at a time on the host.

    Args:
        engine: whose trained weights and optimizer state are saved.
        folder: the run's ``checkpoints``.
        state: equal on all ranks.
        world: the engine's.
        storage: resolved, see `resolve_storage`.
        run_id: of the run.
        metrics: figures of the step.

    Returns:
        The folder of the checkpoint, complete.

    Raises:
        StorageError: a file cannot be written, or there is no room; on every rank, and earlier checkpoints are
            untouched.
        CheckpointError: the optimizer's state has no place in a checkpoint.
    """
    site = site_of(engine, folder, world, storage, run_id)
    shares: list[Share] = []

    def prepare() -> dict[str, int]:
        shares.append(live_share(engine)[0])
        return {"owner": site.owner, "bytes": shares[0].nbytes}

    answers = together(world, folder, prepare)
    moment = Moment(shares[0], state, metrics or {}, needed_in(site, answers))
    return write_checkpoint(site, world, moment)


def site_of(engine: Engine, folder: Path, world: World, storage: Storage, run_id: str) -> Site:
    """Called on all ranks; see `Site`."""
    return Site(folder, owner_of(folder, world, storage), run_id, engine.optim._target_, tuple(engine.trained))


def needed_in(site: Site, answers: list[dict[str, int]]) -> int:
    """Sum of ``bytes`` over the ranks that write to this rank's folder."""
    return sum(answer["bytes"] for answer in answers if answer["owner"] == site.owner)


def write_checkpoint(site: Site, world: World, moment: Moment, on_chunk: Callable[[], None] = lambda: None) -> Path:
    """Writes a checkpoint; all ranks leave with the same outcome.

    Args:
        site: where to.
        world: whose collectives are used; in a thread of one's own, that of `World.in_background`.
        moment: what is written.
        on_chunk: called after each chunk written.

    Returns:
        The checkpoint's folder, complete on every machine.

    Raises:
        StorageError: see `save`; what was written of it has been removed.
    """
    final = step_folder(site.folder, moment.state.step)
    partial = final.with_name(final.name + PARTIAL)
    owns = site.owned_by(world)

    def in_folder(work: Callable[[], None]) -> None:
        together(world, site.folder, lambda: work() if owns else None)

    clear_torn(site, world)
    in_folder(lambda: _begin(partial, moment.needed))
    renaming = False
    try:
        parts = together(world, partial, lambda: _write_share(partial, world, moment.share, on_chunk))
        in_folder(lambda: _complete(partial, _index_of(site, moment, parts)))
        renaming = True
        in_folder(lambda: _rename(partial, final))
    except LostContactError:  # whether the others have renamed theirs is not known: the next start looks
        raise
    except Exception:
        with suppress(LostContactError):  # nobody leaves, and maybe ends the job, before it is done
            in_folder(lambda: _undo(partial, final if renaming else None))
        raise
    if owns:
        shutil.rmtree(_replaced(final), ignore_errors=True)
    return final


def clear_torn(site: Site, world: World) -> None:
    """Removes what killed saves and removals left behind. Called on all ranks while nothing is being written.

    Raises:
        StorageError: a folder cannot be read or renamed.
    """

    def clear() -> None:
        for path in site.folder.glob("step-*"):
            if path.suffix == STALE:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == PARTIAL:
                discard(path)
        for mark in site.folder.glob(f"{MARK}*"):
            mark.unlink(missing_ok=True)  # whose rank may have taken it away meanwhile

    together(world, site.folder, lambda: clear() if site.owned_by(world) else None)


def _begin(partial: Path, needed: int) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    require_room(partial.parent, needed)
    partial.mkdir()


def _write_share(partial: Path, world: World, share: Share, on_chunk: Callable[[], None]) -> dict[str, Any]:
    """Writes this rank's file; what the index says of it."""
    path = partial / rank_file(world.rank)
    return {
        "sha256": write_safetensors(path, share.entries, share.chunks(), on_chunk),
        "bytes": path.stat().st_size,
        "leads_node": world.leads_node,
        "host": socket.gethostname(),
        "pieces": share.pieces,
    }


def _index_of(site: Site, moment: Moment, parts: list[dict[str, Any]]) -> bytes:
    """The ranks' descriptions as one: the same bytes on every machine."""
    files: dict[str, StoredFile] = {}
    pieces: dict[str, list[tuple[Piece, dict[str, Any]]]] = {name: [] for name in site.trained}
    node = -1
    for rank, part in enumerate(parts):
        node += part["leads_node"]  # the ranks of a machine follow one another
        files[rank_file(rank)] = StoredFile(part["sha256"], part["bytes"], node, part["host"])
        for piece in part["pieces"]:
            pieces[piece["name"]].append((Piece(rank_file(rank), piece["offset"], piece["numel"]), piece))
    return index_json(
        {name: _entry(name, found) for name, found in pieces.items()},
        moment.state,
        files,
        world_size=len(parts),
        optimizer=site.optimizer,
        run_id=site.run_id,
        metrics=moment.metrics,
    )


def _entry(name: str, found: list[tuple[Piece, dict[str, Any]]]) -> Entry:
    """The pieces by offset; they must cover the parameter exactly once, and agree on what it is."""
    assert found, f"{name}: no rank answers for it"
    found.sort(key=lambda each: each[0].offset)
    first = found[0][1]
    at = 0
    for piece, facts in found:
        assert all(facts[key] == first[key] for key in ("shape", "kinds", "scalars")), f"ranks disagree: {facts}"
        assert piece.offset == at, f"{name}: a piece at {piece.offset}, expected at {at}"
        at += piece.numel
    entry = Entry(tuple(first["shape"]), tuple(first["kinds"]), first["scalars"], tuple(piece for piece, _ in found))
    assert at == entry.numel, f"{name}: {at} of {entry.numel} elements"
    return entry


def _complete(partial: Path, index: bytes) -> None:
    write_synced(partial / INDEX, index)
    write_synced(partial / COMPLETE, hashlib.sha256(index).hexdigest().encode())
    sync_folder(partial)


def _replaced(final: Path) -> Path:
    """Name that the same step of an earlier attempt has until the new one stands."""
    return final.with_name(final.name + STALE)


def _rename(partial: Path, final: Path) -> None:
    if final.exists():
        final.rename(_replaced(final))
    partial.rename(final)
    sync_folder(final.parent)


def _undo(partial: Path, final: Path | None) -> None:
    """Takes away what was written, also where a folder had its name already; never raises, as a fault is under way.

    Args:
        partial: under its temporary name.
        final: None while no folder had been renamed.
    """
    with suppress(OSError):  # what stays is torn, and the next save or start clears it
        if final is not None and not partial.exists() and final.exists():
            discard(final)
        if final is not None and _replaced(final).exists():
            _replaced(final).rename(final)
    shutil.rmtree(partial, ignore_errors=True)
