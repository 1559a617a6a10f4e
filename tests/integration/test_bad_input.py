"""What a user sees for each kind of wrong input: one screen, the key or file, the remedy, exit code 2, no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from configs.compose import compose, save_resolved
from launchers import cli
from tests.command import write_uneven_records
from tests.tiny import save_tiny_model
from train.run_folder import RunFolder, RunRecord

SCREEN = 25


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a sound model, sound records, and broken ones of each kind."""
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    write_uneven_records(home / "data.jsonl")
    sound = (home / "data.jsonl").read_text()
    (home / "empty.jsonl").write_text("")
    (home / "torn.jsonl").write_text(sound + '{"prompt": "a", "completion"\n{"prompt": "b", \n')
    (home / "columns.jsonl").write_text('{"question": "a", "reply": "b"}\n' * 3)
    (home / "hollow.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 3)
    (home / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b " * 400}) + "\n")
    without("model.safetensors", "no_weights", home)
    without("tokenizer.json", "no_tokenizer", home)
    shutil.copytree(home / "model", home / "unproven")
    config = json.loads((home / "unproven/config.json").read_text())
    (home / "unproven/config.json").write_text(json.dumps(config | {"model_type": "stablelm"}))
    (home / "run/checkpoints/step-00000004").mkdir(parents=True)
    return home


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The command sets variables for the libraries, as it may in a process of its own."""
    with mock.patch.dict(os.environ):
        yield


def without(file: str, name: str, home: Path) -> None:
    shutil.copytree(home / "model", home / name)
    (home / name / file).unlink()


def shown(words: list[str], home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints on standard error, checked for what every message must keep to."""
    monkeypatch.chdir(home)
    code = cli.main(words)
    printed = capfd.readouterr()
    assert code == 2, printed
    assert "Traceback" not in printed.err + printed.out
    assert 0 < len((printed.out + printed.err).splitlines()) <= SCREEN
    return printed.err


SOUND = {
    "model.path": "model",
    "dataset.path": "data.jsonl",
    "max_steps": "2",
    "max_length": "128",
    "device": "cpu",
    "cache_dir": "cache",
}
CASES: dict[str, tuple[str, dict[str, str], list[str]]] = {
    # name: (command, overrides on top of the sound ones, what the message must hold)
    "unknown key": ("train", {"dataset.pth": "x"}, ["dataset.pth: unknown key", "did you mean dataset.path?"]),
    "typo in an option": ("train", {"sharding": "zero33"}, ["no option 'zero33'", "did you mean sharding=zero3?"]),
    "wrong type": ("train", {"max_steps": "ten"}, ["max_steps: 'ten'", "a whole number"]),
    "wrong choice": ("train", {"packing": "sometimes"}, ["packing: 'sometimes'", "auto, on, off"]),
    "out of range": ("train", {"schedule.warmup_fraction": "2"}, ["schedule.warmup_fraction: 2", "0 to 1"]),
    "keys that contradict": ("train", {"max_length": "9000"}, ["micro_batch_tokens=2048", "lower max_length"]),
    "no such data": ("train", {"dataset.path": "nope.jsonl"}, ["nope.jsonl"]),
    "empty data": ("train", {"dataset.path": "empty.jsonl"}, ["empty.jsonl"]),
    "torn lines": (
        "train",
        {"dataset.path": "torn.jsonl", "dataset.max_rejects": "1"},
        ["torn.jsonl:2", "max_rejects"],
    ),
    "missing column": ("train", {"dataset.path": "columns.jsonl"}, ["columns.jsonl", "question"]),
    "every row rejected": ("train", {"dataset.path": "hollow.jsonl"}, ["hollow.jsonl"]),
    "only too long rows": ("train", {"dataset.path": "long.jsonl"}, ["max_length"]),
    "no such model": ("train", {"model.path": "nope"}, ["model.path: no folder 'nope'", "hf://"]),
    "model without weights": ("train", {"model.path": "no_weights"}, ["no_weights", "*.safetensors"]),
    "model without tokenizer": ("train", {"model.path": "no_tokenizer"}, ["no_tokenizer", "tokenizer.json"]),
    "module that is not there": ("train", {"tuning.targets": "[q_prj]"}, ["tuning.targets", "q_prj", "q_proj"]),
    "packing that is not proven": ("train", {"model.path": "unproven", "packing": "on"}, ["packing: on", "stablelm"]),
    "folder not writable": ("train", {"run_dir": "data.jsonl/run"}, ["run_dir: cannot write", "run_dir=..."]),
    "folder of another run": ("train", {"run_dir": "run"}, ["holds a run already", "remove the folder"]),
    "no validation data": ("train", {"eval_every": "1"}, ["eval_every", "dataset.validation_fraction"]),
    "no test data": ("run", {}, ["eval.split: test", "dataset.test_fraction=0.1"]),
    "class that is not there": ("train", {"objective._target_": "train.nope.Loss"}, ["train.nope.Loss"]),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_settings_data_and_models(case, home, capfd, monkeypatch):
    command, changes, held = CASES[case]
    words = [command, *(f"{key}={value}" for key, value in (SOUND | changes).items())]
    message = shown(words, home, capfd, monkeypatch)
    for text in held:
        assert text in message, message
    left = [path for path in (home / "runs").glob("*") if not (path / "logs").exists() and not any(path.iterdir())]
    assert not left, "a run that never began leaves no empty folder"


@pytest.mark.parametrize(
    ("words", "held"),
    [
        (["train"], ["model.path: not set", "crosstune train model.path=...", "dataset.path: not set"]),
        (["train", "experiment=licences"], ["did you mean experiment=licenses?"]),
        (["train", "--config-dir", "nowhere"], ["--config-dir: no folder 'nowhere'"]),
        (["train", "dataset.path=a,b", "model.path"], ["dataset.path=[a,b]", "model.path: not an override"]),
        (["run", "--resolved", "data.jsonl"], ["data.jsonl"]),
        (["resume", "nowhere"], ["nowhere: no such folder", "crosstune train"]),
        (["resume", "model"], ["model: not the folder of a run"]),
        (["export"], ["run_dir: not set", "crosstune export run_dir=..."]),
        (["export", "run_dir=model"], ["model: not the folder of a run"]),
        (["eval"], ["nothing to measure", "run_dir=RUN"]),
        (["report", "model"], ["neither an export", "RUN/export/merged"]),
    ],
)
def test_wrong_commands_and_folders(words, held, home, capfd, monkeypatch):
    message = shown(words, home, capfd, monkeypatch)
    for text in held:
        assert text in message, message


def test_many_faults_are_one_screen(home, capfd, monkeypatch):
    words = ["train", "model.path=x", "dataset.pth=y", "tuning=lorra", "max_steps=ten", "optim.lr=-1", "epochs=0"]
    message = shown(words, home, capfd, monkeypatch)
    for text in ("dataset.pth", "tuning=lora", "max_steps", "optim.lr", "epochs"):
        assert text in message


@pytest.fixture
def run_without_complete(home: Path, tmp_path: Path) -> Path:
    """A run that was cut off while it wrote its first checkpoint."""
    run = tmp_path / "cut"
    (run / "checkpoints/step-00000002").mkdir(parents=True)
    sound = {**SOUND, "model.path": str(home / "model"), "dataset.path": str(home / "data.jsonl")}
    save_resolved(compose("run", [f"{key}={value}" for key, value in sound.items()]), run / "resolved.yaml")
    RunFolder(run).write_record(
        RunRecord(str(home / "model"), {}, str(home / "cache"), "", "fp32", "PlainEngine", 1, "lora", "0", 2)
    )
    return run


@pytest.mark.parametrize("make", [lambda run: ["resume", str(run)], lambda run: ["export", f"run_dir={run}"]])
def test_a_run_without_a_complete_checkpoint(
    make: Callable[[Path], list[str]], run_without_complete, home, capfd, monkeypatch
):
    message = shown(make(run_without_complete), home, capfd, monkeypatch)
    assert "checkpoint" in message and str(run_without_complete) in message


def test_resume_refuses_what_would_change_the_run(run_without_complete, home, capfd, monkeypatch):
    message = shown(["resume", str(run_without_complete), "optim.lr=1"], home, capfd, monkeypatch)
    assert "optim.lr=1: would change what the run computes" in message and "start a new run" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device here")
def test_a_device_that_is_not_there(home, capfd, monkeypatch):
    words = ["train", *(f"{key}={value}" for key, value in (SOUND | {"device": "cuda"}).items())]
    assert "device=auto" in shown(words, home, capfd, monkeypatch)


def test_more_processes_than_devices(home, capfd, monkeypatch):
    monkeypatch.setattr("train.devices.cuda.CudaDevice.availability", lambda self: type("Yes", (), {"ok": True})())
    monkeypatch.setattr("train.devices.cuda.CudaDevice.count", lambda self: 1)
    words = ["train", *(f"{key}={value}" for key, value in (SOUND | {"device": "cuda", "nproc": "4"}).items())]
    assert "nproc: 4 processes, but 1 cuda devices are visible" in shown(words, home, capfd, monkeypatch)


def test_bf16_where_it_does_not_work(home, capfd, monkeypatch):
    monkeypatch.setattr("train.devices.cpu.CpuDevice.supports", lambda self, dtype: dtype == torch.float32)
    words = ["train", *(f"{key}={value}" for key, value in (SOUND | {"model.precision": "bf16"}).items())]
    message = shown(words, home, capfd, monkeypatch)
    assert "model.precision: bf16 does not work" in message and "model.precision=auto" in message


@pytest.mark.slow
def test_a_fault_in_a_worker_is_shown_once_by_the_real_command(home, tmp_path):
    settings = SOUND | {"nproc": "2", "tuning.targets": "[q_prj]", "run_dir": str(tmp_path / "run")}
    words = [sys.executable, "-P", "-m", "launchers.cli", "train", *(f"{k}={v}" for k, v in settings.items())]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("q_prj") == 1 and "Traceback" not in done.stderr and "torch.distributed" not in done.stderr
    assert len((done.stderr + done.stdout).splitlines()) <= SCREEN
