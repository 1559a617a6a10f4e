"""The batch plan: what a step holds never depends on how it is laid out, and an epoch shows the mixture exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.mix import Share
from train.data.plan import BatchPlan, RowKind, cut, layout

lengths_strategy = st.lists(st.integers(2, 300), min_size=1, max_size=120).map(lambda x: np.asarray(x, np.int32))


@given(lengths_strategy, st.integers(1, 2000), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_epoch_shows_every_sample_once_within_the_budget(lengths, batch_tokens, seed):
    plan = BatchPlan(lengths, seed=seed, batch_tokens=batch_tokens)
    step = 0
    for epoch in range(2):
        seen: list[int] = []
        while len(seen) < len(lengths):
            assert plan.position(step).epoch == epoch
            samples = plan.samples(step)
            assert len(samples) == 1 or lengths[samples].sum() <= batch_tokens
            seen += samples.tolist()
            step += 1
        assert sorted(seen) == list(range(len(lengths)))
    assert plan.steps_for(2.0) == step


def test_a_step_is_a_pure_function_and_epochs_differ():
    lengths = np.arange(2, 60, dtype=np.int32)
    forward = BatchPlan(lengths, seed=3, batch_tokens=100)
    steps = [forward.samples(i).tolist() for i in range(40)]
    backward = BatchPlan(lengths, seed=3, batch_tokens=100)
    assert [backward.samples(i).tolist() for i in reversed(range(40))] == steps[::-1]
    per_epoch = forward.steps_for(1.0)
    assert steps[0] != steps[per_epoch]
    assert BatchPlan(lengths, seed=4, batch_tokens=100).samples(0).tolist() != steps[0]


def test_without_a_mixture_the_order_is_that_of_the_first_runs():
    """Checkpoints of earlier versions go on with the data that they would have seen."""
    lengths = np.random.default_rng(1).integers(2, 90, 500).astype(np.int32)
    plan = BatchPlan(lengths, seed=5, batch_tokens=400)
    mixed = BatchPlan(lengths, seed=5, batch_tokens=400, mix=[Share("one", 1.0, ((0, 500),))])
    step = 0
    for epoch in range(3):
        order = np.random.Generator(np.random.PCG64([5, epoch])).permutation(500).tolist()
        while order:
            size = len(plan.samples(step))
            assert plan.samples(step).tolist() == mixed.samples(step).tolist() == order[:size]
            assert lengths[order[:size]].sum() <= 400 < lengths[order[: size + 1]].sum() or size == len(order)
            del order[:size]
            step += 1


@given(lengths_strategy, st.integers(1, 700))
@settings(max_examples=60, deadline=None)
def test_a_cut_is_greedy(lengths, most):
    bounds, at = [0], 0
    while at < len(lengths):
        stop = at + 1
        while stop < len(lengths) and lengths[at : stop + 1].sum() <= most:
            stop += 1
        bounds.append(at := stop)
    assert cut(lengths, most).tolist() == bounds


mixes = st.tuples(st.floats(0.05, 3.5), st.floats(0.05, 3.5), st.sampled_from([1.0, 2.0, 0.1, 0.5, 1 / 3]))


@given(lengths_strategy.filter(lambda x: len(x) > 8), mixes, st.integers(0, 5), st.integers(50, 2000))
@settings(max_examples=60, deadline=None)
def test_a_mixture_shows_each_source_as_often_as_it_says(lengths, epochs, seed, batch_tokens):
    """After every epoch: tokens right to half a sample, and no sample shown twice as long as another waits."""
    third = len(lengths) // 3
    ranges = [((0, third),), ((third, third + 2), (2 * third, len(lengths))), ((third + 2, 2 * third),)]
    ranges = [tuple((a, b) for a, b in found if a < b) for found in ranges]
    mix = [Share(f"s{i}", times, found) for i, (times, found) in enumerate(zip(epochs, ranges, strict=True)) if found]
    plan = BatchPlan(lengths, seed=seed, batch_tokens=batch_tokens, mix=mix)
    counts, step = np.zeros(len(lengths), int), 0
    for epoch in range(5):
        while plan.position(step).epoch == epoch:
            np.add.at(counts, plan.samples(step), 1)
            step += 1
        for share in mix:
            samples = np.concatenate([np.arange(*found) for found in share.ranges])
            due = (epoch + 1) * Fraction(str(share.epochs))
            assert set(counts[samples]) <= {math.floor(due), math.ceil(due)}
            missed = (counts[samples] * lengths[samples]).sum() - due * int(lengths[samples].sum())
            assert abs(missed) <= Fraction(int(lengths[samples].max()), 2)


def test_the_steps_of_a_mixture_are_pure_and_mixed_through():
    lengths = np.full(3000, 10, np.int32)
    mix = [Share("a", 0.4, ((0, 2000),)), Share("b", 1.2, ((2000, 3000),))]
    plan = BatchPlan(lengths, seed=3, batch_tokens=1000, mix=mix)
    assert plan.steps_for(1) == 20 and plan.steps_for(2.5) == 50
    steps = [plan.samples(i).tolist() for i in range(60)]
    again = BatchPlan(lengths, seed=3, batch_tokens=1000, mix=mix[::-1])
    assert [again.samples(i).tolist() for i in reversed(range(60))] == steps[::-1]
    assert all(20 <= sum(sample < 2000 for sample in step) <= 60 for step in steps)  # by chance 40 of 100
    other = BatchPlan(lengths, seed=4, batch_tokens=1000, mix=mix)
    first_epoch = [set(step for i in range(20) for step in p.samples(i).tolist()) for p in (plan, other)]
    assert first_epoch[0] != first_epoch[1]


def test_a_part_of_a_source_is_the_decimal_that_was_written():
    """Half a sample a time: none, then one. In binary, 0.05 is a little above, and the first epoch would show it."""
    plan = BatchPlan(np.full(10, 10, np.int32), seed=0, batch_tokens=100, mix=[Share("a", 0.05, ((0, 10),))])
    assert [plan.position(step).epoch for step in range(4)] == [1, 3, 5, 7]


@given(
    lengths_strategy,
    st.integers(1, 5),
    st.integers(300, 900),
    st.sampled_from(list(RowKind)),
)
@settings(max_examples=120, deadline=None)
def test_layout_deals_every_sample_once_and_keeps_ranks_in_step(lengths, world_size, micro_batch_tokens, kind):
    samples = np.arange(len(lengths))
    ranks = layout(samples, lengths, world_size=world_size, micro_batch_tokens=micro_batch_tokens, kind=kind)
    assert len(ranks) == world_size
    assert len({len(batches) for batches in ranks}) == 1
    dealt = [s for batches in ranks for batch in batches for row in batch for s in row]
    assert sorted(dealt) == samples.tolist()
    for batches in ranks:
        for batch in batches:
            widths = [int(lengths[list(row)].sum()) for row in batch]
            assert not batch or len(batch) * max(widths) <= micro_batch_tokens
            if kind is not RowKind.packed:
                assert all(len(row) == 1 for row in batch)
    loads = [sum(int(lengths[s]) for b in batches for row in b for s in row) for batches in ranks]
    assert max(loads) - min(loads) <= lengths.max()


def test_a_sample_goes_to_the_first_of_the_least_loaded_ranks():
    lengths = np.random.default_rng(0).integers(1, 60, 400).astype(np.int32)
    samples = np.random.default_rng(1).permutation(400)[:300]
    shares, loads = [[] for _ in range(7)], [0] * 7
    for sample in sorted(samples.tolist(), key=lambda s: (-lengths[s], s)):
        rank = loads.index(min(loads))
        shares[rank].append(((sample,),))
        loads[rank] += int(lengths[sample])
    ranks = layout(samples, lengths, world_size=7, micro_batch_tokens=60, kind=RowKind.single)
    assert [[batch for batch in batches if batch] for batches in ranks] == shares


def test_a_sample_that_a_step_holds_twice_is_dealt_twice():
    ranks = layout(np.asarray([0, 1, 1]), np.asarray([5, 6]), world_size=1, micro_batch_tokens=12, kind=RowKind.packed)
    assert ranks == [[((1, 1),), ((0,),)]]


def test_packed_rows_are_full():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.06, 0.71, 2000).astype(np.int32), 2, 750)
    [batches] = layout(np.arange(2000), lengths, world_size=1, micro_batch_tokens=2048, kind=RowKind.packed)
    assert lengths.sum() / (2048 * len(batches)) > 0.98


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.5])
def test_a_part_of_an_epoch_covers_that_share_of_samples(fraction):
    lengths = np.full(1000, 10, np.int32)
    plan = BatchPlan(lengths, seed=0, batch_tokens=100)
    assert plan.steps_for(fraction) == round(fraction * 100)
