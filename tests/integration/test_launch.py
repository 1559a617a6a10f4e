"""A job on this machine by the real command: it is killed and goes on, is asked after, cancelled and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from tests.command import crosstune, final_weights, metrics_of, write_uneven_records
from tests.tiny import save_tiny_model
from train.run_folder import RunFolder

STEPS = 160


def words(folder: Path) -> list[str]:
    """Of a run whose every step counts in the end."""
    return [
        *(f"model.path={folder / 'model'}", f"dataset.path={folder / 'records.jsonl'}"),
        *(f"cache_dir={folder / 'cache'}", "device=cpu", "model.precision=fp32", "optim.lr=5e-3"),
        *("max_length=320", "batch_tokens=400", "micro_batch_tokens=400", f"max_steps={STEPS}"),
        *("checkpoint.every=2", "checkpoint.mode=synchronous"),
    ]


def wait_for(met: Callable[[], bool], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def state(run: Path, code: int = 0) -> dict:
    return json.loads(crosstune("status", "--json", str(run), code=code).splitlines()[-1])


def steps_of(run: Path) -> int:
    return len(RunFolder(run).metrics.read_text().splitlines()) if RunFolder(run).metrics.is_file() else 0


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    save_tiny_model(folder / "model")
    write_uneven_records(folder / "records.jsonl")
    crosstune("train", *words(folder), f"run_dir={folder / 'undisturbed'}")
    return folder


def test_a_job_outlives_a_killed_rank_and_a_cancel(home):
    run = home / "launched run"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, "-P", "-m", "launchers.cli", "launch", "train", *words(home), f"run_dir={run}"]
    process = subprocess.Popen(
        [*command, "environment.GREETING='a $(b)'"], env=environment, stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: steps_of(run) >= 5)
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "--resolved" in p.cmdline()]
    assert {rank.environ()["GREETING"] for rank in ranks} == {"a $(b)"}
    max(ranks, key=lambda p: int(p.environ().get("RANK", -1))).send_signal(signal.SIGKILL)
    wait_for(lambda: (run / "launch" / "attempts" / "001" / "node-0.json").is_file())
    assert "the job has not ended" in crosstune("resume", str(run), code=2)
    wait_for(lambda: steps_of(run) >= 12)
    crosstune("cancel", str(run))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "attempt 0 ended with exit code 3: starting again from step" in out, out
    found = state(run)
    assert found["state"] == "cancelled" and found["attempt"] == 1 and 12 <= found["step"] < STEPS
    assert "goes on" not in crosstune("logs", str(run))  # of the last attempt alone

    crosstune("resume", str(run))
    assert state(run)["state"] == "succeeded"
    assert [line["step"] for line in metrics_of(run)] == list(range(1, STEPS + 1))
    expected, ended = final_weights(home / "undisturbed"), final_weights(run)
    assert all(torch.equal(ended[name], weight) for name, weight in expected.items())
