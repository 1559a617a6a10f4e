"""Checkpoints of one process: what is stored, what is refused, and what a kill leaves behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train.checkpoint.files as files
from configs.errors import CheckpointError, ConfigError, StorageError
from configs.schema.optim import AdamWConfig
from configs.schema.outputs import Storage
from launchers.cli import main
from launchers.steps import resumed_config
from tests.unit.checkpoint_kit import WORLD, MomentumConfig, NAdamConfig, all_tensors, engine, state, steps
from tests.unit.tiny_run import tiny_run
from train.checkpoint.layout import CheckpointReader, rank_file
from train.checkpoint.restore import restore, restore_latest
from train.checkpoint.retention import latest
from train.checkpoint.rng import derived_seed
from train.checkpoint.save import save
from train.run import train
from train.run_folder import sha256_of


@pytest.mark.parametrize("optim", [AdamWConfig(weight_decay=0.1), NAdamConfig(), MomentumConfig()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_engine_goes_on_bit_for_bit(tmp_path, optim, dtype):
    first = engine(optim, dtype)
    steps(first, 0, 3)
    path = save(first, tmp_path, state(3), WORLD)
    draws = [torch.rand(2).tolist(), random.random(), np.random.rand()]
    other = engine(optim, dtype, seed=9)
    steps(other, 50, 2)  # an engine that has stepped must forget it
    assert restore(other, path, WORLD) == state(3)
    assert [torch.rand(2).tolist(), random.random(), np.random.rand()] == draws
    before, after = all_tensors(first), all_tensors(other)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert len(before) > len(first.trained), "the optimizer's tensors are among them"
    assert steps(other, 3, 3) == steps(first, 3, 3)


def test_a_checkpoint_of_step_0_resumes_as_a_fresh_start(tmp_path):
    first = engine()
    path = save(first, tmp_path, state(0), WORLD)
    other = engine(seed=9)
    steps(other, 50, 2)
    restore(other, path, WORLD)
    assert steps(other, 0, 3) == steps(first, 0, 3)


def test_at_another_number_of_ranks_generators_start_from_seed_step_and_rank(tmp_path):
    built, path = engine(), two_files(tmp_path, 3)
    draws = []
    for _ in range(2):
        restore(built, path, WORLD)
        draws.append([torch.rand(2).tolist(), random.random(), np.random.rand()])
    assert draws[0] == draws[1]
    assert len({derived_seed(*place) for place in [(3, 3, 0), (3, 3, 1), (3, 4, 0), (4, 3, 0)]}) == 4


def test_reader_gives_whole_parameters_and_ranges(tmp_path):
    built = engine(dtype=torch.bfloat16)
    steps(built, 0, 2)
    with CheckpointReader(save(built, tmp_path, state(2), WORLD)) as reader:
        assert list(reader.params) == [name for name, p in built.module.named_parameters() if p.requires_grad]
        assert reader.params["0.weight"].shape == (5, 4) and reader.params["0.weight"].step == 2
        whole = reader.read("0.weight")
        assert whole.dtype == torch.float32 and torch.equal(whole.bfloat16(), built.module[0].weight)
        part = torch.empty(7)
        reader.read_into(part, "0.weight", "master", offset=6)
        assert torch.equal(part, whole.flatten()[6:13])


def test_no_file_can_carry_code(tmp_path):
    path = save(engine(), tmp_path, state(1), WORLD)
    assert sorted(file.name for file in path.iterdir()) == ["COMPLETE", "index.json", "rank00000.safetensors"]


@pytest.mark.parametrize("file", ["rank00000.safetensors", "index.json", "COMPLETE"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named_and_the_previous_checkpoint_offered(tmp_path, file, damage):
    built = engine()
    save(built, tmp_path, state(1), WORLD)
    path = save(built, tmp_path, state(2), WORLD)
    content = bytearray((path / file).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        (path / file).write_bytes(content)
    elif damage == "cut":
        (path / file).write_bytes(content[:-3])
    else:
        (path / file).unlink()
    weights = all_tensors(built)
    with pytest.raises(CheckpointError) as caught:
        restore(built, path, WORLD)
    # A wrong hash in COMPLETE is seen at the file that it belongs to.
    culprit = {"COMPLETE": "index.json", "index.json": "index.json"}.get(file, file)
    assert culprit in caught.value.where or (file, damage) == ("COMPLETE", "remove")
    assert "step-00000001" in caught.value.remedy
    assert all(torch.equal(tensor, weights[key]) for key, tensor in all_tensors(built).items()), "nothing was loaded"


def test_a_resume_does_not_pass_over_a_checkpoint_that_lost_its_seal(tmp_path):
    built, folder = engine(), tmp_path / "checkpoints"
    for step in (1, 2):
        path = save(built, folder, state(step), WORLD)
    (folder / "step-00000003.partial").mkdir()  # a torn save never counted

    def resume():
        return restore_latest(built, folder, WORLD, storage=Storage.shared, run_id="", note=print)

    assert resume() == state(2)
    (path / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="step-00000002: holds no COMPLETE") as caught:
        resume()
    assert f"step-00000001 of the same run is complete; to go on from it: mv {path}" in caught.value.remedy
    path.rename(f"{path}.set-aside")
    assert resume() == state(1)
    (folder / "step-00000001/COMPLETE").write_text("")
    with pytest.raises(CheckpointError, match="does not match the SHA-256 in COMPLETE"):
        resume()


def test_another_model_or_optimizer_is_refused_with_the_differences(tmp_path):
    path = save(engine(), tmp_path, state(1), WORLD)
    other = engine(MomentumConfig(), width=6)
    other.trained["3.extra"] = other.trained.pop("2.bias")
    with pytest.raises(CheckpointError) as caught:
        restore(other, path, WORLD)
    for difference in (
        "3.extra is not in the checkpoint",
        "2.bias is not trained in this run",
        "0.weight is [6, 4] here, [5, 4] in the checkpoint",
        "the optimizer is torch.optim.SGD here, torch.optim.AdamW in the checkpoint",
    ):
        assert difference in caught.value.found
    assert f"crosstune export run_dir={tmp_path.parent}" in caught.value.remedy


@pytest.mark.parametrize("moment", ["rank00000.safetensors", "index.json", "COMPLETE", "rename"])
def test_killed_inside_a_save_the_previous_checkpoint_stays_the_latest(tmp_path, monkeypatch, moment):
    built = engine()
    steps(built, 0, 1)
    first = save(built, tmp_path, state(1), WORLD)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die():
        if moment == "rename":
            monkeypatch.setattr(files.Path, "rename", die)
        else:
            original = files.sync
            monkeypatch.setattr(files, "sync", lambda f: die() if f.name.endswith(moment) else original(f))
        save(built, tmp_path, state(2), WORLD)

    child = multiprocessing.get_context("fork").Process(target=save_and_die)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002.partial"]
    assert latest(tmp_path) == first
    restore(engine(seed=9), first, WORLD)
    (tmp_path / ".seen-by-0123-0").touch()  # of a rank that was killed while it looked for the others
    again = save(built, tmp_path, state(2), WORLD)
    assert latest(tmp_path) == again
    assert sorted(tmp_path.iterdir()) == [first, again], "what the kill left behind is gone"


def test_latest_without_any_names_what_was_seen(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        latest(tmp_path / "nowhere")
    (tmp_path / "step-00000007").mkdir()
    with pytest.raises(CheckpointError, match="only step-00000007"):
        latest(tmp_path)


def test_latest_is_by_number(tmp_path):
    built = engine()
    for step in (9, 10, 100_000_000, 8):
        save(built, tmp_path, state(step), WORLD)
    assert latest(tmp_path).name == "step-100000000"


def test_saving_a_step_again_replaces_it(tmp_path):
    built = engine()
    save(built, tmp_path, state(1), WORLD)
    steps(built, 0, 1)
    path = save(built, tmp_path, state(1), WORLD)
    with CheckpointReader(path) as reader:
        assert torch.equal(reader.read("0.weight"), built.module[0].weight)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        save(engine(), tmp_path / "file" / "checkpoints", state(1), WORLD)


def test_state_that_has_no_place_is_refused(tmp_path):
    built = engine()
    steps(built, 0, 1)
    next(iter(built.fragments(owned=True))).optimizer.state[built.trained["0.weight"]]["factor"] = torch.ones(3)
    with pytest.raises(CheckpointError, match="'factor'"):
        save(built, tmp_path, state(1), WORLD)
    assert list(tmp_path.glob("*/COMPLETE")) == []


def two_files(folder, step):
    """As if two machines had written it, the second one the generators of its rank only."""
    path = save(engine(), folder, state(step), WORLD, run_id="mine", metrics={"loss": 0.25})
    content = json.loads((path / "index.json").read_text()) | {"world_size": 2}
    generators = {key: value for key, value in load_file(path / rank_file(0)).items() if key.startswith("rng:")}
    save_file(generators, path / rank_file(1))
    facts = {"sha256": sha256_of(path / rank_file(1)), "bytes": (path / rank_file(1)).stat().st_size}
    content["files"][rank_file(1)] = facts | {"node": 1, "host": "second"}
    (path / "index.json").write_text(json.dumps(content))
    (path / "COMPLETE").write_text(sha256_of(path / "index.json"))
    return path


def test_report_says_what_a_checkpoint_is_and_which_pieces_are_whole(tmp_path, capsys):
    two_files(tmp_path / "run" / "checkpoints", 1)
    path = two_files(tmp_path / "run" / "checkpoints", 2)
    assert main(["report", str(path)]) == 0
    shown = capsys.readouterr().out
    for words in ("step        2 in epoch 1", "run         mine", "loss 0.25", "36 trained weights in 5", "2 whole"):
        assert words in shown
    (path / rank_file(1)).unlink()  # of another machine, so that it may well be there
    assert main(["report", str(path)]) == 0
    assert "1 elsewhere" in (shown := capsys.readouterr().out) and "host second wrote it" in shown
    content = bytearray((path / rank_file(0)).read_bytes())
    content[-1] ^= 1
    (path / rank_file(0)).write_bytes(content)
    assert main(["report", str(path)]) == 2
    shown = capsys.readouterr().out
    assert f"{rank_file(0)}: does not match its SHA-256" in shown
    aside = f"mv {path} {path}.set-aside (on every machine that has it), then crosstune resume {tmp_path / 'run'}"
    assert f"step-00000001 of the same run is complete; to go on from it: {aside}" in shown
    (path / "COMPLETE").unlink()
    assert main(["report", str(path)]) == 2
    assert "is not complete: the save was cut off" in capsys.readouterr().err


def test_a_checkpoint_of_another_run_or_a_file_of_another_step_is_named(tmp_path):
    built = engine()
    save(built, tmp_path, state(1), WORLD, run_id="mine")
    steps(built, 0, 1)
    path = save(built, tmp_path, state(2), WORLD, run_id="mine")
    with pytest.raises(CheckpointError, match="another run: its run_id is mine, that of this run theirs"):
        restore(built, path, WORLD, run_id="theirs")
    shutil.copy(path / rank_file(0), tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="bytes instead of|it is rank00000.safetensors of step-00000002"):
        restore(built, tmp_path / "step-00000001", WORLD)
    steps(built, 1, 1)
    later = save(built, tmp_path, state(3), WORLD, run_id="mine")
    shutil.copy(path / rank_file(0), later)
    with pytest.raises(CheckpointError, match=r"SHA-256 in the index: it is rank00000.safetensors of step-00000002"):
        restore(built, later, WORLD)
    for name in ("index.json", "COMPLETE"):
        shutil.copy(path / name, later)
    with pytest.raises(CheckpointError, match="is that of step 2"):
        restore(built, later, WORLD)


def test_adapters_go_on_with_their_base_in_another_precision(tmp_path, caplog):
    run = tiny_run(tmp_path, "model.precision=bf16", "checkpoint.every=1")
    before = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    shutil.rmtree(run.checkpoints / "step-00000003")
    cfg = resumed_config(run.path, ["model.precision=fp32"])
    with caplog.at_level("INFO"):
        train(cfg, model_dir=tmp_path / "model", prepared=tmp_path / "data", run_dir=run.path, resume=True)
    assert "adapters of a base in bf16 go on with it in fp32" in caplog.text
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    assert losses[:2] == before[:2] and losses[2] != before[2] and losses[2] == pytest.approx(before[2], rel=2e-2)
    record = run.read_record()
    assert record.precisions == "fp32 (bf16 until step 2)"
    assert record.precision_from_here(resumed_config(run.path, []).model.precision).value == "fp32", "and stays so"
    run.write_record(replace(record, tuning="full"))
    with pytest.raises(ConfigError, match="trains all weights in fp32"):
        resumed_config(run.path, ["model.precision=bf16"])
