"""Packed rows of families with linear and compressed attention, and the check at start, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.compose import compose
from configs.errors import ConfigError
from tests.distributed.forks import in_ranks
from tests.tiny import samples_of, write_prepared
from tests.tiny_families import save

pytestmark = pytest.mark.distributed

LENGTHS = (24, 31, 18, 110, 27, 105, 35, 29)
"""So uneven that ranks have different numbers of groups of samples of about one length."""


def rank(home: Path, run: Path, leaks: bool, words: tuple[str, ...]) -> None:
    """Trains; where mixers are left as they are, it must be stopped, on every rank."""
    import train.run

    if leaks:
        train.run.wrap_mixers = lambda model, family: 0
    paths = [f"model.path={home / 'model'}", f"dataset.path={home / 'data'}", f"run_dir={run}", "device=cpu"]
    sizes = ["batch_tokens=250", "micro_batch_tokens=120", "max_length=120", "max_steps=2"]
    cfg = compose("train", [*paths, *sizes, "optim.lr=0.01", *words])
    try:
        train.run.train(cfg, model_dir=home / "model", prepared=home / "data", run_dir=run)
    except ConfigError as error:
        assert leaks and "not kept apart" in str(error), error
    else:
        assert not leaks, "not stopped"


CASES = [
    ("qwen3_5_text", "zero2", "bf16", False),
    ("qwen3_5_text", "zero2", "bf16", True),
    ("deepseek_v4", "zero3", "bf16", False),
    pytest.param("deepseek_v3", "zero3", "fp32", False, marks=pytest.mark.slow),
    pytest.param("qwen3_next", "zero3", "fp32", False, marks=pytest.mark.slow),
    pytest.param("kimi_linear", "zero3", "bf16", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "sharding", "precision", "leaks"), CASES)
def test_ranks_with_other_samples_stay_in_step_and_check_together(tmp_path, name, sharding, precision, leaks):
    save(name, tmp_path / "model")
    write_prepared(tmp_path / "data", {"train": samples_of(LENGTHS, vocab_size=12)})
    run = tmp_path / "run"
    run.mkdir()
    words = (f"sharding={sharding}", f"model.precision={precision}", "tuning=full")
    in_ranks(rank, 2, tmp_path, run, leaks, words, seconds=240)
    metrics = run / "metrics.jsonl"
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
    assert steps == ([] if leaks else [1, 2])


def test_a_rank_alone_packs_under_zero3_too(tmp_path):
    """Nobody can fall out of step with it, and its steps are those of a run without pieces."""
    save("qwen3_next", tmp_path / "model")
    write_prepared(tmp_path / "data", {"train": samples_of(LENGTHS, vocab_size=12)})
    losses = []
    for sharding in ("plain", "zero3"):
        run = tmp_path / sharding
        run.mkdir()
        words = (f"sharding={sharding}", "model.precision=fp32", "tuning=full", "packing=on")
        in_ranks(rank, 1, tmp_path, run, False, words, seconds=240)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["loss"], line["grad_norm"]) for line in lines])
    assert len(losses[0]) == 2
    for plain, pieces in zip(*losses, strict=True):
        assert pieces == pytest.approx(plain, rel=1e-4)
