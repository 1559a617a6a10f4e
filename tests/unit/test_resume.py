"""What a resumed run takes from its beginning."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from configs.compose import load_resolved
from configs.errors import DataError, ModelError
from tests.tiny import samples_of, write_prepared
from tests.unit.tiny_run import tiny_run
from train.data.prepared import PreparedData
from train.devices.cpu import CpuDevice
from train.ops.kernel import REFERENCES
from train.origin import BaseDigests
from train.run import train, validation_split
from train.run_folder import RunFolder


def figures(run: RunFolder) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in map(json.loads, run.metrics.read_text().splitlines())]


def resume(tmp_path: Path, run: RunFolder) -> None:
    """Goes on after the second of the three steps."""
    shutil.rmtree(run.checkpoints / "step-00000003")
    cfg = load_resolved(run.resolved)
    train(cfg, model_dir=tmp_path / "model", prepared=tmp_path / "data", run_dir=run.path, resume=True)


def test_dropout_goes_on_and_auto_keeps_the_precision_of_the_beginning(tmp_path, monkeypatch):
    monkeypatch.setattr(CpuDevice, "fast_dtypes", lambda self: (torch.bfloat16, torch.float32))
    # The CPU's own kernels are for machines with bf16, which this one ceases to be.
    plain = [f"device.{op}_kernel=reference" for op in REFERENCES]
    run = tiny_run(tmp_path, "model.precision=auto", *plain, "tuning.dropout=0.3", "checkpoint.every=1")
    assert run.read_record().precision == "bf16"
    whole = figures(run)
    monkeypatch.setattr(CpuDevice, "fast_dtypes", lambda self: (torch.float32,))
    resume(tmp_path, run)
    assert figures(run) == whole


def test_what_is_no_file_among_the_bases_has_no_digest_and_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    assert list(BaseDigests(tmp_path).wait()) == ["config.json"]
    for error, raised in (
        (PermissionError(13, "Permission denied", "there"), ModelError),
        (MemoryError(), MemoryError),
    ):
        monkeypatch.setattr("train.origin.sha256_of", Mock(side_effect=error))
        with pytest.raises(raised, match="there: cannot be read" if raised is ModelError else None):
            BaseDigests(tmp_path).wait()


def test_a_budget_is_recorded_as_it_was_asked_for_so_that_a_resume_may_have_another(tmp_path):
    run = tiny_run(tmp_path, "activation_budget=10GiB", "checkpoint.every=1")
    cfg = load_resolved(run.resolved)
    assert (cfg.activation_budget, cfg.activation_checkpointing) == ("10GiB", False)
    whole = figures(run)
    shutil.rmtree(run.checkpoints / "step-00000003")
    cfg = replace(cfg, activation_budget=None, activation_checkpointing=True)
    train(cfg, model_dir=tmp_path / "model", prepared=tmp_path / "data", run_dir=run.path, resume=True)
    assert figures(run) == whole


def test_a_validation_sample_that_fits_no_pass_is_refused(tmp_path):
    run = tiny_run(tmp_path)
    cfg = replace(load_resolved(run.resolved), eval_every=1, max_length=64, micro_batch_tokens=64)
    splits = {"train": samples_of([20], vocab_size=90), "validation": samples_of([65], vocab_size=90)}
    data = PreparedData.open(write_prepared(tmp_path / "long", splits))
    with pytest.raises(DataError, match="longest sample of .* has 65 tokens"):
        validation_split(data, cfg)
