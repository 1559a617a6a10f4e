"""Two runs held against each other by their metrics.jsonl. Plain values, no tensors: those are in `tensors`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Records = Sequence[Mapping[str, Any]]
"""Lines of metrics.jsonl."""
OF_THE_MACHINE = ("tokens_per_second", "peak_gib")
"""Figures of a step that no two runs share."""
ABSENT = "(absent)"


@dataclass(frozen=True)
class Difference:
    """The first place at which two runs part."""

    where: str
    """``step 7``, or a parameter's name."""
    kind: str
    """Figure of the step, or kind of tensor: ``loss``, ``master``, ``exp_avg``."""
    expected: Any
    found: Any
    index: tuple[int, ...] | None = None
    """Of the value in its parameter."""

    def __str__(self) -> str:
        place = f"{self.where}, {self.kind}" + (f" {list(self.index)}" if self.index is not None else "")
        return f"{place}: {self.found!r} instead of {self.expected!r}"


@dataclass(frozen=True)
class Comparison:
    """One thing that was compared."""

    what: str
    same: bool
    """Equal bit by bit, or within the tolerance that `figure` names."""
    figure: str
    """How much was compared and how far apart it is."""
    first: Difference | None = None


def steps_in_order(found: Records, last: int) -> Comparison:
    """Whether each step from 1 to `last` is there once, in order."""
    steps = [int(record["step"]) for record in found]
    counts = Counter(steps)
    missing = [step for step in range(1, last + 1) if not counts[step]]
    twice = [step for step in counts if counts[step] > 1]
    same = steps == list(range(1, last + 1))
    figure = f"{len(steps)} lines for {last} steps; {_some('missing', missing)}, {_some('twice', twice)}"
    odd = next((step for step, each in enumerate(steps, 1) if step != each), min(len(steps), last) + 1)
    difference = Difference(f"line {odd}", "step", odd, steps[odd - 1] if odd <= len(steps) else ABSENT)
    return Comparison("steps in metrics.jsonl", same, figure, None if same else difference)


def _some(what: str, steps: Sequence[int]) -> str:
    return f"{what}: {', '.join(map(str, steps[:5]))}{', ...' if len(steps) > 5 else ''}" if steps else f"none {what}"


def equal_figures(expected: Records, found: Records) -> Iterator[Comparison]:
    """Every figure of every step, bit by bit; those of the machine's speed are left out."""
    keys = dict.fromkeys(key for record in (*expected, *found) for key in record)
    for key in keys:
        if key != "step" and key not in OF_THE_MACHINE:
            yield equal_figure(key, expected, found)


def equal_figure(key: str, expected: Records, found: Records) -> Comparison:
    """One figure over all steps that `expected` has."""
    by_step = {int(record["step"]): record for record in found}
    pairs = [
        (int(record["step"]), record.get(key, ABSENT), by_step.get(int(record["step"]), {}).get(key, ABSENT))
        for record in expected
    ]
    differing = [Difference(f"step {step}", key, ours, theirs) for step, ours, theirs in pairs if ours != theirs]
    figure = f"{len(pairs) - len(differing)} of {len(pairs)} steps equal"
    return Comparison(f"{key} of each step", not differing, figure, differing[0] if differing else None)


def close_figure(key: str, expected: Records, found: Records, tolerance: float) -> Comparison:
    """One figure over all steps that `expected` has, to a tolerance relative to its size, at least to 1."""
    by_step = {int(record["step"]): record for record in found}
    worst, first = 0.0, None
    for record in expected:
        ours, theirs = record.get(key), by_step.get(int(record["step"]), {}).get(key)
        if ours is None or theirs is None:  # of a step that was skipped
            error = 0.0 if ours is theirs else math.inf
        else:
            error = abs(theirs - ours) / max(1.0, abs(ours))
        worst = max(worst, error)
        if not error <= tolerance and first is None:
            first = Difference(f"step {record['step']}", key, ours, ABSENT if theirs is None else theirs)
    steps = f"{len(expected)} step{'s' if len(expected) > 1 else ''}"
    figure = f"{steps}, apart by {worst:.1e} at most; allowed {tolerance:.0e}"
    return Comparison(f"{key} of each step", first is None, figure, first)
