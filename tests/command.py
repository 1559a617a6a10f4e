"""Runs the console command in a process of its own, as a user does."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from train.checkpoint.layout import CheckpointReader
from train.checkpoint.retention import latest
from train.run_folder import RunFolder


def crosstune(
    *words: str,
    code: int = 0,
    cwd: Path | None = None,
    prefix: Sequence[str] = (),
    launcher: Sequence[str] = (),
    timeout: float = 500,
    **env: str,
) -> str:
    """Output of ``crosstune words...``, both streams; fails the test on another exit code than `code`.

    `prefix` comes before Python, `launcher` (an outer torchrun) after it.
    """
    command = [*prefix, sys.executable, "-P", *launcher, "-m", "launchers.cli", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | env
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == code, f"exit code {done.returncode}, not {code}:\n{done.stdout}"
    return done.stdout


def without_network() -> list[str]:
    """Words that start a command in a network namespace with nothing but the loopback interface.

    Skips the test where that is not possible; in CI it must be.
    """
    cut = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    possible = shutil.which("unshare") and subprocess.run([*cut, "true"], capture_output=True).returncode == 0
    if not possible:
        assert "CI" not in os.environ, "CI must be able to cut the network: root, unshare and ip are needed"
        pytest.skip("cutting the network needs root, unshare and ip")
    return cut


def write_uneven_records(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Prompt/completion records whose answers are from 1 to 80 characters long."""
    rng = random.Random(seed)
    words = "apache mit bsd gpl quick brown fox lazy dog licence which over jumps".split()

    def text(low: int, high: int) -> str:
        length = int(low * (high / low) ** rng.random())
        return " ".join(rng.choices(words, k=length))[:length].strip() or "x"

    lines = [{"prompt": text(3, 120), "completion": text(1, 80)} for _ in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """fp32 masters of the run's last checkpoint, by name."""
    reader = CheckpointReader(latest(RunFolder(run_dir).checkpoints))
    return {name: reader.read(name) for name in reader.params}


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """Lines of metrics.jsonl."""
    return [json.loads(line) for line in RunFolder(run_dir).metrics.read_text().splitlines()]
