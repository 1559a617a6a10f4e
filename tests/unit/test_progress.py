"""What a run writes and shows while it goes: metrics.jsonl, environment.json, the display."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from configs.errors import StorageError
from configs.schema.device import DeviceConfig
from train.devices.cpu import CpuDevice
from train.observe.environment import code_version, write_environment
from train.observe.metrics import MetricsHook, read_metrics
from train.observe.progress import Progress, counter


def record(step: int, loss: float = 1.5) -> dict[str, object]:
    return {"step": step, "loss": loss, "tokens": 1000, "tokens_per_second": 100.0, "peak_gib": 2.5}


def write(path: Path, first: int, steps: range) -> None:
    hook = MetricsHook(path, keep_until=first)
    hook.on_start(first, 10)
    for step in steps:
        hook.on_step(record(step))
        # Flushed at once: a crash now would lose nothing.
        assert json.loads(path.read_text().splitlines()[-1])["step"] == step
    hook.on_end()


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # torn by a crash
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    write(path, 5, range(6, 11))
    assert [r["step"] for r in read_metrics(path)] == list(range(1, 11))
    assert all("loss" in r for r in read_metrics(path))


def test_no_file_and_an_unwritable_one(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []
    with pytest.raises(StorageError, match="metrics.jsonl: cannot be written"):
        MetricsHook(tmp_path / "no" / "metrics.jsonl", 0).on_start(0, 1)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(terminal: bool, steps: int = 4) -> str:
    text, clock = io.StringIO(), Clock()
    progress = Progress(Console(file=text, force_terminal=terminal, width=120), clock=clock)
    progress.on_start(0, steps)
    for step in range(1, steps + 1):
        clock.now += 2.0
        progress.on_step(record(step, loss=1 / step) | ({"validation_loss": 0.75} if step == 2 else {}))
    progress.on_checkpoint(Path("checkpoints/step-4"))
    progress.on_end()
    return text.getvalue()


def test_plain_lines_come_now_and_then_and_at_the_end() -> None:
    lines = shown(terminal=False).splitlines()
    assert lines == [
        "train: step 1/4  loss 1.0000  500 tok/s  2.5 GiB  ETA 0:06",
        "train: step 2  validation 0.7500",
        "train: step 4/4  loss 0.2500  validation 0.7500  500 tok/s  2.5 GiB  ETA 0:00",
        "train: checkpoint checkpoints/step-4",
    ]


def test_a_terminal_shows_the_same_figures_live() -> None:
    text = shown(terminal=True)
    assert "validation 0.7500" in text and "checkpoint checkpoints/step-4" in text and "\x1b[" in text


def test_time_left_is_that_of_the_steps_still_to_do_after_a_resume() -> None:
    text, clock = io.StringIO(), Clock()
    progress = Progress(Console(file=text, width=120), clock=clock)
    progress.on_start(3000, 10_000)
    clock.now = 1.5
    progress.on_step(record(3001))
    assert text.getvalue().splitlines() == [
        "train: going on after step 3000 of 10000",
        "train: step 3001/10000  loss 1.5000  667 tok/s  2.5 GiB  ETA 2:54:58",
    ]


def test_counter_says_when_all_is_done() -> None:
    text = io.StringIO()
    with counter("eval base", 20, Console(file=text)) as show:
        show(10, 20)
        show(20, 20)
    assert text.getvalue() == "eval base: 20/20  0 s\n"


def test_environment_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
    monkeypatch.setenv("WORLD_SIZE", "4")
    path = tmp_path / "environment.json"
    write_environment(path, CpuDevice(DeviceConfig("train.devices.cpu.CpuDevice")))
    facts = json.loads(path.read_text())
    assert "secret" not in path.read_text()
    assert facts["variables"]["WORLD_SIZE"] == "4" and facts["device"]["name"] == "cpu"
    assert facts["packages"]["torch"] and facts["code"] == code_version() and facts["memory_gib"] > 0
