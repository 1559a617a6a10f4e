"""Part 4: how long until the first optimizer step is done, everything warm; and until the help is there."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict

from tests.bench.speed import data, ours, rivals
from tests.bench.speed.machine import ROOT, Bench, Failed, Figures, calm, disturbed, run, script
from tests.bench.speed.rivals import Contestant
from tests.bench.speed.training import spec_of

STARTERS = (
    Contestant("transformers+peft", "hf_loop"),
    Contestant("TRL", "trl_sft"),
)


def part_4(bench: Bench) -> None:
    """Medians over rounds; the first step itself is in them, and is given besides."""
    model, found = data.model_of(bench), data.data_set(bench, "short")
    steps, python = found.steps(1), rivals.trl_python()
    if not bench.quick:
        ours.train(bench, model, found, "lora", 1)  # so that all is in the caches
    runs: dict[str, list[Figures]] = defaultdict(list)
    for _ in range(bench.rounds):
        given = {"crosstune": ours.train(bench, model, found, "lora", 1)}
        if not bench.quick:
            given["crosstune, check_packing=false"] = ours.train(bench, model, found, "lora", 1, "check_packing=false")
        for contestant in STARTERS[:1] if bench.quick else STARTERS:
            interpreter = {"python": python} if contestant.script == "trl_sft" and python else {}
            if contestant.script == "trl_sft" and not python:
                continue
            try:
                spec = spec_of(bench, contestant, "lora", model, found.batch_tokens, steps)
                given[contestant.name] = script(bench, contestant.script, spec, **interpreter)
            except Failed as fault:
                print(f"  {contestant.name}: {fault}", flush=True)
        for name, figures in given.items():
            runs[name].append(figures)
    table = {
        name: {
            "seconds_to_first_step": round(
                statistics.median(one["first_step_at"] - one["started_at"] for one in calm(each)), 2
            ),
            "of_which_the_step": round(statistics.median(one["step_seconds"][0] for one in calm(each)), 2),
            "others_cores": [one["others_cores"] for one in each],
        }
        for name, each in runs.items()
    }
    helps = [_help_seconds(bench) for _ in range(5)]
    bench.report["4"] = {"to_first_step": table, "help_seconds": round(statistics.median(helps), 3)}
    for name, each in table.items():
        took = f"{each['seconds_to_first_step']} s, of which the step {each['of_which_the_step']} s"
        print(f"  {name}: {took}{disturbed(runs[name])}", flush=True)
    print(f"  crosstune --help: {bench.report['4']['help_seconds']} s", flush=True)


def _help_seconds(bench: Bench) -> float:
    started = time.perf_counter()
    run([sys.executable, "-P", "-m", "launchers.cli", "--help"], bench.environment(bench.threads, ours=True), cwd=ROOT)
    return time.perf_counter() - started
