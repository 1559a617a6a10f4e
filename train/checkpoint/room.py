"""Whether a disk and the host's memory hold the next checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from configs.errors import NoRoomError
from configs.schema.optim import OptimConfig
from train.engine.base import Engine
from train.engine.optimizer import build_optimizer
from train.units import in_gib

RESERVE = 16 * 2**20
"""Bytes for the index, and for metrics and logs that grow while the checkpoint is written."""
ENTRY = 256
"""Bytes that a tensor's name and place take in a header."""
MEMORY_SHARE = 0.8
"""Of the memory that is free, a copy takes at most so much: data loaders and page cache need some too."""


def expected_bytes(engine: Engine) -> int:
    """Size of this rank's file once the optimizer has taken its first step, and before it."""
    fragments = engine.fragments(owned=True)
    states = states_per_weight(engine.optim) if fragments else 0
    return sum((1 + states) * (4 * fragment.numel + ENTRY) for fragment in fragments)


def states_per_weight(optim: OptimConfig) -> int:
    """fp32 values that an optimizer keeps for each weight: seen on one that steps two weights. AdamW: 2."""
    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.ones(2)
    optimizer = build_optimizer(optim, [("weight", weight)])
    optimizer.step()
    state = optimizer.state[weight]
    return sum(torch.is_tensor(value) and value.shape == weight.shape for value in state.values())


def require_room(folder: Path, needed: int) -> None:
    """Refuses to begin what would not fit.

    Args:
        folder: it, or the nearest folder above it that exists, is asked for its free space.
        needed: bytes of the checkpoint in this folder.

    Raises:
        NoRoomError: says how much is missing.
    """
    needed += needed // 100 + RESERVE
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise NoRoomError(
            str(folder),
            f"the next checkpoint needs {in_gib(needed)}, and {in_gib(free)} are free",
            remedy=f"free {in_gib(needed - free)} or more there, or another run_dir; the earlier checkpoints stay "
            "until the next one is complete, and a lower checkpoint.keep_last keeps fewer of them",
        )


def memory_holds(answers: Sequence[dict[str, Any]]) -> bool:
    """Whether every machine has room to spare for what its ranks would copy; the same on all ranks.

    Args:
        answers: see `copies_by_machine`.
    """
    return all(needed <= MEMORY_SHARE * free for needed, free in copies_by_machine(answers))


def copies_by_machine(answers: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """Bytes that the ranks of each machine would copy, and bytes that are free there; the same on all ranks.

    Args:
        answers: of each rank: ``leads_node``, ``copy`` (bytes it would newly allocate), ``memory`` (bytes free).
    """
    machines: list[list[dict[str, Any]]] = []
    for answer in answers:  # the ranks of a machine follow one another
        if answer["leads_node"] or not machines:
            machines.append([])
        machines[-1].append(answer)
    return [(sum(rank["copy"] for rank in ranks), min(rank["memory"] for rank in ranks)) for ranks in machines]
