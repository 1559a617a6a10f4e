"""Whole runs of every family: records that were prepared, through `train` and its checkpoints, to a model that learned.

The default suite takes the cheap families; `make test-all` and `make families` take all.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from configs.schema.tuning import FullConfig
from tests.cells import ATTENTION, BF16, EXPERTS, FAMILIES, FULL, RESUME, why_not
from tests.command import final_weights, metrics_of
from tests.tiny import samples_of, write_prepared
from tests.tiny_families import save
from train.models.families import family_of
from train.models.load import load_model
from train.run import train
from train.tuning.full import FullTuning

QUICK = ("qwen3_5_text", "deepseek_v32", "minimax_m2", "kimi_k25")
"""One with linear attention, one with an indexer, one whose routers have a correction, one with a tower."""
LENGTHS = (24, 31, 18, 40, 27, 22, 35, 29)
STEPS = 14


def families(column: str, quick: tuple[str, ...] = QUICK) -> list:
    """Those that have the cell; all but the quick ones are slow."""
    there = [name for name in FAMILIES if why_not(name, column) is None]
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in there]


@dataclass
class Home:
    """A model, data and runs on them."""

    tmp: Path
    name: str

    def __post_init__(self) -> None:
        self.model = save(self.name, self.tmp / "model")
        self.data = write_prepared(self.tmp / "data", {"train": samples_of(LENGTHS, vocab_size=12)})

    def train(self, run: str, *overrides: str, resume: bool = False) -> Path:
        """A run in this process."""
        folder = self.tmp / run
        folder.mkdir(exist_ok=True)
        words = [f"model.path={self.model}", f"dataset.path={self.data}", f"run_dir={folder}", "device=cpu"]
        sizes = [
            "batch_tokens=120",
            "micro_batch_tokens=120",
            "max_length=120",
            f"max_steps={STEPS}",
            "checkpoint.every=7",
        ]
        how = ["model.precision=fp32", "optim.lr=0.01", "schedule=constant"]
        cfg = compose("train", [*words, *sizes, *how, *overrides])
        train(cfg, model_dir=self.model, prepared=self.data, run_dir=folder, resume=resume)
        return folder


@pytest.fixture
def home(tmp_path, name):
    return Home(tmp_path, name)


def must_have_learned(run: Path) -> None:
    """Samples of nine tokens out of 320: whatever trains, it soon learns which nine."""
    losses = [line["loss"] for line in metrics_of(run)]
    assert len(losses) == STEPS and all(line["grad_norm"] > 0 for line in metrics_of(run))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3]), losses


@pytest.mark.cell(FULL, RESUME)
@pytest.mark.parametrize("name", families(FULL))
def test_full_tuning_changes_all_that_has_a_gradient_and_a_resumed_run_does_the_same(home, name):
    whole = home.train("whole", "tuning=full")
    must_have_learned(whole)
    before = load_model(home.model, dtype=torch.float32)
    FullTuning(FullConfig()).apply(before, family_of(before.config))
    trained = {n: p for n, p in before.named_parameters() if p.requires_grad}
    after = final_weights(whole)
    assert after.keys() == trained.keys()
    still = [n for n, p in trained.items() if torch.equal(after[n], p)]
    assert not still, f"unchanged: {still}"

    cut = shutil.copytree(whole, home.tmp / "cut")
    shutil.rmtree(cut / "checkpoints" / f"step-{STEPS:08d}")
    home.train("cut", "tuning=full", resume=True)
    again = final_weights(cut)
    assert all(torch.equal(again[n], after[n]) for n in after)
    figures = ("step", "loss", "grad_norm", "data_hash")
    assert [[line[f] for f in figures] for line in metrics_of(cut)] == [
        [line[f] for f in figures] for line in metrics_of(whole)
    ]


@pytest.mark.cell(ATTENTION)
@pytest.mark.parametrize("name", families(ATTENTION, ()))
def test_lora_on_attention_learns(home, name):
    run = home.train("lora", "tuning.targets=attention")
    must_have_learned(run)
    assert all(("attn." in n or ".attention." in n) and ".experts." not in n for n in final_weights(run))


@pytest.mark.cell(EXPERTS)
@pytest.mark.parametrize("name", families(EXPERTS, ("deepseek_v32",)))
def test_lora_on_routed_experts_learns(home, name):
    run = home.train("experts", "tuning.targets=routed_experts")
    must_have_learned(run)
    assert all(".experts." in n for n in final_weights(run))


@pytest.mark.cell(BF16)
@pytest.mark.parametrize("name", families(BF16, ("minimax_m2",)))
def test_bf16_begins_where_fp32_does_and_learns_as_well(home, name):
    first = home.train("fp32", "tuning=full", "max_steps=1")
    run = home.train("bf16", "tuning=full", "model.precision=bf16")
    assert metrics_of(run)[0]["loss"] == pytest.approx(metrics_of(first)[0]["loss"], rel=0.01)
    must_have_learned(run)
