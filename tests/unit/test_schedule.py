"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from configs.schema.optim import ConstantConfig, CosineConfig, LinearConfig
from train.schedule import Constant, Cosine, Linear


def test_warmup_then_each_shape():
    total = 110
    constant = Constant(ConstantConfig(warmup_steps=10), total)
    assert [constant(s) for s in (0, 4, 9, 10, 109)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    linear = Linear(LinearConfig(warmup_steps=10, min_fraction=0.2), total)
    assert [linear(s) for s in (0, 10, 60, 110)] == pytest.approx([0.1, 1, 0.6, 0.2])
    cosine = Cosine(CosineConfig(warmup_fraction=10 / 110, min_fraction=0.2), total)
    assert [cosine(s) for s in (0, 10, 60, 110)] == pytest.approx([0.1, 1, 0.6, 0.2])
    assert cosine(35) == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert linear(10_000) == pytest.approx(0.2)
