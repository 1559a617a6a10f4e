"""Ranks of which one has no image: nobody waits for it, and what is learned is what one process learns."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from tests.cells import IMAGE
from tests.command import final_weights, metrics_of
from tests.distributed.forks import in_ranks
from tests.tiny_images import save_seeing, write_records
from tests.unit.prep_kit import files, prep_config
from train.loop import Loop
from train.run import train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 3
TOLERANCE = 2e-4
SECONDS = 120
"""A run takes a few; one whose ranks wait for each other takes forever."""


@dataclass(frozen=True)
class Home:
    model: Path
    data: Path
    runs: Path


def made(name: str, folder: Path) -> Home:
    """Four samples, of which one shows images: its rank is the only one that has any."""
    from data_prep.prepare import prepare

    model = save_seeing(name, folder / "model")
    prepared = prepare(prep_config(folder, files(write_records(folder / "data", 4, every=4))), model)
    return Home(model, prepared.path, folder)


def train_rank(home: Home, name: str, words: tuple[str, ...]) -> None:
    """One rank of `crosstune train`; leaves a hash of the vision tower it holds, before and after."""
    run_dir = home.runs / name
    run_dir.mkdir(exist_ok=True)
    paths = [f"model.path={home.model}", f"dataset.path={home.data}", f"run_dir={run_dir}"]
    sizes = ["batch_tokens=2000", "micro_batch_tokens=1024", f"max_steps={STEPS}"]
    steps = ["optim=sgd", "optim.lr=0.1", "schedule=constant", "device=cpu", "model.precision=fp32"]
    run_loop = Loop.run

    def watched(loop: Loop, state: object) -> object:
        found = [tower_hash(loop.engine.module)]
        after = run_loop(loop, state)
        found.append(tower_hash(loop.engine.module))
        (run_dir / f"tower-{loop.world.rank}.json").write_text(json.dumps(found))
        return after

    Loop.run = watched
    cfg = compose("train", [*paths, *sizes, *steps, *words])
    train(cfg, model_dir=home.model, prepared=home.data, run_dir=run_dir)


def tower_hash(module: torch.nn.Module) -> str:
    """Of what this rank holds of the tower; under ZeRO-3 its pieces."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if "visual." in name or "vision_tower." in name or "mm_projector." in name:
            held = getattr(parameter, "ds_tensor", parameter)
            digest.update(name.encode() + held.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Runs:
    """Runs of one family, each made once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.home, self._done = made(name, folder), set()

    def __call__(self, *words: str, ranks: int) -> Path:
        name = "-".join([*words, str(ranks)]).replace("=", "_").replace("[", "").replace("]", "none")
        if name not in self._done:
            in_ranks(train_rank, ranks, self.home, name, words, seconds=SECONDS)
            self._done.add(name)
        return self.home.runs / name


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory):
    made = {}

    def runs(name):
        if name not in made:
            made[name] = Runs(name, tmp_path_factory.mktemp(name))
        return made[name]

    return runs


def towers(run_dir: Path) -> list[list[str]]:
    return [json.loads(path.read_text()) for path in sorted(run_dir.glob("tower-*.json"))]


def must_have_learned_the_same(reference: Path, other: Path) -> None:
    for mine, theirs in zip(metrics_of(other), metrics_of(reference), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)
        assert mine["tokens"] == theirs["tokens"]
    a, b = final_weights(reference), final_weights(other)
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-6)
        assert error <= TOLERANCE, (name, float(error))


FULL = ("tuning=full",)
TRAINED = ("tuning=full", "tuning.frozen=[]")
LORA = ("tuning=lora", "tuning.targets=[attention+vision]")


@pytest.mark.cell(IMAGE)
@pytest.mark.parametrize("sharding", ["plain", "zero3"])
@pytest.mark.parametrize("name", ["qwen3_5", "kimi_k25"])
@pytest.mark.parametrize("words", [FULL, TRAINED], ids=["frozen", "trained"])
def test_a_rank_without_images_keeps_step(runs_of, name, sharding, words):
    runs = runs_of(name)
    reference = runs(*words, "sharding=plain", ranks=1)
    other = runs(*words, f"sharding={sharding}", ranks=2)
    must_have_learned_the_same(reference, other)
    for before, after in towers(other) + towers(reference):
        assert (before == after) == (words == FULL)
    trained = final_weights(other)
    assert any("visual." in part or "vision_tower." in part for part in trained) == (words == TRAINED)


@pytest.mark.parametrize("sharding", ["plain", "zero3"])
@pytest.mark.parametrize("name", ["qwen3_5", "kimi_k25"])
def test_adapters_of_the_tower_train_on_the_rank_that_has_the_image(runs_of, name, sharding):
    runs = runs_of(name)
    must_have_learned_the_same(runs(*LORA, "sharding=plain", ranks=1), runs(*LORA, f"sharding={sharding}", ranks=2))


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_k25"])
def test_rows_of_one_sample_and_fillers_keep_step_too(runs_of, name):
    """Three ranks for four samples, a pass for each: two ranks end with a filler, and most passes have no image."""
    runs = runs_of(name)
    reference = runs(*TRAINED, "sharding=plain", ranks=1)
    single = ("packing=off", "max_length=100", "micro_batch_tokens=100")
    must_have_learned_the_same(reference, runs(*TRAINED, *single, "sharding=zero3", ranks=3))
