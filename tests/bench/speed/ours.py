"""crosstune itself, by its command; figures out of the run's own metrics.jsonl."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.bench.speed.data import CACHE, DataSet
from tests.bench.speed.machine import BUILD, LIMIT_SECONDS, Bench, Failed, Figures, Others

RANK, ALPHA, LR = 8, 16, 1e-4
COMMON = ["device=cpu", "schedule=constant", f"optim.lr={LR}", "checkpoint.every=0", f"cache_dir={CACHE}"]
LORA = ["tuning=lora", f"tuning.rank={RANK}", f"tuning.alpha={ALPHA}"]
TUNINGS = {"lora": LORA, "full": ["tuning=full"]}


def train(
    bench: Bench,
    model: Path,
    data: DataSet,
    tuning: str,
    steps: int,
    *words: str,
    threads: int | None = None,
    patch: str = "",
) -> Figures:
    """A run of `crosstune train`, with `patch`, a piece of Python, executed before the command.

    Raises:
        Failed: the command ended with another code than 0, or took too long.
    """
    run_dir = BUILD / "runs" / "speed"
    shutil.rmtree(run_dir, ignore_errors=True)
    asked = [f"model.path={model}", *data.words(), *COMMON, *TUNINGS[tuning], f"max_steps={steps}", *words]
    begin = (
        ["-c", f"{patch}\nimport sys, launchers.cli as it; sys.exit(it.main())"] if patch else ["-m", "launchers.cli"]
    )
    command = [sys.executable, "-P", *begin, "train", *asked, f"run_dir={run_dir}"]
    started_at, others = time.time(), Others()
    ends = _watched(command, bench.environment(threads or bench.threads, ours=True), run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if len(ends) != len(records):
        raise Failed(f"{len(records)} steps were taken, of which {len(ends)} were seen")
    first = records[0]["tokens"] / records[0]["tokens_per_second"]
    shutil.rmtree(run_dir)  # with its checkpoint
    return {
        "step_seconds": [first, *(after - before for before, after in pairwise(ends))],
        "step_tokens": [record["tokens"] for record in records],
        "losses": [record["loss"] for record in records],
        "peak_rss_gib": records[-1]["peak_gib"],
        "started_at": started_at,
        "first_step_at": ends[0],
        "others_cores": others.cores(),
    }


def _watched(command: list[str], environment: dict[str, str], run_dir: Path) -> list[float]:
    """Runs the command; the times when each step was in metrics.jsonl, seen to 20 ms.

    So all that happens between two steps counts, which the run's own tokens per second leave out.
    """
    log, metrics, ends = BUILD / "speed.log", run_dir / "metrics.jsonl", list[float]()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, cwd=BUILD, stdout=output, stderr=subprocess.STDOUT)
        until = time.monotonic() + LIMIT_SECONDS
        while process.poll() is None:
            _note_new_lines(metrics, ends)
            if time.monotonic() > until:
                process.kill()
                process.wait()
                raise Failed(f"took more than {LIMIT_SECONDS} s")
            time.sleep(0.02)
    _note_new_lines(metrics, ends)
    if process.returncode:
        lines: list[Any] = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise Failed(f"exit code {process.returncode}: {lines[-1]}")
    return ends


def _note_new_lines(metrics: Path, ends: list[float]) -> None:
    if metrics.is_file():
        lines = metrics.read_bytes().count(b"\n")
        ends += [time.time()] * (lines - len(ends))
