"""Two checkpoints held against each other, in bounded memory: a piece of one parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.layout import CheckpointReader
from train.engine.base import MASTER
from train.prove.comparison import ABSENT, Comparison, Difference

PIECE = 2**24
"""Elements compared at a time."""
FLOOR = 0.01
"""A parameter's error is measured against its own norm, or this share of the whole gradient's if that is more: some
gradients, such as that of a key's bias, are zero but for rounding."""


def equal_checkpoints(expected: Path, found: Path, *, rng: bool) -> Iterator[Comparison]:
    """Weights, every kind of optimizer state, counters and trainer state of two checkpoints, bit by bit.

    Args:
        expected: a ``step-...`` folder, written by any engine on any number of ranks.
        found: the other.
        rng: compare the random generators of every rank too; only the same number of ranks has the same.

    Raises:
        CheckpointError: one of them is damaged.
    """
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(CheckpointReader(path)) for path in (expected, found))
        yield _equal_names(ours, theirs)
        shared = [name for name in ours.params if name in theirs.params]
        kinds = dict.fromkeys(
            kind for name in shared for kind in (*ours.params[name].kinds, *theirs.params[name].kinds)
        )
        for kind in kinds:
            yield _equal_kind(kind, shared, ours, theirs)
        yield _equal_scalars(shared, ours, theirs)
        yield _equal_values("trainer state", {"state": asdict(ours.state)}, {"state": asdict(theirs.state)})
        if rng:
            yield _equal_generators(ours, theirs)


def _equal_names(ours: CheckpointReader, theirs: CheckpointReader) -> Comparison:
    mine, other = ({name: entry.shape for name, entry in reader.params.items()} for reader in (ours, theirs))
    compared = _equal_values("trained parameters", {"shape": mine}, {"shape": other})
    return Comparison(compared.what, compared.same, f"{len(mine)} and {len(other)} names and shapes", compared.first)


def _equal_kind(kind: str, names: list[str], ours: CheckpointReader, theirs: CheckpointReader) -> Comparison:
    values, differing, first = 0, 0, None
    for name in names:
        entry = ours.params[name]
        if (kind in entry.kinds) != (kind in theirs.params[name].kinds):
            mine, other = (kind if kind in reader.params[name].kinds else ABSENT for reader in (ours, theirs))
            first, differing = first or Difference(name, kind, mine, other), differing + entry.numel
            continue
        if kind not in entry.kinds or entry.shape != theirs.params[name].shape:
            continue
        values += entry.numel
        for begin in range(0, entry.numel, PIECE):
            a, b = (_read(reader, name, kind, begin) for reader in (ours, theirs))
            odd = (a.view(torch.int32) != b.view(torch.int32)).nonzero()
            differing += len(odd)
            if len(odd) and first is None:
                at = int(odd[0])
                first = Difference(name, kind, a[at].item(), b[at].item(), _index(begin + at, entry.shape))
    what = "weights" if kind == MASTER else f"optimizer, {kind}"
    figure = f"{values:,} values in {len(names)} parameters, {differing:,} differ"
    return Comparison(what, not differing, figure, first)


def _read(reader: CheckpointReader, name: str, kind: str, begin: int) -> torch.Tensor:
    out = torch.empty(min(PIECE, reader.params[name].numel - begin), dtype=torch.float32)
    reader.read_into(out, name, kind, begin)
    return out


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Place in a tensor of an element of the flattened one."""
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape)) if shape else ()


def _equal_scalars(names: list[str], ours: CheckpointReader, theirs: CheckpointReader) -> Comparison:
    mine, other = ({name: reader.params[name].scalars for name in names} for reader in (ours, theirs))
    return _equal_values("optimizer, counters", mine, other)


def _equal_generators(ours: CheckpointReader, theirs: CheckpointReader) -> Comparison:
    mine, other = (
        {
            f"rank {rank}": {name: state.numpy().tobytes().hex() for name, state in reader.rng_states(rank).items()}
            for rank in range(reader.world_size)
        }
        for reader in (ours, theirs)
    )
    compared = _equal_values("random generators", mine, other)
    first = compared.first and Difference(compared.first.where, compared.first.kind, "its state", "another one")
    return Comparison(compared.what, compared.same, f"of {len(mine)} ranks", first)


def _equal_values(what: str, mine: dict[str, Any], other: dict[str, Any]) -> Comparison:
    """Two dictionaries of dictionaries."""
    first, count = None, 0
    for where in dict.fromkeys((*mine, *other)):
        a, b = mine.get(where, {}), other.get(where, {})
        for key in dict.fromkeys((*a, *b)):
            count += 1
            if a.get(key, ABSENT) != b.get(key, ABSENT) and first is None:
                first = Difference(where, key, a.get(key, ABSENT), b.get(key, ABSENT))
    return Comparison(what, first is None, f"{count:,} values", first)


def close_tensors(expected: Path, found: Path, kind: str, tolerance: float) -> Comparison:
    """One kind of tensor of two checkpoints, parameter by parameter, by the norm of what differs.

    Args:
        expected: a ``step-...`` folder.
        found: the other.
        kind: such as ``momentum_buffer``.
        tolerance: allowed norm of the difference, as a share of the parameter's norm (see `FLOOR`).

    Raises:
        CheckpointError: one of them is damaged.
    """
    with CheckpointReader(expected) as ours, CheckpointReader(found) as theirs:
        names = _equal_names(ours, theirs)
        if not names.same:
            return names
        norms = {name: _norm(ours, name, kind) for name in ours.params}
        total = math.hypot(*norms.values())
        worst, worst_name, first = 0.0, "", None
        for name, norm in norms.items():
            apart, at = _apart(ours, theirs, name, kind)
            scale = max(norm, FLOOR * total)
            error = apart / scale if scale else (math.inf if apart else 0.0)
            if not error <= worst:  # a NaN is worse than anything
                worst, worst_name = error, name
            if not error <= tolerance and first is None:
                a, b = (_read_one(reader, name, kind, at) for reader in (ours, theirs))
                first = Difference(name, kind, a, b, _index(at, ours.params[name].shape))
    figure = f"{len(norms)} parameters, apart by {worst:.1e} of their norm at most; allowed {tolerance:.0e}"
    figure += f" ({worst_name})" if worst else ""
    return Comparison("gradient", first is None and total > 0, figure, first)


def _norm(reader: CheckpointReader, name: str, kind: str) -> float:
    pieces = range(0, reader.params[name].numel, PIECE)
    return math.hypot(*(float(_read(reader, name, kind, begin).double().norm()) for begin in pieces))


def _apart(ours: CheckpointReader, theirs: CheckpointReader, name: str, kind: str) -> tuple[float, int]:
    """Norm of the difference, and the place of its largest value in the flattened parameter."""
    norms, largest, at = [], -1.0, 0
    for begin in range(0, ours.params[name].numel, PIECE):
        difference = _read(ours, name, kind, begin).double() - _read(theirs, name, kind, begin).double()
        norms.append(float(difference.norm()))
        peak = difference.abs().max()
        if not float(peak) <= largest:
            largest, at = float(peak), begin + int(difference.abs().argmax())
    return math.hypot(*norms), at


def _read_one(reader: CheckpointReader, name: str, kind: str, at: int) -> float:
    out = torch.empty(1)
    reader.read_into(out, name, kind, at)
    return out.item()
