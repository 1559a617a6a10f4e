"""The real command on a device: the whole road with its export check, and a run that is killed and resumed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.device.board import FAILED, SKIPPED, Result, verdict

STEPS = 40
"""Enough to be killed among."""


def write_records(path: Path, count: int = 60) -> Path:
    """Prompt/completion records of a few words."""
    draw = random.Random(0)
    words = "apache mit bsd gpl quick brown fox lazy dog licence which over jumps".split()
    lines = [
        {
            "prompt": " ".join(draw.choices(words, k=12)),
            "completion": " ".join(draw.choices(words, k=draw.randint(1, 9))),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def commands(work: Path, model: Path, overrides: list[str], nproc: int, sharding: str) -> Iterator[Result]:
    """Runs them in `work`.

    Args:
        work: a folder of their own.
        model: folder of a tiny model with its tokenizer.
        overrides: the device, as it was given.
        nproc: processes.
        sharding: option of that group.
    """
    data = write_records(work / "records.jsonl")
    words = [f"model.path={model}", f"dataset.path={data}", "dataset.test_fraction=0.1", "dataset.license=CC0-1.0"]
    words += [f"cache_dir={work / 'cache'}", f"nproc={nproc}", f"sharding={sharding}", *overrides, "optim.lr=1e-3"]
    words += [
        f"max_steps={STEPS}",
        "checkpoint.every=2",
        "batch_tokens=256",
        "micro_batch_tokens=256",
        "max_length=256",
    ]
    done = _crosstune("run", *words, f"run_dir={work / 'whole'}", "eval.base=false")
    if done.returncode != 0:
        yield Result("crosstune run", FAILED, _last_lines(done.stderr))
        return
    yield _export(work / "whole")
    yield _killed(work, words)


def _crosstune(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(_command(*words), capture_output=True, text=True, env=_environment())


def _command(*words: str) -> list[str]:
    return [sys.executable, "-P", "-m", "launchers.cli", *words]


def _environment() -> dict[str, str]:
    root = str(Path(__file__).parents[2])
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*paths, root])}


def _export(run: Path) -> Result:
    summary = json.loads((run / "summary.json").read_text())
    check = summary["export_check"]
    same, of, difference = check["identical"], check["compared"], check["max_logit_difference"]
    detail = f"{same} of {of} answers of the merged export are the trained model's, logits differ by {difference:.1e}"
    return Result("crosstune run, export and eval", verdict(same == of > 0), detail, {"logit_difference": difference})


def _killed(work: Path, words: list[str]) -> Result:
    name, run = "kill -9 and crosstune resume", work / "killed"
    process = subprocess.Popen(
        _command("train", *words, f"run_dir={run}"),
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and len(_losses(run)) < 5:
        time.sleep(0.02)
    # torchrun leads a session of its own: it ends its workers when its parent's run is resumed or they lose it.
    for pid in [process.pid, *_descendants(process.pid)]:
        _kill(pid)
    process.wait()
    at = len(_losses(run))
    if process.returncode == 0:
        return Result(name, SKIPPED, "the run was over before it could be killed")
    done = _crosstune("resume", str(run))
    if done.returncode != 0:
        return Result(name, FAILED, _last_lines(done.stderr))
    found, expected = _losses(run), _losses(work / "whole")
    if found == expected:
        return Result(name, verdict(True), f"killed at step {at}; all {len(found)} losses are those of a run in one go")
    error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=False))
    detail = f"killed at step {at}; losses off by {error:.1e}: a kernel of this device is not deterministic"
    return Result(name, verdict(len(found) == len(expected) and error < 1e-3), detail)


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _losses(run: Path) -> list[float]:
    from train.observe.metrics import read_metrics

    return [line["loss"] for line in read_metrics(run / "metrics.jsonl")]


def _last_lines(text: str) -> str:
    return " | ".join(text.strip().splitlines()[-3:])
