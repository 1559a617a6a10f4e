"""Which machine has which pieces of a checkpoint, and how each gets those that it needs.

Without a shared file system every machine keeps the files of its own ranks. A rank that resumes needs the files with
pieces of its fragments, which after a change of machines, engine or number of ranks may be anywhere. They travel from
machine to machine in chunks, over the group that carries host values, and stay in the checkpoint's folder where they
were needed. On a shared file system all of this comes down to one folder, in which everything is, or is missing.

For every folder one rank acts, its owner: see `owner_of`.
"""

from __future__ import annotations

import re
import shutil
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, CrosstuneError
from configs.schema.outputs import Storage
from train.checkpoint.files import sync_folder, write_synced
from train.checkpoint.layout import (
    COMPLETE,
    INDEX,
    PARTIAL,
    Index,
    StoredFile,
    checkpoints,
    rank_file,
    read_index,
    step_folders,
    step_of,
    way_back,
)
from train.checkpoint.retention import latest
from train.checkpoint.storage import owner_of
from train.checkpoint.together import together
from train.checkpoint.transfer import INCOMING, receive_file, send_file
from train.engine.base import World
from train.run_folder import sha256_of

SHOWN = 8
"""Machines or files named in a message."""
RANK_NUMBER = re.compile(r"\d+")
Note = Callable[[str], None]


@dataclass(frozen=True)
class Transfer:
    """A file that one machine needs and another has."""

    file: str
    source: int
    """Rank that reads it."""
    target: int
    """Rank that writes it."""


class Machines:
    """The folders in which a run's checkpoints are. Every method is called on all ranks, and raises on all of them.

    Args:
        folder: the run's ``checkpoints``, under the same path on each machine.
        world: the ranks.
        storage: resolved, see `resolve_storage`.
        note: takes lines for the user.
    """

    def __init__(self, folder: Path, world: World, storage: Storage, note: Note) -> None:
        self.folder, self.world, self.note = folder, world, note
        owner = owner_of(folder, world, storage)
        answers = together(world, folder, lambda: [owner, socket.gethostname()])
        self.owners: list[int] = [rank for rank, _ in answers]
        """By rank: who acts for its folder."""
        self.hosts: list[str] = [host for _, host in answers]
        self.acting = sorted(set(self.owners))
        self.acts = world.rank in self.acting

    def newest(self) -> Path:
        """The newest checkpoint that any machine has complete; its index is on every machine then.

        A machine that was killed between the last write and the last rename of a save has it under its temporary name
        still. The save is ended there now, since the others may have removed what came before.

        Raises:
            CheckpointError: there is none, or machines hold different ones under one name, or a newer one has lost its
                COMPLETE everywhere.
        """
        found: list[dict[str, str]] = self._of_each(
            self.folder, lambda: {p.name: _seal(p) for p in step_folders(self.folder)}, {}
        )
        if not any(seal for there in found for seal in there.values()):
            together(self.world, self.folder, lambda: latest(self.folder).name)  # says what is there instead
            return self.newest()  # or a network file system showed late what it has
        path = max((self.folder / name for there in found for name in there), key=step_of)
        seals = {rank: seal for rank in self.acting if (seal := found[rank].get(path.name))}
        if not seals:
            what = f"holds no {COMPLETE}; a save writes it before the folder gets this name"
            raise CheckpointError(str(path), what, remedy=way_back(path))
        holders, seal = list(seals), next(iter(seals.values()))
        odd = [rank for rank in holders if seals[rank] != seal]
        if odd:
            what = f"differs between {self.hosts[holders[0]]} and {self.hosts[odd[0]]}: they are of two attempts"
            raise CheckpointError(str(path), what, remedy=way_back(path))
        if len(holders) < len(self.acting):
            self._bring_index(path, seal, holders)
        return path

    def _bring_index(self, path: Path, seal: str, holders: Sequence[int]) -> None:
        lacks = self.acts and self.world.rank not in holders
        ended = self._of_each(path, lambda: lacks and _end_save(path, seal), False)
        lacking = [rank for rank in self.acting if rank not in holders and not ended[rank]]
        for rank in (rank for rank, done in enumerate(ended) if done):
            self.note(f"{path.name}: the save was cut off on {self.hosts[rank]} before its last rename; ended now")
        if not lacking:
            return
        content = b""

        def read() -> None:
            nonlocal content
            content = (path / INDEX).read_bytes() if self.world.rank == holders[0] else b""

        together(self.world, path, read)
        content = self.world.broadcast_bytes(content, source=holders[0])
        together(self.world, path, lambda: _place_index(path, content, seal) if self.world.rank in lacking else None)

    def collect(self, path: Path, index: Index, needed: Collection[str]) -> list[str]:
        """Brings to each machine the files that its ranks need and that it lacks.

        Args:
            path: the checkpoint.
            index: its index.
            needed: the files that this rank needs.

        Returns:
            The files that this rank is to verify: its share of those that the ranks of its folder need.

        Raises:
            CheckpointError: a file is nowhere, or arrives damaged; names it and the host that wrote it.
            StorageError: a file cannot be written where it is needed.
        """
        needs: dict[int, set[str]] = {owner: set() for owner in self.acting}
        for owner, runs in zip(self.owners, together(self.world, path, lambda: _runs(needed)), strict=True):
            needs[owner].update(rank_file(rank) for low, high in runs for rank in range(low, high + 1))
        by_owner = {owner: sorted(files) for owner, files in needs.items()}
        sizes = self._of_each(path, lambda: _sizes(path, index), {})
        held = {owner: {f for f, n in sizes[owner].items() if n == index.files[f].bytes} for owner in self.acting}
        lost = sorted(index.files.keys() - set().union(*held.values()))
        if lost:
            self._refuse(path, index, lost, sizes)
        self._transfer_all(path, index, held, by_owner)
        mine = self.owners[self.world.rank]
        sharers = [rank for rank, owner in enumerate(self.owners) if owner == mine]
        return by_owner[mine][sharers.index(self.world.rank) :: len(sharers)]

    def _transfer_all(
        self, path: Path, index: Index, held: Mapping[int, set[str]], needs: Mapping[int, Sequence[str]]
    ) -> None:
        """In rounds of one file for each machine: the ranks that only wait hear of every round."""
        missing = {owner: [file for file in needs[owner] if file not in held[owner]] for owner in self.acting}
        if len(self.acting) > 1:
            self.note(f"{path.name}: of {len(index.files)} files {self._listed(held)}")
        if any(missing.values()):
            size = sum(index.files[file].bytes for files in missing.values() for file in files) / 2**30
            self.note(f"{path.name}: on their way, {size:.2f} GiB in all: {self._listed(missing)}")
        for at in range(max(map(len, missing.values()))):
            transfers = []
            for number, (owner, files) in enumerate(missing.items()):
                if at < len(files):
                    sources = [rank for rank in self.acting if files[at] in held[rank]]
                    transfers.append(Transfer(files[at], sources[number % len(sources)], owner))
            together(self.world, path, lambda: self._round(path, index, transfers))  # noqa: B023  # called at once

    def _listed(self, files: Mapping[int, Collection[str]]) -> str:
        words = [f"{self.hosts[owner]} {_ranges(found)}" for owner, found in files.items() if found]
        return _shortened(words, "machines")

    def _round(self, path: Path, index: Index, transfers: Sequence[Transfer]) -> None:
        """A fault is kept until the end: those who wait for this rank must not wait for ever."""
        faults: list[Exception] = []
        for transfer in transfers:
            facts = index.files[transfer.file]
            try:
                if transfer.source == self.world.rank:
                    send_file(self.world, path / transfer.file, facts, transfer.target)
                elif transfer.target == self.world.rank:
                    receive_file(self.world, path / transfer.file, facts, transfer.source)
            except (OSError, CrosstuneError) as error:
                faults.append(error)
        if faults:
            raise faults[0]

    def _refuse(self, path: Path, index: Index, lost: Sequence[str], sizes: Sequence[Mapping[str, int]]) -> None:
        """Names what is nowhere, and the newest other checkpoint of which every piece is somewhere."""
        file, machines = lost[0], len(self.acting)
        cut = [(rank, found[file]) for rank, found in enumerate(sizes) if file in found]
        if cut:
            found = f"has {cut[0][1]} bytes instead of {index.files[file].bytes} on {self.hosts[cut[0][0]]}"
        else:
            found = f"is missing on all {machines} machines" if machines > 1 else "is missing"
        whole = self._whole_but(path)
        remedy = together(self.world, path, lambda: way_back(path, among=whole))[self.acting[0]]
        raise CheckpointError(
            str(path / file),
            f"{found}; {_by_writer({name: index.files[name] for name in lost})}",
            allowed="every file of the checkpoint on one of the machines where the command runs",
            remedy=remedy,
        )

    def _whole_but(self, path: Path) -> list[str]:
        """Names of the other checkpoints of which every piece is on some machine."""
        answers = self._of_each(path, lambda: _others(path), {})
        here: dict[str, set[str]] = {}
        wanted: dict[str, int] = {}
        for others in answers:
            for name, (world_size, files) in others.items():
                here.setdefault(name, set()).update(files)
                wanted[name] = world_size
        return [name for name, files in here.items() if len(files) == wanted[name]]

    def _of_each(self, where: Path, work: Callable[[], Any], nothing: Any) -> list[Any]:
        """What the owners say, by rank; `nothing` for the other ranks."""
        return together(self.world, where, lambda: work() if self.acts else nothing)


def _seal(path: Path) -> str:
    """SHA-256 of the index, as COMPLETE has it; empty only where that file is missing."""
    if not (path / COMPLETE).is_file():
        return ""
    with (path / COMPLETE).open("rb") as file:
        return file.read(100).decode("ascii", errors="replace").strip() or "nothing"


def _end_save(path: Path, seal: str) -> bool:
    """Does what was left of a save: the rename, and COMPLETE before it."""
    partial = path.with_name(path.name + PARTIAL)
    if not (partial / INDEX).is_file() or sha256_of(partial / INDEX) != seal:
        return False
    _complete(partial, path, seal)
    return True


def _place_index(path: Path, content: bytes, seal: str) -> None:
    """On a machine that has nothing of the checkpoint: a folder for what it needs of it."""
    partial = path.with_name(path.name + PARTIAL)
    if path.is_dir():
        partial = path  # somebody removed its COMPLETE
    else:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    write_synced(partial / INDEX, content)
    _complete(partial, path, seal)


def _complete(partial: Path, path: Path, seal: str) -> None:
    write_synced(partial / COMPLETE, seal.encode())
    sync_folder(partial)
    if partial != path:
        partial.rename(path)
    sync_folder(path.parent)


def _sizes(path: Path, index: Index) -> dict[str, int]:
    """Bytes of the rank files that are here; what a cut-off transfer left is cleared."""
    for leftover in path.glob(f"*{INCOMING}"):
        leftover.unlink()
    return {file.name: file.stat().st_size for file in path.iterdir() if file.name in index.files and file.is_file()}


def _others(path: Path) -> dict[str, tuple[int, list[str]]]:
    """Ranks of the other checkpoints here, and their files that are here in their full size."""
    found = {}
    for other in checkpoints(path.parent):
        if other != path:
            try:
                index = read_index(other)
            except CheckpointError:
                continue
            sizes = _sizes(other, index)
            whole = [file for file, size in sizes.items() if size == index.files[file].bytes]
            found[other.name] = (index.world_size, whole)
    return found


def _by_writer(files: Mapping[str, StoredFile]) -> str:
    """Which hosts wrote which files, for a message."""
    hosts: dict[str, list[str]] = {}
    for name, facts in files.items():
        hosts.setdefault(facts.host, []).append(name)
    return _shortened([f"host {host} wrote {_ranges(names)}" for host, names in hosts.items()], "hosts")


def _runs(files: Collection[str]) -> list[list[int]]:
    """First and last number of each run of rank files: names of thousands, in short."""
    runs: list[list[int]] = []
    for rank in sorted(int(RANK_NUMBER.findall(name)[0]) for name in files):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return runs


def _ranges(files: Collection[str]) -> str:
    """``rank00000..00003, rank00008``: names of rank files, for people."""
    words = [f"rank{low:05d}" + (f"..{high:05d}" if high > low else "") for low, high in _runs(files)]
    return _shortened(words, "runs of files", ", ")


def _shortened(words: Sequence[str], what: str, between: str = "; ") -> str:
    more = f"{between}and {len(words) - SHOWN} more {what}" if len(words) > SHOWN else ""
    return between.join(words[:SHOWN]) + more
