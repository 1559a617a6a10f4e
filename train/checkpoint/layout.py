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
import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from configs.errors import CheckpointError
from train.engine.base import MASTER, Scalar
from train.run_folder import sha256_of

FORMAT_VERSION = 2
INDEX = "index.json"
COMPLETE = "COMPLETE"
PARTIAL = ".partial"
"""Suffix of a folder that is being written."""
STALE = ".stale"
"""Suffix of a folder that is being removed."""
STEP_FOLDER = re.compile(r"step-(\d{8,})")
RANK_FILE = re.compile(r"rank\d{5,}\.safetensors")


@dataclass
class TrainerState:
    """Where the run stands, apart from weights and optimizer."""

    step: int
    """Global steps done."""
    epoch: int
    samples_seen: int
    tokens_seen: int
    seed: int
    extra: dict[str, Any] = field(default_factory=dict)
    """Further JSON values of the loop."""


@dataclass(frozen=True)
class StoredFile:
    """What the index says of a rank's file."""

    sha256: str
    bytes: int
    node: int
    """Number of the machine that wrote it, in the order of the ranks."""
    host: str
    """Name of that machine."""


@dataclass(frozen=True)
class Piece:
    """A contiguous piece of a flattened parameter in one file."""

    file: str
    offset: int
    """In elements of the flattened parameter."""
    numel: int


@dataclass(frozen=True)
class Entry:
    """One trained parameter."""

    shape: tuple[int, ...]
    kinds: tuple[str, ...]
    """``master`` and the optimizer's state tensors; a checkpoint of step 0 has the master only."""
    scalars: dict[str, Scalar]
    """The optimizer's numbers, such as Adam's step count."""
    fragments: tuple[Piece, ...]
    """In the order of their offsets, without gap or overlap."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)

    @property
    def step(self) -> int:
        """Steps that the optimizer has taken on it; 0 where it does not count."""
        return int(self.scalars["step"]["value"]) if "step" in self.scalars else 0


def step_folder(folder: Path, step: int) -> Path:
    """The folder of one checkpoint within ``checkpoints/``."""
    return folder / f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """File that one rank writes."""
    return f"rank{rank:05d}.safetensors"


def tensor_key(name: str, kind: str, offset: int) -> str:
    """Key of a piece in its file."""
    return f"{name}:{kind}@{offset}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first. A folder without COMPLETE is a torn save and does not count."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / COMPLETE).is_file()]


class CheckpointReader:
    """Reads any range of any parameter, memory-mapped: as much memory as the range, however large the checkpoint.

    Args:
        path: a ``step-...`` folder.
        verify: check the size and SHA-256 of every file first, which reads the whole checkpoint once.

    Raises:
        CheckpointError: incomplete, damaged or of another format; names the file.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path = Path(path)
        index = self._read_index()
        try:
            self.params: dict[str, Entry] = {name: _entry(value) for name, value in index["params"].items()}
            self.state = TrainerState(**index["state"])
            self.files = {file: StoredFile(**facts) for file, facts in index["files"].items()}
            if not all(RANK_FILE.fullmatch(file) for file in self.files):
                raise ValueError(f"file names {sorted(self.files)}")
            self.world_size, self.optimizer = int(index["world_size"]), str(index["optimizer"])
            self.run_id = str(index["run_id"])
            self.metrics = {str(name): float(value) for name, value in index["metrics"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(INDEX, f"lacks or garbles {error}") from error
        self._open_files: dict[str, Any] = {}
        self._stack = ExitStack()
        for file, facts in self.files.items():
            self._check_size(file, facts)
        if verify:
            self.verify(list(self.files))

    def _read_index(self) -> dict[str, Any]:
        if not (self.path / COMPLETE).is_file():
            found = "is not complete: the save was cut off" if self.path.is_dir() else "does not exist"
            raise CheckpointError(str(self.path), found, remedy=self._another())
        try:
            content = (self.path / INDEX).read_bytes()
            expected = (self.path / COMPLETE).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise self._damaged(INDEX, f"cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise self._damaged(INDEX, f"does not match the SHA-256 in {COMPLETE}")
        index: dict[str, Any] = json.loads(content)
        if index.get("format_version") != FORMAT_VERSION:
            found = f"format_version {index.get('format_version')}"
            raise CheckpointError(str(self.path / INDEX), found, allowed=str(FORMAT_VERSION))
        return index

    def _check_size(self, file: str, facts: StoredFile) -> None:
        path = self.path / file
        if not path.is_file():
            raise self._damaged(file, "is missing")
        if path.stat().st_size != facts.bytes:
            raise self._damaged(file, f"has {path.stat().st_size} bytes instead of {facts.bytes}")

    def verify(self, files: list[str]) -> None:
        """Compares the SHA-256 of `files` with the index.

        Raises:
            CheckpointError: names the first file that differs.
        """
        for file in files:
            if sha256_of(self.path / file) != self.files[file].sha256:
                raise self._damaged(file, "does not match its SHA-256 in the index")

    def _damaged(self, file: str, found: str) -> CheckpointError:
        return CheckpointError(str(self.path / file), found, remedy=self._another())

    def _another(self) -> str:
        others = [path.name for path in checkpoints(self.path.parent) if path != self.path]
        return f"{others[-1]} of the same run is complete" if others else "no other checkpoint of this run is complete"

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
        return {key.removeprefix("rng:"): file.get_tensor(key) for key in file.keys() if key.startswith("rng:")}  # noqa: SIM118

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


def _entry(value: dict[str, Any]) -> Entry:
    return Entry(
        shape=tuple(value["shape"]),
        kinds=tuple(value["kinds"]),
        scalars=value["scalars"],
        fragments=tuple(Piece(*piece) for piece in value["fragments"]),
    )


def index_json(
    params: Mapping[str, Entry],
    state: TrainerState,
    files: Mapping[str, StoredFile],
    *,
    world_size: int,
    optimizer: str,
    run_id: str,
    metrics: Mapping[str, float],
) -> bytes:
    """The index as bytes.

    Args:
        params: in the order of the model.
        state: at the time of the save.
        files: by name.
        world_size: number of ranks.
        optimizer: its class, as the config names it.
        run_id: of the run.
        metrics: figures of the step, by which the best checkpoints are told; what is not finite is left out, since it
            is nobody's best and JSON has no word for it.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "run_id": run_id,
        "world_size": world_size,
        "optimizer": optimizer,
        "state": asdict(state),
        "metrics": {name: value for name, value in metrics.items() if math.isfinite(value)},
        "files": {name: asdict(facts) for name, facts in files.items()},
        "params": {
            name: {
                "shape": entry.shape,
                "kinds": entry.kinds,
                "scalars": entry.scalars,
                "fragments": [[piece.file, piece.offset, piece.numel] for piece in entry.fragments],
            }
            for name, entry in params.items()
        },
    }
    # Without indentation, for which Python has no fast encoder: there are as many pieces as parameters times ranks.
    return json.dumps(content, allow_nan=False).encode()
