"""Proves a machine in minutes: the installed crosstune against the CPU, without network or test framework.

    python tests/device/check.py device=cuda                      one line per check, a table, exit code 0 or 3
    python tests/device/check.py device=npu --json npu.json       for machines, too
    python tests/device/check.py device=cpu quick=true            the shortest one

Further words: nproc=N (all devices; on a CPU 2), size=tiny|small|1b (model of the speed figures; by the device's
memory), and any ``device.KEY=VALUE``. What it checks: availability; matrix products, generators and the ops of
train/ops against the host in fp64; every collective; LoRA and full tuning under plain and ZeRO-1/2/3 against the
CPU's losses, each resumed from its checkpoint; the real command with export and eval; a killed run; tokens/s and MFU.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[2])
if sys.path[0] != ROOT:
    sys.path[0] = ROOT  # not this folder: its modules are tests.device.*

from configs.compose import build, compose  # noqa: E402
from configs.errors import EXIT_DONE, EXIT_RUN_FAILED, ConfigError, CrosstuneError  # noqa: E402
from launchers.environment import prepare_environment  # noqa: E402
from tests.device.board import FAILED, OK, Result, received, table  # noqa: E402

SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4),
    "small": dict(hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8),
    "1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24, num_attention_heads=32),
}
"""Shapes of Llama with half as many key-value heads, by name."""
TOKENS = {"tiny": 512, "small": 4096, "1b": 8192}
"""Tokens of a pass in the speed figures, in samples of an eighth of them."""
BIG_BYTES = 40 * 2**30
"""Device memory from which the speed is measured on the billion-parameter model."""


@dataclass
class Job:
    """What was asked for."""

    device: str = "auto"
    quick: bool = False
    nproc: int = 0
    size: str = ""
    json: str = ""
    overrides: list[str] = field(default_factory=list)
    """Of the device group."""


def parse(words: list[str]) -> Job:
    """Reads the command line.

    Raises:
        ConfigError: an unknown word.
    """
    job, rest = Job(), iter(words)
    for word in rest:
        key, _, value = word.partition("=")
        if key == "--json":
            job.json = value or next(rest, "")
        elif key.startswith("device."):
            job.overrides.append(word)
        elif key == "nproc" and value.isdigit():
            job.nproc = int(value)
        elif key == "quick" and value in ("true", "false"):
            job.quick = value == "true"
        elif key == "size" and value in SIZES:
            job.size = value
        elif key == "device" and value:
            job.device = value
        else:
            allowed = f"device=NAME, quick=true, nproc=N, size={'|'.join(SIZES)}, device.KEY=VALUE, --json FILE"
            raise ConfigError(word, "not understood", allowed=allowed)
    return job


def main(words: list[str]) -> int:
    """Runs all checks; the exit code."""
    started = time.monotonic()
    results: list[Result] = []
    try:
        job = parse(words)
        cfg = compose("train", ["model.path=.", "dataset.path=.", f"device={job.device}", *job.overrides])
        prepare_environment(cfg)
        from train.devices.base import Device

        device = build(cfg.device, Device)
        with tempfile.TemporaryDirectory(prefix="crosstune-check-") as folder:
            for result in _checks(job, device, Path(folder)):
                print(result.line(), flush=True)
                results.append(result)
    except CrosstuneError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    ok = all(result.verdict != FAILED for result in results)
    seconds = time.monotonic() - started
    print(f"\n{table(results)}, in {seconds:.0f} s on {platform.node()}")
    if job.json:
        facts: dict[str, Any] = {"ok": ok, "seconds": seconds, "date": time.strftime("%Y-%m-%d"), "device": job.device}
        facts["results"] = [asdict(result) for result in results]
        Path(job.json).write_text(json.dumps(facts, indent=2) + "\n")
    return EXIT_DONE if ok else EXIT_RUN_FAILED


def _checks(job: Job, device: Any, folder: Path) -> Iterator[Result]:
    from configs.schema.model import Precision

    found = device.availability()
    if not found.ok:
        yield Result("available", FAILED, found.reason)
        return
    on_cpu = device.torch_type == "cpu"
    nproc = job.nproc or (2 if on_cpu else device.count())
    device.check(nproc, Precision.auto)
    versions = ", ".join(f"{name} {version}" for name, version in device.versions().items())
    yield Result("available", OK, "; ".join(text for text in (found.reason, versions, f"nproc={nproc}") if text))

    size = "tiny" if on_cpu or job.quick else "small"
    big = not on_cpu and not job.quick and (device.memory().total_bytes or 0) >= BIG_BYTES
    speed_size = job.size or ("1b" if big else size)
    fastest = "bf16" if "bfloat16" in str(device.fast_dtypes()[0]) else "fp32"
    common = {"device": device.name, "overrides": job.overrides, "expected": str(folder / "expected.json")}
    common |= {"precisions": list(dict.fromkeys(["fp32", fastest])), "fastest": fastest}
    common |= {"engines": ["plain", "zero3"] if job.quick else ["plain", "zero1", "zero2", "zero3"]}
    common |= _inputs(folder / "matrix", size, samples=64, length=96)
    reference = common | {"device": "cpu", "overrides": []}
    yield from _launch("reference", reference, 1, "losses of the CPU")
    yield from _launch("device", common, nproc, "numerics and training")
    tokens = TOKENS[speed_size]
    common |= _inputs(folder / "speed", speed_size, samples=nproc * 64, length=tokens // 8)
    yield from _launch("speed", common | {"tokens": tokens}, nproc, "speed")

    from tests.device.commands import commands
    from tests.tiny import save_tiny_model

    model = save_tiny_model(folder / "tiny")
    sharding = "zero3" if nproc > 1 and device.deepspeed_accelerator else "plain"
    (folder / "commands").mkdir()
    given = [f"device={device.name}", *job.overrides, "model.precision=fp32"]
    yield from commands(folder / "commands", model, given, nproc, sharding)


def _inputs(folder: Path, size: str, samples: int, length: int) -> dict[str, str]:
    """A random model and random samples up to `length` tokens long."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # this process computes nothing; each worker chooses anew
    from transformers.utils import logging

    from tests.tiny import samples_of, save_tiny_model, write_prepared

    logging.disable_progress_bar()
    shape = SIZES[size]
    heads = shape["num_attention_heads"]
    head_dim = shape["hidden_size"] // heads
    save_tiny_model(folder / "model", **shape, head_dim=head_dim, num_key_value_heads=heads // 2)
    lengths = [max(4, length - 7 * (i % 9)) for i in range(samples)]
    write_prepared(folder / "prepared", {"train": samples_of(lengths, vocab_size=250)})
    return {"model": str(folder / "model"), "prepared": str(folder / "prepared"), "work": str(folder / "work")}


def _launch(task: str, job: dict[str, Any], nproc: int, name: str) -> Iterator[Result]:
    """Runs workers and passes on their results as they come; a worker that fails is a failed check."""
    started = time.monotonic()
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"] if nproc > 1 else []
    command = [sys.executable, "-P", *launcher, "-m", "tests.device.worker", task, json.dumps(job)]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, ROOT])}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if result := received(line):
                yield result
        if process.wait() != 0:
            errors.seek(0)
            # torchrun says of a process that was killed by which signal, and of any other that it failed.
            told = [line.strip() for line in errors.read().splitlines() if "Error" in line or "Signal" in line]
            lines = [line for line in told if "ChildFailedError" not in line]
            yield Result(name, FAILED, " | ".join(lines[:3])[:500] or f"ended with code {process.returncode}")
        else:
            yield Result(name, OK, f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
