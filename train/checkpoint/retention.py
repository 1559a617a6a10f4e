"""Which checkpoint is the newest, and which stay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from configs.errors import CheckpointError
from configs.schema.outputs import CheckpointConfig
from train.checkpoint.files import discard
from train.checkpoint.layout import COMPLETE, SET_ASIDE, checkpoints, read_index, step_of


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


def surplus(figures: Mapping[int, float | None], newest: int, cfg: CheckpointConfig) -> set[int]:
    """Steps whose checkpoints go.

    Args:
        figures: step -> the figure of `best_by`, lower being better; None where it was not measured.
        newest: the step just saved. Later ones are of a past that the run went back before, by a roll-back or a resume
            from an earlier checkpoint: `latest` must not find them.
        cfg: the checkpoint group.
    """
    later = {step for step in figures if step > newest}
    if not cfg.keep_last:
        return later
    steps = sorted(set(figures) - later)
    stay = {newest, *steps[-cfg.keep_last :]}
    if cfg.keep_every:
        stay |= {step for step in steps if step and step % cfg.keep_every == 0}
    measured = [(figure, step) for step in steps if (figure := figures[step]) is not None and math.isfinite(figure)]
    stay |= {step for _, step in sorted(measured)[: cfg.keep_best]}
    return set(figures) - stay


class Retention:
    """Removes the checkpoints of one folder that are no longer kept. Called on the rank that acts for the folder.

    Args:
        folder: the run's ``checkpoints``.
        cfg: the checkpoint group.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig) -> None:
        self.folder, self.cfg = folder, cfg
        self._figures: dict[int, float | None] = {}

    def after(self, newest: Path, metrics: Mapping[str, float]) -> list[Path]:
        """Once a checkpoint is complete on every machine.

        Args:
            newest: the checkpoint.
            metrics: figures of its step.

        Returns:
            Folders that went.

        Raises:
            OSError: one cannot be renamed.
        """
        step = step_of(newest)
        self._figures[step] = metrics.get(self.cfg.best_by.value)
        found = {step_of(path): path for path in checkpoints(self.folder)}
        figures = {each: self._figure(each, path) for each, path in found.items()}
        gone = [found[each] for each in sorted(surplus(figures, step, self.cfg))]
        for path in gone:
            if self.cfg.keep_last:
                discard(path)
            else:  # all are to be kept, also those of steps that the run went back before
                path.rename(_free_name(path))
        return gone

    def _figure(self, step: int, path: Path) -> float | None:
        """Of an earlier attempt's checkpoint, read once: indices of large runs are large."""
        if not self.cfg.keep_best:
            return None
        if step not in self._figures:
            try:
                self._figures[step] = read_index(path).metrics.get(self.cfg.best_by.value)
            except CheckpointError:
                self._figures[step] = None  # damaged: among the best of none
        return self._figures[step]


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{SET_ASIDE}{n or ''}") for n in range(10**6))
    return next(name for name in names if not name.exists())
