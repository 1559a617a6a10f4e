"""The batch plan: what a step holds never depends on how it is laid out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.plan import BatchPlan, RowKind, layout

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


@pytest.mark.parametrize("fraction", [0.1, 0.5, 1.5])
def test_a_part_of_an_epoch_covers_that_share_of_samples(fraction):
    lengths = np.full(1000, 10, np.int32)
    plan = BatchPlan(lengths, seed=0, batch_tokens=100)
    assert plan.steps_for(fraction) == round(fraction * 100)
