"""The step loop as a run drives it: rates, modes, generators, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.device import DeviceConfig
from configs.schema.objective import CausalLMConfig
from configs.schema.roots import TrainConfig
from tests.tiny import samples_of, save_tiny_model, write_prepared
from tests.unit.tiny_run import LENGTHS, tiny_run
from train.data.plan import RowKind
from train.devices.cpu import CpuDevice
from train.engine.base import World
from train.models.families import FAMILIES
from train.objectives.causal_lm import CausalLM
from train.plan.kept import Foresight
from train.run import make_engine, train
from train.run_folder import RunFolder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    splits = {
        "train": samples_of(LENGTHS, vocab_size=290),
        "validation": samples_of((20, 5, 41, 12, 30), vocab_size=290, seed=1),
    }
    write_prepared(home / "data", splits)
    return home


def config(home: Path, *overrides: str) -> TrainConfig:
    paths = [f"model.path={home / 'model'}", f"dataset.path={home / 'data'}", "device=cpu", "model.precision=fp32"]
    sizes = ["max_steps=3", "batch_tokens=80", "micro_batch_tokens=50", "max_length=50", "optim.lr=0.01"]
    return compose("train", [*paths, *sizes, *overrides])


def metrics(home: Path, run_dir: Path, *overrides: str) -> list[dict[str, float]]:
    run_dir.mkdir()
    train(config(home, *overrides), model_dir=home / "model", prepared=home / "data", run_dir=run_dir)
    return [json.loads(line) for line in RunFolder(run_dir).metrics.read_text().splitlines()]


def test_each_step_has_the_rate_of_the_schedule(home, tmp_path):
    found = metrics(home, tmp_path / "run", "schedule=linear", "schedule.warmup_steps=2", "max_steps=5")
    assert [line["lr"] for line in found] == pytest.approx([0.005, 0.01, 0.01, 0.01 * 2 / 3, 0.01 / 3])


def test_measuring_the_validation_loss_changes_no_step_and_sees_no_dropout(home, tmp_path):
    plain = metrics(home, tmp_path / "plain")
    dropout = metrics(home, tmp_path / "dropout", "tuning.dropout=0.3")
    measured = metrics(home, tmp_path / "measured", "tuning.dropout=0.3", "eval_every=1")
    losses = [[line["loss"] for line in run] for run in (plain, dropout, measured)]
    assert losses[1] == losses[2] and losses[0] != losses[1]
    rate_0 = metrics(home, tmp_path / "still", "tuning.dropout=0.3", "eval_every=1", "optim.lr=0")
    assert len({line["validation_loss"] for line in rate_0}) == 1


def test_old_checkpoints_go(tmp_path):
    run = tiny_run(tmp_path, "checkpoint.every=1", "checkpoint.keep_last=1")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]


def test_activations_are_computed_again_where_asked_for(home, tmp_path, monkeypatch):
    calls = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    words = ("max_steps=1", "check_packing=false")
    metrics(home, tmp_path / "kept", *words)
    once = len(calls)
    metrics(home, tmp_path / "again", *words, "activation_checkpointing=true")
    assert len(calls) - once == 2 * once
    before = len(calls)
    metrics(home, tmp_path / "selected", *words, "activation_checkpointing=true", "activation_checkpointing_every=2")
    assert len(calls) - before == once + once * 2 // 3, "two of three layers"
    before = len(calls)
    metrics(home, tmp_path / "upper", *words, "activation_checkpointing=true", "tuning=lora", "tuning.first_layer=2")
    assert len(calls) - before == once + once // 3, "nothing below the lowest adapter goes back"


def test_ranks_do_what_rank_0_chose_of_a_budget(home):
    """Each would measure its own libraries, and under ZeRO-3 ranks that recompute other layers wait for ever."""
    cfg = config(home, "activation_budget=10GiB")

    def of_another(told):
        world = SimpleNamespace(rank=1, broadcast_bytes=lambda data: json.dumps(told).encode())
        return Foresight(home / "model", CpuDevice(DeviceConfig()), world, RowKind.packed, None).settle(
            cfg, pytest.fail
        )

    assert of_another({"every": 3, "fault": None}).recompute_every == 3
    assert of_another({"every": 0, "fault": None}).recompute_every == 0
    with pytest.raises(ConfigError, match=r"activation_budget: 10GiB, but[\s\S]*remedy:  less"):
        of_another({"every": 0, "fault": {"found": "10GiB, but", "remedy": "less"}})


def test_ranks_begin_with_equal_adapters_and_go_on_with_dropout_of_their_own(home):
    adapters, draws = [], []
    for rank in (0, 1):
        engine = make_engine(
            config(home),
            home / "model",
            FAMILIES["llama"],
            RowKind.packed,
            CpuDevice(DeviceConfig(threads=1)),
            World(rank=rank),
            lambda _: None,
            CausalLM(CausalLMConfig()),
        )
        adapters.append(torch.cat([p.detach().flatten() for p in engine.trained.values()]))
        draws.append(torch.rand(4))
    assert torch.equal(*adapters) and not torch.equal(*draws)
