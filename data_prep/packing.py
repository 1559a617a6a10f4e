"""Best-fit decreasing: samples end to end in rows of at most so many tokens. Pure.

The longest sample first, each into the fullest row that has room for it; of rows equally full, into the one that was
filled last; else into a new row (Johnson et al. 1974, "Worst-case performance bounds for simple one-dimensional packing
algorithms"). Lengths repeat, so equal ones are dealt out together: the work grows with the number of different
lengths, not with samples times rows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

_Placement = tuple[int, int, int, int]
"""(length, room, rows, each): `rows` rows that have `room` tokens left take `each` samples of one length. Rows with all
their room are new."""


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Packs samples into rows; every sample is in exactly one.

    Args:
        lengths: ``[n]`` tokens of each sample, from 1 to `capacity`.
        capacity: most tokens of a row.

    Returns:
        For each row the indices of its samples, longest first, equally long ones in their order; rows in the order in
        which they were begun.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-tokens, kind="stable")
    distinct, counts = np.unique(tokens, return_counts=True)
    row_of: list[int] = []
    """Of each sample in `order`."""
    rows_with: dict[int, list[int]] = {}
    """Room -> rows that have it, the one filled last at the end."""
    begun = 0
    longest_first = zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True)
    for length, room, rows, each in _placements(longest_first, capacity):
        if room == capacity:
            taken = list(range(begun, begun + rows))
            begun += rows
        else:
            waiting = rows_with[room]
            taken = waiting[: -rows - 1 : -1]
            del waiting[-rows:]
        row_of += taken if each == 1 else [row for row in taken for _ in range(each)]
        rows_with.setdefault(room - each * length, []).extend(taken)
    rows_N = np.asarray(row_of, dtype=np.int64)
    by_row = order[np.argsort(rows_N, kind="stable")].tolist()
    bounds = [0, *np.cumsum(np.bincount(rows_N)).tolist()]
    return [tuple(by_row[start:end]) for start, end in pairwise(bounds)]


def count_rows(histogram: Mapping[int, int], capacity: int) -> int:
    """How many rows `best_fit` makes, without making them.

    Args:
        histogram: tokens of a sample, from 1 to `capacity` -> how many samples have so many.
        capacity: most tokens of a row.
    """
    longest_first = sorted(histogram.items(), reverse=True)
    return sum(rows for _, room, rows, _ in _placements(longest_first, capacity) if room == capacity)


def fill(histogram: Mapping[int, int], capacity: int) -> float:
    """Share of the rows' room that `best_fit` fills; 1.0 where there is nothing to pack.

    Args:
        histogram: tokens of a sample, from 1 to `capacity` -> how many samples have so many.
        capacity: most tokens of a row.
    """
    rows = count_rows(histogram, capacity)
    return sum(length * count for length, count in histogram.items()) / (rows * capacity) if rows else 1.0


def _placements(longest_first: Iterable[tuple[int, int]], capacity: int) -> Iterator[_Placement]:
    """The packing of (length, samples of it), in the order in which it is made, rows that are treated alike together.

    A row that has taken a sample is the fullest with room for another of that length, if it has room for it at all; so
    it takes as many as it can hold before the next row takes any.
    """
    rooms: list[int] = []
    """The different rooms of begun rows, ascending."""
    rows_with: dict[int, int] = {}
    for length, count in longest_first:
        assert 0 < length <= capacity, f"a sample of {length} tokens in rows of {capacity}"
        while count:
            at = bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            each = room // length
            rows = count // each
            if not rows:  # one row, and it does not take as many as it could
                rows, each = 1, count
            if room < capacity:
                there = rows_with[room]
                if rows >= there:
                    rows = there
                    del rows_with[room], rooms[at]
                else:
                    rows_with[room] = there - rows
            left = room - each * length
            if left in rows_with:
                rows_with[left] += rows
            else:
                rows_with[left] = rows
                insort(rooms, left)
            count -= rows * each
            yield length, room, rows, each
