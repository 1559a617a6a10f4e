"""Processes of their own with the same threads for all; the machine's peak; FLOPs of a token."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "bench"
SCRIPTS = Path(__file__).parent / "contestants"
LIMIT_SECONDS = 900
CALM_CORES = 0.25
"""Other programs that take more of the cores disturb: two threads wait for the slower one."""

Figures = dict[str, Any]


class Failed(Exception):
    """A contestant did not end well; what it said last."""


@dataclass
class Bench:
    """What the options say, and what all parts share."""

    data: Path | None
    model: Path | None
    quick: bool
    threads: int
    rounds: int
    timed: int
    """Steps that are timed."""
    warmup: int
    """First steps, which are not."""
    report: Figures = field(default_factory=dict)

    def environment(self, threads: int, *, ours: bool) -> dict[str, str]:
        """The same for all, but that only crosstune's own processes find this checkout."""
        given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        count = str(threads)
        given |= {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "TOKENIZERS_PARALLELISM": "false"}
        given |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
        return given | ({"PYTHONPATH": str(ROOT)} if ours else {})


def script(bench: Bench, name: str, given: Figures, python: str = sys.executable) -> Figures:
    """Runs a contestant's script; its figures, with ``started_at`` and the ``seconds`` of all of it.

    Raises:
        Failed: it ended with another code than 0, or took too long.
    """
    path = BUILD / "spec.json"
    path.write_text(json.dumps({"threads": bench.threads} | given), encoding="utf-8")
    started_at = time.time()
    words, others = [python, str(SCRIPTS / f"{name}.py"), str(path)], Others()
    said = run(words, bench.environment(given.get("threads", bench.threads), ours=False))
    of_all = {"started_at": started_at, "seconds": time.time() - started_at, "others_cores": others.cores()}
    return dict(json.loads(said.strip().splitlines()[-1])) | of_all


def run(words: list[str], environment: dict[str, str], cwd: Path = BUILD) -> str:
    """Standard output of a command.

    Raises:
        Failed: it ended with another code than 0, or took too long.
    """
    try:
        done = subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise Failed(f"took more than {LIMIT_SECONDS} s") from None
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no output"]
        raise Failed(f"exit code {done.returncode}: {lines[-1]}")
    return done.stdout


class Others:
    """How many cores other programs kept busy meanwhile: time of the machine less that of our own children."""

    def __init__(self) -> None:
        self._started, self._machine, self._own = time.perf_counter(), _busy_seconds(), _children_seconds()

    def cores(self) -> float:
        """On average since this was made; the children must have ended."""
        theirs = (_busy_seconds() - self._machine) - (_children_seconds() - self._own)
        return round(max(0.0, theirs / (time.perf_counter() - self._started)), 2)


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _children_seconds() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def calm(runs: list[Figures]) -> list[Figures]:
    """The runs that other programs left alone, if there are any; else all of them."""
    return [each for each in runs if each["others_cores"] <= CALM_CORES] or runs


def disturbed(runs: list[Figures]) -> str:
    """What a line of a table says of runs of which none was left alone."""
    least = min(each["others_cores"] for each in runs)
    return f"  disturbed: others took {least} cores" if least > CALM_CORES else ""


def gemm_peak(bench: Bench) -> Figures:
    """GFLOP/s of `torch.mm` in fp32 and bf16, the best of the whole run so far; quick: measured once."""
    known: Figures = bench.report.setdefault("gemm_gflops", {})
    if known and bench.quick:
        return dict(known)
    found = script(bench, "gemm", {})
    for name in ("fp32", "bf16"):
        known[name] = round(max(known.get(name, 0.0), found[name]), 1)
    return dict(known)


@dataclass(frozen=True)
class Shape:
    """What a model asks for per token, counted as `train/observe/flops.py` does, which see."""

    body: int
    """Weights of matrix products but for the head."""
    head: int
    adapter: int
    width: int
    """Layers times heads times size of a head."""

    def flops(self, tuning: str, length: float, head_share: float = 1.0) -> float:
        """A token's FLOPs, forward and backward: 4 N for LoRA and 6 N for full, and attention over `length` tokens."""
        weights = self.body + head_share * self.head
        own = 4 * weights + 6 * self.adapter if tuning == "lora" else 6 * weights
        return own + 12.0 * self.width * length


def shape_of(model: Path, rank: int) -> Shape:
    """From the model's config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    linears = {name: m.weight.shape for name, m in built.named_modules() if isinstance(m, torch.nn.Linear)}
    head = linears.pop("lm_head").numel()
    adapter = sum(rank * sum(shape) for shape in linears.values())
    width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return Shape(sum(shape.numel() for shape in linears.values()), head, adapter, width)


def described() -> Figures:
    """The machine, in words that fit a table of results."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    name = re.search(r"model name\s*:\s*(.*)", text)
    known = [word for word in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{word}\b", text)]
    return {
        "processor": name.group(1) if name else platform.machine(),
        "instructions": known,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }
