"""Which samples an epoch of a mixture shows, and how often each. Pure.

A source that an epoch shows `epochs` times has shown itself `k * epochs` times after k epochs: whole copies, and the
first part of one more in an order that the seed fixes. The next epoch goes on there. So after any number of epochs
every sample has been shown equally often, or once more, and the source's tokens are right to half a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Share:
    """A source's part in a mixture."""

    name: str
    """Decides, with the seed, the order in which its samples take turns."""
    epochs: float
    """Times that an epoch of the mixture shows the source; taken as the decimal that it is written as."""
    ranges: tuple[tuple[int, int], ...]
    """Half-open ranges of indices: its samples."""


def shown(epoch: int, lengths: np.ndarray, mix: Sequence[Share], seed: int) -> np.ndarray:
    """Samples that an epoch shows, as often as it does, in ascending order.

    Needs 8 bytes for each sample while it works, and 25 for each of a source not shown a whole number of times.

    Args:
        epoch: from 0.
        lengths: ``[n]`` tokens of every sample.
        mix: the sources, which together hold every sample; empty: each sample is shown once.
        seed: of the plan.

    Returns:
        ``[m]`` int32 indices.
    """
    every = np.arange(len(lengths), dtype=np.int32)
    if not mix:
        return every
    times = np.zeros(len(lengths), np.int32)
    for share in mix:
        epochs = Fraction(str(share.epochs))
        if epochs.denominator == 1:
            for start, stop in share.ranges:
                times[start:stop] = int(epochs)
            continue
        turns = _turns(share, seed)
        ends = np.cumsum(lengths[turns], dtype=np.int64)
        before, after = _place(epoch * epochs, ends), _place((epoch + 1) * epochs, ends)
        shown_each = np.full(len(turns), after[0] - before[0], np.int32)
        shown_each[: after[1]] += 1
        shown_each[: before[1]] -= 1
        times[turns] = shown_each
    return np.repeat(every, times)


def _turns(share: Share, seed: int) -> np.ndarray:
    """The source's samples in the order in which they take turns, the same in every epoch."""
    name = int.from_bytes(hashlib.blake2b(share.name.encode(), digest_size=8).digest(), "big")
    indices = np.concatenate([np.arange(start, stop, dtype=np.int32) for start, stop in share.ranges])
    return np.random.Generator(np.random.PCG64([seed, name])).permutation(indices)


def _place(times: Fraction, ends: np.ndarray) -> tuple[int, int]:
    """Where a source stands that was shown so many times: whole copies, and samples of one more.

    Args:
        times: 0 or more.
        ends: ``[n]`` running sum of its samples' tokens.
    """
    copies, part = divmod(times, 1)
    tokens = part * int(ends[-1])
    samples = int(ends.searchsorted(int(tokens), side="right"))
    if samples < len(ends):
        below = int(ends[samples - 1]) if samples else 0
        samples += tokens - below > int(ends[samples]) - tokens
    return int(copies), samples
