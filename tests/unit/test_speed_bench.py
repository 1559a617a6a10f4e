"""The speed bench leaves out what trains something else, and takes out what it says it takes out."""

from __future__ import annotations

from inspect import Parameter, signature
from types import SimpleNamespace

import pytest

from tests.bench.speed import ablation
from tests.bench.speed.ablation import ENTRIES
from tests.bench.speed.machine import Failed
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
        exec(entry.patch, {})
    assert len(found) == sum(bool(entry.patch) for entry in ENTRIES) > 5
    for place, name, value in found:
        before = getattr(place, name)
        if callable(before):  # what stands for it takes the same call
            asked = signature(before).parameters.values()
            by_name = {each.name: None for each in asked if each.kind is Parameter.KEYWORD_ONLY}
            signature(value).bind(*[None] * (len(asked) - len(by_name)), **by_name)


def test_an_ablation_that_fails_is_left_out_of_the_table(monkeypatch):
    def train(bench, model, found, tuning, steps, *words, patch=""):
        if "row_step" in patch:
            raise Failed("it fell over")
        return {
            "tokens_per_second": 50.0 if "packing=off" in words else 100.0,
            "peak_rss_gib": 2.0,
            "others_cores": 0.0,
        }

    monkeypatch.setattr(ablation.ours, "train", train)
    monkeypatch.setattr(ablation, "window", lambda figures, warmup, about: figures)
    monkeypatch.setattr(ablation.data, "model_of", lambda bench: None)
    monkeypatch.setattr(ablation.data, "data_set", lambda bench, name: SimpleNamespace(steps=lambda count: []))
    monkeypatch.setattr(ablation.data, "facts", lambda steps: {})
    bench = SimpleNamespace(warmup=1, timed=1, quick=False, rounds=2, report={})
    ablation.part_6(bench)
    rows = {row["name"]: row["speed_of_default"] for row in bench.report["6"]}
    assert rows.keys() == {entry.name for entry in ENTRIES} - {"rows of any length"}
    assert rows["packing off"] == 0.5 and rows["no watch over hangs"] == 1.0
