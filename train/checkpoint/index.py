"""index.json of a checkpoint: what it says, and how it is written. How it is read stands in `parse_index`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from train.engine.base import Scalar

FORMAT_VERSION = 2


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


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True)
class Index:
    """All that index.json says."""

    run_id: str
    world_size: int
    optimizer: str
    state: TrainerState
    metrics: dict[str, float]
    files: dict[str, StoredFile]
    params: dict[str, Entry]


def rank_file(rank: int) -> str:
    """File that one rank writes."""
    return f"rank{rank:05d}.safetensors"


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
