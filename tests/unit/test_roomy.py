"""Places that one layer's passing tensors leave for the tensors of the next."""

from __future__ import annotations

import os

import pytest
import torch

from train.ops.roomy import SLACK, roomy_empty
from train.plan.allocators import host_peak

MIB = 2**20


def test_it_is_an_ordinary_tensor_in_a_little_more_memory():
    x = torch.empty(3, 5, dtype=torch.bfloat16)
    found = roomy_empty(x, 2, 7, 11)
    assert found.shape == (2, 7, 11) and found.dtype == x.dtype and found.is_contiguous() and found._base is None
    assert found.untyped_storage().nbytes() == found.nbytes + SLACK


def test_what_stays_of_the_next_layer_takes_its_place():
    events, layers = [], 30
    for layer in range(layers):
        events += [(2 * layer, MIB + SLACK), (2 * layer + 1, MIB), (2 * layer, -1)]
    held = host_peak(events)
    if held is None and not os.environ.get("CI"):
        pytest.skip("no glibc here")
    assert held < (layers + 4) * MIB
