"""The speed bench leaves out what trains something else, and takes out what it says it takes out."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.bench.speed.ablation import ENTRIES
from tests.bench.speed.swap import swap
from tests.bench.speed.training import odd_ones


@pytest.mark.parametrize(
    ("losses", "odd"),
    [
        ({"crosstune": 2.0, "a": 2.01, "b": 2.02}, set()),
        ({"crosstune": 2.0, "a": 2.4, "b": 2.02}, {"a"}),
        ({"crosstune": 2.4, "a": 2.0, "b": 2.02}, {"crosstune"}),
        ({"crosstune": 2.0, "a": 2.4}, {"crosstune", "a"}),
        ({"crosstune": 2.0}, set()),
    ],
)
def test_who_has_another_first_loss_than_most_is_left_out(losses, odd):
    assert set(odd_ones(losses)) == odd


def test_a_patch_of_what_is_not_there_fails(monkeypatch):
    with pytest.raises(AttributeError, match="nothing of train.devices.cpu:CpuDevice is called rowstep"):
        swap("train.devices.cpu:CpuDevice", "rowstep", 1)
    found = []
    monkeypatch.setattr("tests.bench.speed.swap.setattr", lambda *given: found.append(given), raising=False)
    for entry in ENTRIES:
        exec(entry.patch, {}, SimpleNamespace().__dict__)
    assert len(found) == sum(bool(entry.patch) for entry in ENTRIES) > 5
