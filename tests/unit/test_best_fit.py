"""Packing: the textbook's best-fit decreasing, only faster."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.packing import best_fit, count_rows, fill


def naive(lengths: list[int], capacity: int) -> list[tuple[int, ...]]:
    """One sample after the other; of rows equally full the one filled last."""
    rows: list[list[int]] = []
    room: list[int] = []
    filled_at: list[int] = []
    for now, sample in enumerate(sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))):
        fitting = [row for row in range(len(rows)) if room[row] >= lengths[sample]]
        if fitting:
            at = min(fitting, key=lambda row: (room[row], -filled_at[row]))
        else:
            at = len(rows)
            rows.append([])
            room.append(capacity)
            filled_at.append(now)
        rows[at].append(sample)
        room[at] -= lengths[sample]
        filled_at[at] = now
    return [tuple(row) for row in rows]


def instructions(n: int, longest: int = 2048) -> np.ndarray:
    """Lengths as a set of short instructions with answers has them: median 160 tokens, one in twenty above 450."""
    return np.clip(np.random.default_rng(0).lognormal(5.06, 0.71, n).astype(np.int64), 1, longest)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 40))
    longest = draw(st.integers(1, capacity))
    return draw(st.lists(st.integers(1, longest), max_size=80)), capacity


@given(cases())
@settings(max_examples=300, deadline=None)
def test_rows_are_those_of_the_textbook(case):
    lengths, capacity = case
    rows = naive(lengths, capacity)
    assert best_fit(lengths, capacity) == rows
    histogram = Counter(lengths)
    assert count_rows(histogram, capacity) == len(rows)
    assert fill(histogram, capacity) == (sum(lengths) / (len(rows) * capacity) if rows else 1.0)


def test_an_order_of_equal_lengths_is_kept():
    assert best_fit([3, 5, 3, 2, 3], 8) == [(1, 0), (2, 4, 3)]


def test_short_instructions_fill_98_percent():
    lengths = instructions(999, longest=750)
    rows = best_fit(lengths, 2048)
    assert lengths.sum() / (2048 * len(rows)) >= 0.98


@pytest.mark.parametrize("capacity", [2048, 8192])
@pytest.mark.parametrize("shape", ["uniform", "instructions"])
def test_a_million_lengths_take_seconds(shape, capacity):
    n = 1_000_000
    uniform = np.random.default_rng(0).integers(1, capacity + 1, n)
    lengths = uniform if shape == "uniform" else instructions(n, capacity)
    started = time.process_time()
    rows = best_fit(lengths, capacity)
    assert time.process_time() - started < 3
    order = np.concatenate([np.asarray(row) for row in rows])
    assert np.array_equal(np.bincount(order, minlength=n), np.ones(n))
    starts = np.cumsum([0] + [len(row) for row in rows[:-1]])
    assert np.add.reduceat(lengths[order], starts).max() <= capacity
    assert lengths.sum() / (capacity * len(rows)) > 0.995
