"""The batch plan: pure functions from lengths, seed and step to samples, rows and ranks.

A global step is a fixed set of samples. Which rank takes which, in which rows and micro-batches, is decided
afterwards by `layout`; so the data order does not depend on world size, packing or accumulation, and resuming
skips nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum

import numpy as np


class RowKind(Enum):
    """What a row of a micro-batch holds."""

    packed = "packed"
    """Several samples end to end; one row a micro-batch."""
    padded = "padded"
    """One sample, padded to the longest of the micro-batch."""
    single = "single"
    """One sample; one row a micro-batch."""


Row = tuple[int, ...]
"""Indices of the samples in a row."""
MicroBatch = tuple[Row, ...]
"""Rows of one forward pass; empty for a rank that has nothing left while others do."""


@dataclass(frozen=True)
class Position:
    """Where a step lies in the data."""

    epoch: int
    start: int
    """Samples of the epoch that came before."""
    stop: int


class BatchPlan:
    """Cuts each epoch's permutation into global steps of at most `batch_tokens` tokens (at least one sample)."""

    def __init__(self, lengths: np.ndarray, *, seed: int, batch_tokens: int) -> None:
        assert len(lengths) > 0 and batch_tokens > 0
        self._lengths, self._seed, self._batch_tokens = lengths, seed, batch_tokens
        self._first_steps = [0]
        """First global step of each epoch so far, and of the one after."""
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def samples(self, step: int) -> np.ndarray:
        """Indices of the samples of a global step, ``[n]`` int64."""
        position = self.position(step)
        order, _ = self._cut(position.epoch)
        return order[position.start : position.stop]

    def position(self, step: int) -> Position:
        """Epoch and range of samples of a global step."""
        while step >= self._first_steps[-1]:
            epoch = len(self._first_steps) - 1
            self._first_steps.append(self._first_steps[-1] + len(self._cut(epoch)[1]) - 1)
        epoch = bisect_right(self._first_steps, step) - 1
        bounds = self._cut(epoch)[1]
        at = step - self._first_steps[epoch]
        return Position(epoch, int(bounds[at]), int(bounds[at + 1]))

    def steps_for(self, epochs: float) -> int:
        """Global steps that show `epochs` times the data; a part of an epoch is counted in samples, rounded up."""
        whole, part = int(epochs), epochs - int(epochs)
        steps = sum(len(self._cut(epoch)[1]) - 1 for epoch in range(whole))
        if part > 0:
            bounds = self._cut(whole)[1]
            steps += int(np.searchsorted(bounds, part * len(self._lengths) - 1e-9))
        return max(1, steps)

    def _cut(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the epoch's samples, and the offsets in it where steps begin, plus its length."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = np.random.Generator(np.random.PCG64([self._seed, epoch])).permutation(len(self._lengths))
            ends = np.cumsum(self._lengths[order], dtype=np.int64)
            bounds = [0]
            while bounds[-1] < len(order):
                before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
                stop = int(np.searchsorted(ends, before + self._batch_tokens, side="right"))
                bounds.append(max(stop, bounds[-1] + 1))
            self._epoch = (epoch, order, np.asarray(bounds, dtype=np.int64))
        return self._epoch[1], self._epoch[2]


def layout(
    samples: np.ndarray, lengths: np.ndarray, *, world_size: int, micro_batch_tokens: int, kind: RowKind
) -> list[list[MicroBatch]]:
    """Deals the samples of a step to ranks and micro-batches, for each rank equally many.

    Longest first into the rank with the fewest tokens, which keeps the ranks within one sample of each other
    (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Args:
        samples: indices of the step's samples.
        lengths: tokens of every sample of the split.
        world_size: number of ranks.
        micro_batch_tokens: most tokens of a micro-batch, padding included; no sample may be longer.
        kind: what a row holds.

    Returns:
        For each rank its micro-batches.
    """
    by_length = sorted((int(s) for s in samples), key=lambda s: (-int(lengths[s]), s))
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for sample in by_length:
        rank = loads.index(min(loads))
        shares[rank].append(sample)
        loads[rank] += int(lengths[sample])
    group = {RowKind.packed: _pack, RowKind.padded: _pad, RowKind.single: _one_by_one}[kind]
    ranks = [group(share, lengths, micro_batch_tokens) for share in shares]
    most = max(len(batches) for batches in ranks)
    return [batches + [()] * (most - len(batches)) for batches in ranks]


def _pack(share: list[int], lengths: np.ndarray, capacity: int) -> list[MicroBatch]:
    """First-fit decreasing: each bin is one row."""
    bins: list[list[int]] = []
    room: list[int] = []
    for sample in share:
        length = int(lengths[sample])
        at = next((i for i, r in enumerate(room) if r >= length), None)
        if at is None:
            bins.append([])
            room.append(capacity)
            at = len(bins) - 1
        bins[at].append(sample)
        room[at] -= length
    return [(tuple(row),) for row in bins]


def _pad(share: list[int], lengths: np.ndarray, capacity: int) -> list[MicroBatch]:
    """Neighbours in length share a micro-batch; its cost is rows times its longest, which comes first."""
    batches: list[list[Row]] = []
    for sample in share:
        if batches and (len(batches[-1]) + 1) * int(lengths[batches[-1][0][0]]) <= capacity:
            batches[-1].append((sample,))
        else:
            batches.append([(sample,)])
    return [tuple(batch) for batch in batches]


def _one_by_one(share: list[int], lengths: np.ndarray, capacity: int) -> list[MicroBatch]:
    return [((sample,),) for sample in share]
