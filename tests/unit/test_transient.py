"""Places that one layer's passing tensors leave for those of the next."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from train.ops.transient import SLACK, transient_empty
from train.plan.allocators import host_peak

MIB = 2**20


def test_it_is_an_ordinary_tensor_in_a_little_more_memory():
    x = torch.empty(3, 5, dtype=torch.bfloat16)
    found = transient_empty(x, 2, 7, 11)
    assert found.shape == (2, 7, 11) and found.dtype == x.dtype and found.is_contiguous() and found._base is None
    assert found.untyped_storage().nbytes() == found.nbytes + SLACK


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_layers_use_the_same_place():
    if host_peak([(0, MIB)]) is None and not os.environ.get("CI"):
        pytest.skip("no glibc here")
    held = []
    for slack in (0, SLACK):
        events = []
        for layer in range(30):
            events += [(2 * layer, MIB + slack), (2 * layer + 1, MIB), (2 * layer, -1)]
        held.append(host_peak(events))
    assert held[0] > 55 * MIB
    assert held[1] < 34 * MIB
