"""A step whose loss or gradient is not finite: it changes no weight, its batch is kept, and too many end the run.

That no rank steps needs no word between them: the loop poisons the gradient of a loss that is not finite, and the
gradient's norm, which is that of all ranks, tells every engine to drop the step (`Engine.step`).
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.errors import RunFailedError
from train.checkpoint.layout import TrainerState
from train.data.prepared import PreparedSplit
from train.data.sampler import GlobalStep
from train.engine.base import World

COUNT = "nonfinite"
"""Key of `TrainerState.extra`: how many such steps there were; a resumed run goes on counting."""
FOLDER = "nonfinite"
"""In the run's folder: one file per skipped step."""
SHOWN = 5
"""Samples named in a message."""


class NonFinite:
    """Counts the skipped steps of a run and keeps their batches.

    Args:
        run: folder of the run.
        limit: at so many skipped steps the run ends.
        world: the ranks.
        split: what is trained on.
    """

    def __init__(self, run: Path, limit: int, world: World, split: PreparedSplit) -> None:
        self.folder, self.limit, self.world, self.split = run / FOLDER, limit, world, split

    def skip(
        self, state: TrainerState, step: GlobalStep, losses: Sequence[float], loss: float, grad_norm: float
    ) -> str:
        """Counts a step and writes ``nonfinite/step-N.json``. Called on all ranks, after `state` was advanced.

        Args:
            state: its `extra` keeps the count.
            step: this rank's share of the step.
            losses: of this rank's micro-batches, in their order.
            loss: sum over all ranks.
            grad_norm: over all ranks.

        Returns:
            A line for the user.

        Raises:
            RunFailedError: the limit is reached; on every rank.
        """
        count = state.extra[COUNT] = int(state.extra.get(COUNT, 0)) + 1
        found = self._suspects(step, losses)
        kept = self._keep(state.step, {"step": state.step, "loss": _plain(loss), "grad_norm": _plain(grad_norm)}, found)
        what = f"gradient norm {grad_norm}" if math.isfinite(loss) else f"loss {loss}"
        samples = ", ".join(_in_words(rank) for rank in found)
        if count < self.limit:
            return (
                f"step {state.step} skipped, {what} ({count} of guard.nonfinite_limit={self.limit}): {samples}; {kept}"
            )
        times = f", for the {count}. time" if count > 1 else ""
        raise RunFailedError(
            f"step {state.step}",
            f"{what}, not finite{times}: {samples}; {kept}",
            remedy="look at these samples; lower optim.lr, or model.precision=fp32, in a new run; "
            "guard.nonfinite_limit=N, also added to a resume, skips more such steps",
        )

    def _suspects(self, step: GlobalStep, losses: Sequence[float]) -> list[dict[str, Any]]:
        """Each rank's micro-batches whose loss is not finite; all of them where every loss is."""
        filled = [(i, loss) for i, loss in enumerate(losses) if step.micro_batches[i]]
        anywhere = self.world.all_reduce_sum([sum(not math.isfinite(loss) for _, loss in filled)])[0]
        batches = [
            {"micro_batch": i, "loss": _plain(loss), "samples": self._samples(step, i)}
            for i, loss in filled
            if not (anywhere and math.isfinite(loss))
        ]
        mine = {"rank": self.world.rank, "host": socket.gethostname(), "micro_batches": batches}
        ranks = [json.loads(data) for data in self.world.all_gather_bytes(json.dumps(mine).encode())]
        return [rank for rank in ranks if rank["micro_batches"]]

    def _samples(self, step: GlobalStep, micro_batch: int) -> list[dict[str, Any]]:
        chosen = [self.split[int(index)] for row in step.micro_batches[micro_batch] for index in row]
        return [{"id": s.id, "input_ids": s.input_ids.tolist(), "spans": s.spans.tolist()} for s in chosen]

    def _keep(self, step: int, facts: dict[str, Any], ranks: list[dict[str, Any]]) -> str:
        """Rank 0 writes the file; that it cannot be written ends no run, and the line says so."""
        file = self.folder / f"step-{step:08d}.json"
        if self.world.rank == 0:
            try:
                self.folder.mkdir(exist_ok=True)
                file.write_text(json.dumps({**facts, "ranks": ranks}), encoding="utf-8")
            except OSError as error:
                return f"{file} cannot be written: {error.strerror}"
        return f"token ids in {file}"


def _in_words(rank: dict[str, Any]) -> str:
    ids = [sample["id"] for batch in rank["micro_batches"] for sample in batch["samples"]]
    more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
    return f"samples {', '.join(ids[:SHOWN])}{more} (rank {rank['rank']} on {rank['host']})"


def _plain(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)
