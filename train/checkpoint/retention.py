"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path

from train.checkpoint.layout import STALE, checkpoints


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
