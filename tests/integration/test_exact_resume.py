"""A run goes on from the middle of an epoch: bit by bit under the same layout, with the same data under another."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from launchers.steps import resumed_config
from tests.distributed.forks import in_ranks
from tests.distributed.tiny_training import STEPS, Home, Setting, metrics_of, must_be_the_same, train_rank
from train.checkpoint.layout import rank_file, step_folder
from train.run_folder import RunFolder

pytestmark = pytest.mark.distributed

STOPPED = 3
"""The step after which runs are resumed: within the first epoch, at a rate that is not the peak's."""
ALL = ("checkpoint.keep_last=0",)


class Runs:
    """An uninterrupted run of two ranks, and what follows from its checkpoint of step `STOPPED`."""

    def __init__(self, tmp: Path) -> None:
        self.tmp, self.home, self.whole = tmp, Home.make(tmp), tmp / "whole"
        self.whole.mkdir()
        setting = Setting("zero2", "lora", 2, ALL)
        in_ranks(train_rank, 2, setting.config(self.home, self.whole), self.home, self.whole, False)

    def resumed(self, name: str, ranks: int, *words: str) -> Path:
        """A copy of the run, as `crosstune resume COPY words...` goes on with it."""
        run = shutil.copytree(self.whole, self.tmp / name)
        for step in range(STOPPED + 1, STEPS + 1):
            shutil.rmtree(step_folder(RunFolder(run).checkpoints, step))
        cfg = resumed_config(run, list(words))
        in_ranks(train_rank, ranks, cfg, self.home, run, True)
        return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("exact"))


def generators(run: Path, step: int, rank: int) -> dict[str, bytes]:
    """States of the generators of one rank after a step."""
    with safe_open(step_folder(RunFolder(run).checkpoints, step) / rank_file(rank), "np") as file:
        return {key: file.get_tensor(key).tobytes() for key in file.keys() if key.startswith("rng:")}  # noqa: SIM118


def test_the_uninterrupted_run_has_something_to_lose(runs):
    """Dropout draws on both ranks, each its own, and no two steps see the same data."""
    before, after = ([generators(runs.whole, step, rank) for rank in (0, 1)] for step in (STOPPED, STEPS))
    assert set(before[0]) == {"rng:python", "rng:numpy", "rng:torch"}
    states = [each["rng:torch"] for each in (*before, *after)]
    assert len(set(states)) == 4
    assert len({line["data_hash"] for line in metrics_of(runs.whole)}) == STEPS


def test_the_same_layout_goes_on_bit_by_bit(runs):
    must_be_the_same(runs.whole, runs.resumed("same", 2))


def test_another_number_of_ranks_sees_the_same_data_and_always_does_the_same(runs):
    """Its generators start from (seed, step, rank), since there are more or fewer of them; all else is continued."""
    first, second = (runs.resumed(name, 1, "nproc=1", "sharding=plain") for name in ("one", "two"))
    must_be_the_same(first, second)
    expected, found = metrics_of(runs.whole), metrics_of(first)
    assert found[:STOPPED] == expected[:STOPPED]
    for key in ("step", "data_hash", "lr", "tokens", "supervised_tokens"):
        assert [line[key] for line in found] == [line[key] for line in expected], key
    assert found[STOPPED:] != expected[STOPPED:], "dropout must have drawn otherwise"
