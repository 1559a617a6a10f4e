"""Part 4: how long until the first optimizer step is done, everything warm; and until the help is there."""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict

from tests.bench.speed import data, ours, rivals
from tests.bench.speed.machine import ROOT, Bench, Failed, run, script
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
    waits: dict[str, list[float]] = defaultdict(list)
    first: dict[str, list[float]] = defaultdict(list)
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
            waits[name].append(figures["first_step_at"] - figures["started_at"])
            first[name].append(figures["step_seconds"][0])
    table = {
        name: {
            "seconds_to_first_step": round(statistics.median(each), 2),
            "of_which_the_step": round(statistics.median(first[name]), 2),
        }
        for name, each in waits.items()
    }
    helps = [_help_seconds(bench) for _ in range(5)]
    bench.report["4"] = {"to_first_step": table, "help_seconds": round(statistics.median(helps), 3)}
    for name, each in table.items():
        print(f"  {name}: {each['seconds_to_first_step']} s, of which the step {each['of_which_the_step']} s")
    print(f"  crosstune --help: {bench.report['4']['help_seconds']} s", flush=True)


def _help_seconds(bench: Bench) -> float:
    started = time.perf_counter()
    run([sys.executable, "-P", "-m", "launchers.cli", "--help"], bench.environment(bench.threads, ours=True), cwd=ROOT)
    return time.perf_counter() - started
