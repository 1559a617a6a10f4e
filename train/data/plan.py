"""The batch plan: pure functions from lengths, seed and step to samples, rows and ranks.

A global step is a fixed set of samples. Which rank takes which, in which rows and micro-batches, is decided
afterwards by `layout`; so the data order does not depend on world size, packing or accumulation, and resuming
skips nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heapreplace

import numpy as np

from data_prep.packing import best_fit
from train.data.mix import Share, shown


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
    """Cuts each epoch's permutation into global steps of at most `batch_tokens` tokens (at least one sample).

    Keeps 4 bytes for each sample that an epoch shows; where an epoch begins, it needs 28 more for a moment.

    Args:
        lengths: ``[n]`` tokens of every sample, one at least.
        seed: of all permutations.
        batch_tokens: most tokens of a step.
        mix: how often an epoch shows each source; empty: an epoch shows every sample once.
    """

    def __init__(self, lengths: np.ndarray, *, seed: int, batch_tokens: int, mix: Sequence[Share] = ()) -> None:
        assert 0 < len(lengths) < 2**31 and batch_tokens > 0
        self._lengths, self._seed, self._batch_tokens, self._mix = lengths, seed, batch_tokens, mix
        self._first_steps = [0]
        """First global step of each epoch so far, and of the one after."""
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def samples(self, step: int) -> np.ndarray:
        """Indices of the samples of a global step, ``[n]`` int32; in a mixture a sample may be there twice."""
        position = self.position(step)
        order, _ = self._cut(position.epoch)
        return order[position.start : position.stop]

    def position(self, step: int) -> Position:
        """Epoch and range of samples of a global step."""
        while step >= self._first_steps[-1]:
            self._next_epoch()
        epoch = bisect_right(self._first_steps, step) - 1
        bounds = self._cut(epoch)[1]
        at = step - self._first_steps[epoch]
        return Position(epoch, int(bounds[at]), int(bounds[at + 1]))

    def steps_for(self, epochs: float) -> int:
        """Global steps that show `epochs` times the data; a part of an epoch is counted in samples, rounded up."""
        whole, part = int(epochs), epochs - int(epochs)
        while whole >= len(self._first_steps):
            self._next_epoch()
        steps = self._first_steps[whole]
        if part > 0:
            order, bounds = self._cut(whole)
            steps += int(np.searchsorted(bounds, part * len(order) - 1e-9))
        return max(1, steps)

    def _next_epoch(self) -> None:
        epoch = len(self._first_steps) - 1
        self._first_steps.append(self._first_steps[-1] + len(self._cut(epoch)[1]) - 1)

    def _cut(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the epoch's samples, and the offsets in it where steps begin, plus its length."""
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = None  # its memory is needed
            shuffle = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            order = shuffle.permutation(shown(epoch, self._lengths, self._mix, self._seed))
            self._epoch = (epoch, order, cut(self._lengths[order], self._batch_tokens))
        return self._epoch[1], self._epoch[2]


def cut(lengths: np.ndarray, most_tokens: int) -> np.ndarray:
    """Cuts samples, in their order, into sets of at most `most_tokens` tokens (at least one sample).

    Args:
        lengths: ``[n]`` tokens of each sample.
        most_tokens: of a set.

    Returns:
        ``[k + 1]`` int64 offsets: set i holds the samples from the i-th up to the next.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    # For every sample: where the next set begins if one begins here.
    stops = ends.searchsorted(ends - lengths + most_tokens, side="right")
    np.maximum(stops, np.arange(1, len(ends) + 1), out=stops)
    bounds = [0]
    while bounds[-1] < len(ends):
        bounds.append(int(stops[bounds[-1]]))
    return np.asarray(bounds, dtype=np.int64)


def layout(
    samples: np.ndarray, lengths: np.ndarray, *, world_size: int, micro_batch_tokens: int, kind: RowKind
) -> list[list[MicroBatch]]:
    """Deals the samples of a step to ranks and micro-batches, for each rank equally many.

    Longest first into the rank with the fewest tokens, which keeps the ranks within one sample of each other
    (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Args:
        samples: indices of the step's samples; one that is there twice is dealt twice.
        lengths: tokens of every sample of the split.
        world_size: number of ranks.
        micro_batch_tokens: most tokens of a micro-batch, padding included; no sample may be longer.
        kind: what a row holds.

    Returns:
        For each rank its micro-batches.
    """
    shares = _deal(samples[np.lexsort((samples, -lengths[samples]))], lengths, world_size)
    group = {RowKind.packed: _pack, RowKind.padded: _pad, RowKind.single: _one_by_one}[kind]
    ranks = [group(share, lengths, micro_batch_tokens) for share in shares]
    most = max(len(batches) for batches in ranks)
    return [batches + [()] * (most - len(batches)) for batches in ranks]


def _deal(by_length: np.ndarray, lengths: np.ndarray, world_size: int) -> list[list[int]]:
    """Each sample to the rank with the fewest tokens so far, of equals the first."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for sample, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        load, rank = loads[0]
        shares[rank].append(sample)
        heapreplace(loads, (load + length, rank))
    return shares


def _pack(share: list[int], lengths: np.ndarray, capacity: int) -> list[MicroBatch]:
    """As few rows as best-fit decreasing finds, one a micro-batch."""
    return [(tuple(share[at] for at in row),) for row in best_fit(lengths[share], capacity)]


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
