"""`crosstune prove` as a user runs it: what holds is proven, what is broken is named, the user's runs stay."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from configs.schema.prove import ProveResumeConfig
from launchers.cli import _config
from launchers.command_line import parse
from launchers.prove import layout, reshard, resume
from tests.command import crosstune, write_uneven_records
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A user's config; its caches are shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("user")
    return [
        f"model.path={save_tiny_model(folder / 'model')}",
        f"dataset.path={write_uneven_records(folder / 'data.jsonl')}",
        f"cache_dir={folder / 'cache'}",
        *("device=cpu", "model.precision=fp32", "max_length=320", "micro_batch_tokens=400", "batch_tokens=700"),
    ]


BROKEN_LOAD = """
import sys

if "reshard" in sys.orig_argv:
    from train.prove import reload

    whole = reload.restore_latest

    def broken(engine, *args, **kwargs):
        state = whole(engine, *args, **kwargs)
        engine.fragments(owned=False)[0].view("exp_avg")[0] += 1
        return state

    reload.restore_latest = broken
"""
"""A load that garbles one value, in the process that loads."""


def configured(*typed: str):
    return _config(parse(["prove", *typed]))


def proof_in(folder: Path):
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.slow
def test_a_killed_run_is_proven_equal_and_the_user_s_own_runs_stay(words, tmp_path):
    mine = tmp_path / "runs/mine"
    mine.mkdir(parents=True)
    (mine / "metrics.jsonl").write_text("{}\n")
    typed = ["prove", "resume", *words, "steps=4", "kills=1", "kill_seed=1", "tuning.dropout=0.1", "out=proof"]
    shown = crosstune(*typed, cwd=tmp_path, HF_HUB_OFFLINE="1")
    proof = proof_in(tmp_path / "proof")
    assert proof["proven"] and proof["kill_seed"] == 1 and len(proof["kills"]) == 1
    compared = {each["what"]: each["same"] for each in proof["parts"][0]["comparisons"]}
    wanted = ["steps in metrics.jsonl", "data_hash of each step", "loss of each step", "weights", "random generators"]
    assert all(compared[what] for what in [*wanted, "optimizer, exp_avg_sq"])
    assert "prove resume  proven" in shown and "kill_seed=1" in shown
    assert sorted(path.name for path in (tmp_path / "proof").iterdir()) == ["logs", "proof.html", "proof.json"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"] and len(list(mine.iterdir())) == 1


@pytest.mark.slow
def test_a_resume_that_computes_otherwise_is_found_and_not_blamed_on_the_device(words, tmp_path, monkeypatch, capsys):
    whole = resume.Command

    def broken(typed, *args):
        return whole([*typed, "packing=off"] if typed[0] == "resume" else typed, *args)

    monkeypatch.setattr(resume, "Command", broken)
    # Every step of it: the last bits differ only where a step has rows of more than one sample.
    cfg = configured("resume", *words, "steps=8", "kills=1", "kill_seed=1", f"out={tmp_path / 'proof'}")
    assert isinstance(cfg, ProveResumeConfig)
    result = resume.prove_resume(cfg)
    shown = capsys.readouterr().out
    assert result["exit_code"] == 3 and not result["proven"] and result["first_difference"]["kind"] == "loss"
    assert "NOT PROVEN" in shown and "two runs without a kill are equal bit by bit" in " ".join(shown.split())
    assert (tmp_path / "proof/runs/killed/metrics.jsonl").is_file()


@pytest.mark.slow
def test_a_resume_that_fails_is_a_finding(words, tmp_path, monkeypatch):
    whole = resume.kill_at

    def and_damage(moment, command, run_dir, *args):
        kill = whole(moment, command, run_dir, *args)
        for file in run_dir.glob("checkpoints/step-*/rank*.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"\x55")
        return kill

    monkeypatch.setattr(resume, "kill_at", and_damage)
    cfg = configured("resume", *words, "steps=8", "kills=1", "kill_seed=3", f"out={tmp_path / 'proof'}")
    result = resume.prove_resume(cfg)
    assert result["exit_code"] == 3 and "SHA-256" in result["parts"][0]["failure"]


@pytest.mark.slow
def test_kills_of_several_ranks_inside_saves_on_a_cut_model(words, tmp_path):
    typed = [*words, "nproc=2", "sharding=zero3", "shrink=true", "layers=1", "tuning=full", "kills=2", "steps=8"]
    crosstune("prove", "resume", *typed, "out=proof", cwd=tmp_path)
    proof = proof_in(tmp_path / "proof")
    assert proof["proven"] and [kill["processes"] >= 4 for kill in proof["kills"]] == [True, True]
    assert any("layers 0 of 3, with their weights" in change["text"] for change in proof["changes"])


@pytest.mark.slow
def test_resharding_is_proven_and_a_broken_load_is_found(words, tmp_path, monkeypatch):
    typed = ["reshard", *words, "steps=4", "from=zero3x2", "to=zero1x2,plainx1"]
    result = reshard.prove_reshard(configured(*typed, f"out={tmp_path / 'proof'}"), None)
    titles = [part["title"] for part in result["parts"]]
    assert result["proven"] and titles == ["zero3x2 -> zero1x2", "zero3x2 -> plainx1"]
    assert len(result["load_memory"]["zero1x2"]) == 2
    (tmp_path / "sitecustomize.py").write_text(BROKEN_LOAD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    typed = ["reshard", *words, "steps=4", "from=plainx1", "to=plainx1"]
    result = reshard.prove_reshard(configured(*typed, f"out={tmp_path / 'broken'}"), None)
    first = result["first_difference"]
    assert result["exit_code"] == 3 and (first["kind"], first["index"]) == ("exp_avg", (0, 0))
    assert first["found"] == pytest.approx(first["expected"] + 1)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_gradients_are_proven_equal_over_layouts(words, tmp_path, tuning):
    cfg = configured("layout", *words, f"tuning={tuning}", "to=zero2x2", f"out={tmp_path / 'proof'}")
    result = layout.prove_layout(cfg, None)
    assert result["proven"], result["first_difference"]
    titles = [part["title"] for part in result["parts"]]
    assert titles == ["padded rows", "more accumulation: micro_batch_tokens=320", "plainx2", "zero2x2"]


@pytest.mark.slow
def test_a_gradient_that_depends_on_the_layout_is_found(words, tmp_path, monkeypatch):
    # Half of the batch is left out in one layout, as a loss that forgets a micro-batch would.
    whole = layout._cases

    def broken(cfg):
        title, case = next(iter(whole(cfg)))
        case.batch_tokens //= 2
        yield title, case

    monkeypatch.setattr(layout, "_cases", broken)
    result = layout.prove_layout(configured("layout", *words, f"out={tmp_path / 'proof'}"), None)
    assert result["exit_code"] == 3
    differing = {each["what"] for part in result["parts"] for each in part["comparisons"] if not each["same"]}
    assert {"gradient", "data_hash of each step"} <= differing
