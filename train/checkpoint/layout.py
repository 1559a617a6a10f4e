"""What a checkpoint is on disk, and how to read one. No process group, engine or model is needed here.

    checkpoints/step-00000040/
        rank00000.safetensors   per piece and kind one 1-d fp32 tensor, keyed "<parameter>:<kind>@<flat offset>",
                                kinds being "master" and the optimizer's state; RNG states as bytes, keyed "rng:<name>"
        index.json              run, parameters (shape, kinds, scalars, pieces), trainer state, figures of the step;
                                size, SHA-256 and writer of each file
        COMPLETE                SHA-256 of index.json; written last

Without a shared file system each machine's folder holds the rank files of its own ranks; index.json and COMPLETE are
the same in all.

Weights and state are those of the whole model by name, whatever engine and number of ranks wrote them. Nothing is
pickled, so that reading a checkpoint cannot run code. Frozen parameters are not in it: they are the base model's.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import CheckpointError
from train.checkpoint.index import (
    FORMAT_VERSION,
    Entry,
    Index,
    Piece,
    StoredFile,
    TrainerState,
    index_json,
    rank_file,
)
from train.checkpoint.parse_index import MAX_INDEX_BYTES, UnknownFormatError, parse_index
from train.checkpoint.rng import MAX_RNG_BYTES, REQUIRED_RNG, RNG_PREFIX
from train.engine.base import MASTER
from train.run_folder import sha256_of

__all__ = [
    "COMPLETE",
    "FORMAT_VERSION",
    "INDEX",
    "PARTIAL",
    "SET_ASIDE",
    "STALE",
    "STEP_FOLDER",
    "CheckpointReader",
    "Entry",
    "Index",
    "Piece",
    "StoredFile",
    "TrainerState",
    "checkpoints",
    "index_json",
    "rank_file",
    "read_index",
    "step_folder",
    "step_folders",
    "step_of",
    "tensor_key",
    "way_back",
]
"""The front door: what the index says is imported from here as well."""

INDEX = "index.json"
COMPLETE = "COMPLETE"
PARTIAL = ".partial"
"""Suffix of a folder that is being written."""
STALE = ".stale"
"""Suffix of a folder that is being removed."""
SET_ASIDE = ".set-aside"
"""Suffix of a folder that no longer counts, and that nothing removes."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")


def step_folder(folder: Path, step: int) -> Path:
    """The folder of one checkpoint within ``checkpoints/``."""
    return folder / f"step-{step:08d}"


def tensor_key(name: str, kind: str, offset: int) -> str:
    """Key of a piece in its file."""
    return f"{name}:{kind}@{offset}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return [path for path in step_folders(folder) if (path / COMPLETE).is_file()]


def step_folders(folder: Path) -> list[Path]:
    """All that have the name of a checkpoint, oldest first.

    A save gets it last of all, so that one without COMPLETE is no torn save: somebody has taken that file away.
    """
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """Of a checkpoint's folder."""
    match = STEP_FOLDER.fullmatch(path.name)
    assert match, path
    return int(match[1])


def read_index(path: Path) -> Index:
    """The index of a checkpoint, of which nothing else needs to be here.

    Args:
        path: a ``step-...`` folder.

    Raises:
        CheckpointError: incomplete, damaged or of another format; offers the previous checkpoint.
    """
    try:
        return _read_index(path)
    except UnknownFormatError as error:
        remedy = "resume with the crosstune that wrote it, or start a new run"
        raise CheckpointError(str(path / INDEX), str(error), allowed=str(FORMAT_VERSION), remedy=remedy) from error
    except (OSError, ValueError) as error:
        damaged = path if (path / COMPLETE).is_file() else None
        raise CheckpointError(str(path / INDEX if damaged else path), str(error), remedy=way_back(path)) from error


def _read_index(path: Path) -> Index:
    if not (path / COMPLETE).is_file():
        raise ValueError("is not complete: the save was cut off" if path.is_dir() else "does not exist")
    index, seal = path / INDEX, path / COMPLETE
    if not index.is_file():
        raise ValueError("is missing")
    if index.stat().st_size > MAX_INDEX_BYTES or seal.stat().st_size > 100:
        raise ValueError(f"is larger than any index ({MAX_INDEX_BYTES} bytes), or {COMPLETE} is")
    content = index.read_bytes()
    if hashlib.sha256(content).hexdigest().encode() != seal.read_bytes().strip():
        raise ValueError(f"does not match the SHA-256 in {COMPLETE}")
    found = parse_index(content)
    name = STEP_FOLDER.fullmatch(path.name)
    if name and int(name[1]) != found.state.step:
        raise ValueError(f"is that of step {found.state.step}")
    return found


def way_back(path: Path, among: Collection[str] | None = None) -> str:
    """How a user goes on without the checkpoint at `path`: never by itself, since steps are done again.

    Args:
        path: a ``step-...`` folder.
        among: names of the other checkpoints that may be offered; None: all that are complete here.
    """
    for other in reversed(checkpoints(path.parent)):
        if other == path or (among is not None and other.name not in among):
            continue
        try:
            index = _read_index(other)
        except (OSError, ValueError):
            continue
        offer = f"{other.name} of the same run is complete"
        if path.parent.name != "checkpoints":
            return offer
        source, target, run = (
            shlex.quote(str(p)) for p in (path, path.with_name(path.name + SET_ASIDE), path.parents[1])
        )
        where = " (on every machine that has it)" if len({facts.node for facts in index.files.values()}) > 1 else ""
        return f"{offer}; to go on from it: mv {source} {target}{where}, then crosstune resume {run}"
    return "no other checkpoint of this run is complete: bring back what is missing, or start the run again"


class CheckpointReader:
    """Reads any range of any parameter, memory-mapped: as much memory as the range, however large the checkpoint.

    Args:
        path: a ``step-...`` folder.
        verify: check every file first, see `verify`, which reads the whole checkpoint once.
        only: the files that are needed, where the others may be on other machines; None: all.

    Raises:
        CheckpointError: incomplete, damaged or of another format; names the file.
    """

    def __init__(self, path: Path, verify: bool = True, *, only: Collection[str] | None = None) -> None:
        self.path = Path(path)
        self.index = index = read_index(self.path)
        self.run_id, self.world_size, self.optimizer = index.run_id, index.world_size, index.optimizer
        self.state, self.metrics, self.files, self.params = index.state, index.metrics, index.files, index.params
        self._open_files: dict[str, Any] = {}
        self._stack = ExitStack()
        needed = sorted(self.files if only is None else only)
        for file in needed:
            self._check_size(file, self.files[file])
        if verify:
            self.verify(needed)

    def _check_size(self, file: str, facts: StoredFile) -> None:
        path = self.path / file
        if not path.is_file():
            raise self._damaged(file, f"is missing; host {facts.host} wrote it")
        if path.stat().st_size != facts.bytes:
            raise self._damaged(file, f"has {path.stat().st_size} bytes instead of {facts.bytes}")

    def verify(self, files: Collection[str]) -> None:
        """Compares `files` with the index: size, SHA-256, and name, type and shape of every tensor in them.

        Raises:
            CheckpointError: names the first file that differs.
        """
        for file in files:
            self._check_size(file, self.files[file])
            try:
                found = sha256_of(self.path / file)
            except OSError as error:
                raise self._damaged(file, f"cannot be read: {error.strerror or error}") from error
            if found != self.files[file].sha256:
                origin = _file_with(found, self.path)
                raise self._damaged(file, f"does not match its SHA-256 in the index{origin and f': it is {origin}'}")
        for file, tensors in self._promised(files):
            self._check_tensors(file, tensors)

    def _promised(self, files: Collection[str]) -> Iterable[tuple[str, dict[str, int]]]:
        """Key and elements of the tensors that must be in each of `files`; the keys of one file at a time."""
        pieces: dict[str, list[tuple[str, int, int]]] = {file: [] for file in files}
        for name, entry in self.params.items():
            for piece in entry.fragments:
                if piece.file in pieces:
                    pieces[piece.file].append((name, piece.offset, piece.numel))
        for file, found in pieces.items():
            yield file, {tensor_key(n, kind, at): size for n, at, size in found for kind in self.params[n].kinds}

    def _check_tensors(self, file: str, promised: dict[str, int]) -> None:
        """Only the file's header is read."""
        content = self._open(file)
        found = set(content.keys())
        generators = {key for key in found if key.startswith(RNG_PREFIX) and key not in promised}
        if odd := (found - promised.keys() - generators) | (promised.keys() - found):
            what = "holds {}, of which the index knows nothing" if min(odd) in found else "lacks {}"
            raise self._damaged(file, what.format(ascii(min(odd))[:200]))
        if missing := {RNG_PREFIX + name for name in REQUIRED_RNG} - generators:
            raise self._damaged(file, f"lacks {', '.join(sorted(missing))}")
        for key in sorted(found):
            tensor = content.get_slice(key)
            dtype, shape = tensor.get_dtype(), tensor.get_shape()
            fits = shape == [promised[key]] if key in promised else len(shape) == 1 and shape[0] <= MAX_RNG_BYTES
            if not fits or dtype != ("F32" if key in promised else "U8"):
                raise self._damaged(file, f"holds {ascii(key)[:200]} as {dtype} {shape}")

    def _damaged(self, file: str, found: str) -> CheckpointError:
        return CheckpointError(str(self.path / file), found, remedy=way_back(self.path))

    def read_into(self, out: torch.Tensor, name: str, kind: str, offset: int = 0) -> None:
        """Fills `out` [n], on any device, with elements ``offset`` to ``offset + n`` of the flattened parameter.

        Raises:
            CheckpointError: a file lacks the piece that the index promises.
        """
        end = offset + out.numel()
        for piece in self.params[name].fragments:
            begin, stop = max(piece.offset, offset), min(piece.offset + piece.numel, end)
            if begin < stop:
                try:
                    stored = self._open(piece.file).get_slice(tensor_key(name, kind, piece.offset))
                    out[begin - offset : stop - offset].copy_(stored[begin - piece.offset : stop - piece.offset])
                except (SafetensorError, RuntimeError) as error:
                    raise self._damaged(piece.file, f"lacks {kind} of {name}: {error}") from error

    def read(self, name: str, kind: str = MASTER) -> torch.Tensor:
        """One whole parameter, fp32, in its own shape."""
        entry = self.params[name]
        out = torch.empty(entry.numel, dtype=torch.float32)
        self.read_into(out, name, kind)
        return out.view(entry.shape)

    def rng_states(self, rank: int) -> dict[str, torch.Tensor]:
        """Bytes of each generator's state on one rank, by name."""
        file = self._open(rank_file(rank))
        keys = [key for key in file.keys() if key.startswith(RNG_PREFIX)]  # noqa: SIM118  # no mapping
        return {key.removeprefix(RNG_PREFIX): file.get_tensor(key) for key in keys}

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            try:
                self._open_files[file] = self._stack.enter_context(safe_open(self.path / file, "pt"))
            except (OSError, SafetensorError) as error:
                raise self._damaged(file, f"cannot be read: {error}") from error
        return self._open_files[file]

    def close(self) -> None:
        """Lets go of the files."""
        self._stack.close()
        self._open_files.clear()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _file_with(sha256: str, path: Path) -> str:
    """Which file of another checkpoint of the run it is, for a message; empty if none."""
    for other in checkpoints(path.parent):
        try:
            files = _read_index(other).files
        except (OSError, ValueError):
            continue
        for name, facts in files.items():
            if facts.sha256 == sha256:
                return f"{name} of {other.name}"
    return ""
