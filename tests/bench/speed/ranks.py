"""Part 3: two ranks of one thread each against one rank of one thread."""

from __future__ import annotations

import statistics
from collections import defaultdict

from tests.bench.speed import data, ours
from tests.bench.speed.machine import Bench, Failed, Figures, calm, disturbed
from tests.bench.speed.training import window

CASES = {
    "1 rank": [],
    "1 rank, ZeRO-2": ["sharding=zero2"],
    "2 ranks": ["nproc=2"],
    "2 ranks, ZeRO-2": ["nproc=2", "sharding=zero2"],
}
BASE = "1 rank"


def part_3(bench: Bench) -> None:
    """Speed of two ranks over twice that of one, which is 1 where nothing is lost."""
    for tuning in ("lora",) if bench.quick else ("lora", "full"):
        bench.report.setdefault("3", []).append(scaling(bench, tuning))


def scaling(bench: Bench, tuning: str) -> Figures:
    """Rounds of all cases of one way of tuning."""
    model, found = data.model_of(bench), data.data_set(bench, "short")
    about = data.facts(found.steps(bench.warmup + bench.timed)[bench.warmup :])
    cases = {name: words for name, words in CASES.items() if not bench.quick or name in (BASE, "2 ranks, ZeRO-2")}
    runs: dict[str, list[Figures]] = defaultdict(list)
    for _ in range(bench.rounds):
        for name, words in cases.items():
            try:
                figures = ours.train(bench, model, found, tuning, bench.warmup + bench.timed, *words, threads=1)
                runs[name].append(window(figures, bench.warmup, about))
            except Failed as fault:
                print(f"  {tuning}, {name}: {fault}", flush=True)
    table: Figures = {}
    for name, each in runs.items():
        speed = statistics.median(one["tokens_per_second"] for one in calm(each))
        peak = max(one["peak_rss_gib"] for one in each)
        table[name] = {"tokens_per_second": round(speed, 1), "peak_rss_gib_of_rank_0": round(peak, 2)}
        table[name]["others_cores"] = [one["others_cores"] for one in each]
    for name, figures in table.items():
        if name.startswith("2") and BASE in table:
            figures["efficiency"] = round(figures["tokens_per_second"] / (2 * table[BASE]["tokens_per_second"]), 3)
        shown = f", efficiency {figures['efficiency']:.0%}" if "efficiency" in figures else ""
        shown += disturbed(runs[name])
        gib = figures["peak_rss_gib_of_rank_0"]
        print(f"  {tuning}, {name}: {figures['tokens_per_second']:.0f} tokens/s, {gib} GiB{shown}", flush=True)
    return {"tuning": tuning, "steps": about, "cases": table}
