"""Which checkpoint is the newest, and which stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from configs.errors import CheckpointError
from train.checkpoint.layout import COMPLETE, STALE, checkpoints


def latest(folder: Path) -> Path:
    """The newest complete checkpoint.

    Raises:
        CheckpointError: there is none; names what is there instead.
    """
    complete = checkpoints(folder)
    if complete:
        return complete[-1]
    if not folder.is_dir():
        found = "no such folder"
    else:
        seen = sorted(path.name for path in folder.iterdir())
        found = f"no complete checkpoint, only {', '.join(seen)}" if seen else "no checkpoint"
    raise CheckpointError(
        str(folder),
        found,
        allowed=f"folders step-<number> that hold {COMPLETE}",
        remedy="name the folder of a run that has saved; a save that was cut off cannot be resumed",
    )


def prune(folder: Path, keep_last: int) -> list[Path]:
    """Removes all but the newest complete checkpoints. Call it on one rank, after a save has returned.

    Args:
        folder: the run's ``checkpoints``.
        keep_last: how many stay; 0: all.

    Returns:
        The folders removed.
    """
    removed = checkpoints(folder)[:-keep_last] if keep_last else []
    for path in removed:
        # Renamed first, so that a checkpoint half removed is never taken for a whole one.
        stale = path.rename(path.with_name(path.name + STALE))
        shutil.rmtree(stale)
    return removed
