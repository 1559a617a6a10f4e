"""Part 6: what each technique brings: the default against a run with that one technique off, alternating.

A new technique is a line in `ENTRIES`: keys of the config, or, where it has none, a piece of Python that takes it out.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import dataclass

from tests.bench.speed import data, ours
from tests.bench.speed.machine import Bench, Failed, Figures, calm, disturbed
from tests.bench.speed.training import window


@dataclass(frozen=True)
class Entry:
    """The default, but for some keys, and for what `patch` takes out."""

    name: str
    overrides: tuple[str, ...] = ()
    patch: str = ""
    tuning: str = "lora"
    data: str = "short"
    in_quick: bool = False


def _swap(where: str, name: str, value: str) -> str:
    return f"from tests.bench.speed.swap import swap; swap({where!r}, {name!r}, {value})"


WHOLE_LOGITS = _swap("train.objectives.causal_lm:LossHead", "of", "lambda *_, **__: (None, 'it is taken out')")
MALLOC = _swap("train.devices.cpu", "MALLOC", "()")
CPU = "train.devices.cpu:CpuDevice"
PLAIN = ("rms_norm", "rotary", "swiglu")
ENTRIES = (
    Entry("packing off", ("packing=off",), in_quick=True),
    Entry("fp32 in place of bf16", ("model.precision=fp32",)),
    Entry("activation checkpointing on", ("activation_checkpointing=true",)),
    Entry("logits of all supervised tokens at once", patch=WHOLE_LOGITS, in_quick=True),
    Entry("adapters beside their layers", patch=_swap("train.run", "fuse_adapters", "lambda module, on_host: None")),
    Entry("attention by SDPA in any length", ("device.attention_kernel=reference",)),
    Entry("norms, rotary, SwiGLU by plain operators", tuple(f"device.{op}_kernel=reference" for op in PLAIN)),
    Entry("rows of any length", patch=_swap(CPU, "row_step", "lambda self, dtype: 1")),
    Entry("malloc as it comes", patch=MALLOC),
    Entry("optimizer not fused", patch=_swap(CPU, "fused_optimizer", "False")),
    Entry("no watch over hangs", ("guard.hang_timeout_seconds=0",)),
    Entry("full: packing off", ("packing=off",), tuning="full"),
    Entry("full: logits at once", patch=WHOLE_LOGITS, tuning="full"),
    Entry("full: malloc as it comes", patch=MALLOC, tuning="full"),
    Entry("full: optimizer not fused", patch=_swap(CPU, "fused_optimizer", "False"), tuning="full"),
    Entry("full: activation checkpointing on", ("activation_checkpointing=true",), tuning="full"),
    Entry("long prompts: packing off", ("packing=off",), data="prompts"),
)


def part_6(bench: Bench) -> None:
    """A row an entry: its speed and memory over the default's of the same rounds."""
    model, steps = data.model_of(bench), bench.warmup + bench.timed
    rows = bench.report.setdefault("6", [])
    chosen = [entry for entry in ENTRIES if entry.in_quick or not bench.quick]
    for kind in dict.fromkeys((entry.tuning, entry.data) for entry in chosen):
        tuning, found = kind[0], data.data_set(bench, kind[1])
        entries = [entry for entry in chosen if (entry.tuning, entry.data) == kind]
        about = data.facts(found.steps(steps)[bench.warmup :])
        runs: dict[str, list[Figures]] = defaultdict(list)
        for _ in range(bench.rounds):
            for entry in _with_default(entries):
                try:
                    figures = ours.train(bench, model, found, tuning, steps, *entry.overrides, patch=entry.patch)
                    runs[entry.name].append(window(figures, bench.warmup, about))
                except Failed as fault:
                    print(f"  {entry.name}: {fault}", flush=True)
        if runs["default"]:
            rows += [_row(entry, runs[entry.name], runs["default"]) for entry in entries if runs[entry.name]]


def _with_default(entries: list[Entry]) -> list[Entry]:
    """The default after every second one, too: a machine's speed drifts by some per cent in minutes."""
    order = [Entry("default")]
    for number, entry in enumerate(entries, 1):
        order += [entry, Entry("default")] if number % 2 == 0 or number == len(entries) else [entry]
    return order


def _row(entry: Entry, its: list[Figures], default: list[Figures]) -> Figures:
    speed, usual = (statistics.median(one["tokens_per_second"] for one in calm(each)) for each in (its, default))
    memory, before = (max(one["peak_rss_gib"] for one in each) for each in (its, default))
    row = {
        "name": entry.name,
        "overrides": list(entry.overrides),
        "patch": entry.patch,
        "tuning": entry.tuning,
        "data": entry.data,
        "tokens_per_second": round(speed, 1),
        "default_tokens_per_second": round(usual, 1),
        "speed_of_default": round(speed / usual, 2),
        "memory_of_default": round(memory / before, 2),
        "others_cores": [one["others_cores"] for one in its + default],
    }
    print(
        f"  {entry.name}: {row['speed_of_default']:.2f} of the default's speed, "
        f"{row['memory_of_default']:.2f} of its memory ({memory:.2f} GiB){disturbed(its) or disturbed(default)}",
        flush=True,
    )
    return row
