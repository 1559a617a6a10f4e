"""Gradients of a step in one process: forgotten, replaced, added up."""

from __future__ import annotations

import pytest
import torch

from train.engine.base import World
from train.engine.reduce import GradientReducer

BF16, FP32 = torch.bfloat16, torch.float32
FORMATS = {"bf16": [BF16, BF16, BF16], "fp32": [FP32, FP32, FP32], "both": [BF16, FP32, BF16]}


@pytest.mark.parametrize("formats", FORMATS)
def test_a_step_has_the_gradients_of_its_own_micro_batches_and_zero_where_there_are_none(formats):
    working = [torch.ones(4, dtype=dtype, requires_grad=True) for dtype in FORMATS[formats]]
    masters = [w if w.dtype == FP32 else w.detach().float().requires_grad_() for w in working]
    reducer = GradientReducer(working, masters, World())
    # For each step its micro-batches: factors by which a loss uses the weights. They are exact in bf16.
    steps = [[[1, 2, 3]], [[4, 0, 0], [8, 0, 16]], [[0, 0, 0], [0, 32, 0]], [[64, 0, 0], [0, 0, 0]], [[0, 0, 0]]]
    for step in steps:
        for number, factors in enumerate(step):
            used = [(w * factor).sum().float() for w, factor in zip(working, factors, strict=True) if factor]
            loss = sum(used, start=torch.zeros((), requires_grad=True))
            reducer.backward(loss, last=number == len(step) - 1)
        expected = [sum(column) for column in zip(*step, strict=True)]
        for master, total in zip(masters, expected, strict=True):
            assert torch.equal(master.grad, torch.full((4,), float(total)))
        reducer.zero()
