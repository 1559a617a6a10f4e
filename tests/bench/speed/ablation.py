"""Part 6: what each technique brings: the default against a run with that one technique off, alternating.

A new technique is a line in `ENTRIES`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from tests.bench.speed import data, ours
from tests.bench.speed.machine import Bench, Failed, Figures, calm
from tests.bench.speed.training import window


@dataclass(frozen=True)
class Entry:
    """The default, but for some keys."""

    name: str
    overrides: tuple[str, ...]
    tuning: str = "lora"
    data: str = "short"
    in_quick: bool = False


ENTRIES = (
    Entry("packing off", ("packing=off",), in_quick=True),
    Entry("fp32 in place of bf16", ("model.precision=fp32",)),
    Entry("activation checkpointing on", ("activation_checkpointing=true",)),
    Entry("kernels: plain torch operators", tuple(f"device.{op}_kernel=reference" for op in ("rms_norm", "rotary"))),
    Entry("no watch over hangs", ("guard.hang_timeout_seconds=0",)),
    Entry("full: packing off", ("packing=off",), tuning="full"),
    Entry("full: activation checkpointing on", ("activation_checkpointing=true",), tuning="full"),
    Entry("long prompts: packing off", ("packing=off",), data="prompts"),
)


def part_6(bench: Bench) -> None:
    """A row an entry: its speed and memory over the default's of the same rounds."""
    model, steps = data.model_of(bench), bench.warmup + bench.timed
    rows = []
    chosen = [entry for entry in ENTRIES if entry.in_quick or not bench.quick]
    for kind in dict.fromkeys((entry.tuning, entry.data) for entry in chosen):
        tuning, found = kind[0], data.data_set(bench, kind[1])
        entries = [entry for entry in chosen if (entry.tuning, entry.data) == kind]
        about = data.facts(found.steps(steps)[bench.warmup :])
        runs: dict[str, list[Figures]] = defaultdict(list)
        for _ in range(bench.rounds):
            for name, words in [("default", ()), *((entry.name, entry.overrides) for entry in entries)]:
                try:
                    figures = ours.train(bench, model, found, tuning, steps, *words)
                    runs[name].append(window(figures, bench.warmup, about))
                except Failed as fault:
                    print(f"  {name}: {fault}", flush=True)
        rows += [_row(entry, runs) for entry in entries if runs[entry.name] and runs["default"]]
    bench.report["6"] = rows


def _row(entry: Entry, runs: dict[str, list[Figures]]) -> Figures:
    speed = {
        name: statistics.median(one["tokens_per_second"] for one in calm(each)) for name, each in runs.items() if each
    }
    memory = {name: max(one["peak_rss_gib"] for one in each) for name, each in runs.items()}
    row = {
        "name": entry.name,
        "overrides": list(entry.overrides),
        "tuning": entry.tuning,
        "data": entry.data,
        "tokens_per_second": round(speed[entry.name], 1),
        "default_tokens_per_second": round(speed["default"], 1),
        "speed_of_default": round(speed[entry.name] / speed["default"], 2),
        "memory_of_default": round(memory[entry.name] / memory["default"], 2),
    }
    print(
        f"  {entry.name}: {row['speed_of_default']:.2f} of the default's speed, "
        f"{row['memory_of_default']:.2f} of its memory ({memory[entry.name]:.2f} GiB)",
        flush=True,
    )
    return row
