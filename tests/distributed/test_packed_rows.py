"""Packed rows of families with linear and compressed attention, and the check at start, on two ranks."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.compose import build, compose
from configs.errors import ConfigError
from configs.schema.roots import Packing
from tests.distributed.forks import in_ranks
from tests.tiny import samples_of, write_prepared
from tests.tiny_families import save
from train.data.collate import collate
from train.data.plan import RowKind
from train.models.families import FAMILIES

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


ROWS = (
    ((0, 1, 2), (3, 4), (5,)),  # micro-batches of one, two and one groups of samples of about one length
    ((6, 7, 0), (5, 0), (3, 5, 1)),
)
"""Of each step the micro-batches, one row each: so uneven that a layer runs another number of times in each."""


def alone(home: Path, name: str, sharding: str) -> None:
    """Two steps of packed rows on one rank; writes the change of each weight, which is the gradients' sum."""
    from tests.distributed.layouts import DEVICE, start
    from train.objectives.base import Objective
    from train.run import make_engine, row_kind

    world = start()
    words = [f"model.path={home / 'model'}", "dataset.path=x", "device=cpu", "model.precision=fp32", "tuning=full"]
    words += ["optim=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.max_grad_norm=0", f"sharding={sharding}"]
    if sharding == "zero3":  # below it nothing of so small a model would be spread and gathered
        words.append("+sharding.deepspeed={zero_optimization:{stage3_param_persistence_threshold:500}}")
    cfg = compose("train", words)
    kind = row_kind(cfg, FAMILIES[name], lambda text: None, world.size)
    assert kind is RowKind.packed
    samples = samples_of(LENGTHS, vocab_size=300)
    objective = build(cfg.objective, Objective)
    made = make_engine(cfg, home / "model", FAMILIES[name], kind, DEVICE, world, lambda text: None, objective)
    with closing(made) as engine:
        pieces = engine.fragments(owned=True)
        assert {piece.name for piece in pieces} == set(engine.trained)
        before = {piece.name: piece.view("master").clone() for piece in pieces}
        for step in ROWS:
            for number, row in enumerate(step):
                batch = collate((row,), samples.__getitem__, kind=kind, device=torch.device("cpu"))
                engine.backward(objective.loss_sum(engine.forward, batch) / 100, last=number == len(step) - 1)
            engine.step(0.1)
        save_file({n: piece.view("master") - before[n] for n, piece in ((p.name, p) for p in pieces)}, home / sharding)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_next",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("kimi_linear", "deepseek_v32", "deepseek_v4")),
    ],
)
def test_one_rank_packs_under_zero3_and_learns_the_same(tmp_path, name):
    """There is nobody to fall out of step with, though a wrapped layer is gathered for each group of samples."""
    save(name, tmp_path / "model")
    write_prepared(tmp_path / "data", {"train": samples_of(LENGTHS, vocab_size=12)})
    run = tmp_path / "run"
    run.mkdir()
    in_ranks(rank, 1, tmp_path, run, False, ("sharding=zero3", "model.precision=fp32", "tuning=full"), seconds=240)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2, "a whole run, with the check at its start"
    for sharding in ("plain", "zero3"):
        in_ranks(alone, 1, tmp_path, name, sharding, seconds=240)
    plain, spread = (load_file(tmp_path / sharding) for sharding in ("plain", "zero3"))
    assert plain.keys() == spread.keys() and sum(change.norm() > 0 for change in plain.values()) > 0.9 * len(plain)
    for name, change in plain.items():
        error = (spread[name] - change).norm() / (change.norm() + 1e-9)
        assert error < 1e-4, (name, error)


@pytest.mark.parametrize("packing", list(Packing))
def test_ranks_that_gather_together_take_one_sample_a_row(packing):
    from train.run import row_kind

    notes: list[str] = []
    cfg = compose("train", ["model.path=x", "dataset.path=x", "sharding=zero3", f"packing={packing.value}"])
    family = FAMILIES["qwen3_next"]
    if packing is Packing.on:
        with pytest.raises(ConfigError, match="in step"):
            row_kind(cfg, family, notes.append, 2)
    else:
        expected = RowKind.padded if packing is Packing.off else RowKind.single
        assert row_kind(cfg, family, notes.append, 2) is expected
        assert len(notes) == (packing is Packing.auto)
        assert row_kind(cfg, FAMILIES["llama"], notes.append, 2) is not RowKind.single, "nothing of it is wrapped"
