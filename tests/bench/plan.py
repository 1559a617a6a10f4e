"""What planning costs: best-fit packing beside the first-fit it replaced, and whole epochs of a million samples."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from data_prep.packing import best_fit
from train.data.mix import Share
from train.data.plan import BatchPlan, RowKind, layout

SAMPLES = 1_000_000
FIRST_FIT_SAMPLES = 20_000
"""First-fit looks through all rows for each sample: a million would take hours."""


def main() -> None:
    """Prints fills and seconds."""
    rng = np.random.default_rng(0)
    shapes: dict[str, Callable[[int], np.ndarray]] = {
        "uniform": lambda capacity: rng.integers(1, capacity + 1, SAMPLES),
        "log-normal": lambda capacity: np.clip(rng.lognormal(6, 1, SAMPLES).astype(np.int64), 1, capacity),
        "instructions": lambda capacity: np.clip(rng.lognormal(5.06, 0.71, SAMPLES).astype(np.int64), 47, 750),
    }
    for name, draw in shapes.items():
        for capacity in (2048, 4096, 8192):
            _packing(name, draw(capacity), capacity)
    _plans(shapes["instructions"](2048).astype(np.int32))


def _packing(name: str, lengths: np.ndarray, capacity: int) -> None:
    seconds, rows = _timed(lambda: len(best_fit(lengths, capacity)))
    some = lengths[:FIRST_FIT_SAMPLES]
    best_seconds, best_rows = _timed(lambda: len(best_fit(some, capacity)))
    first_seconds, first_rows = _timed(lambda: _first_fit_rows(some, capacity))
    filled = some.sum() / capacity
    print(
        f"plan: {name} {capacity}: a million packed in {seconds:.2f} s, fill {lengths.sum() / capacity / rows:.2%}; "
        f"{FIRST_FIT_SAMPLES:,} in {best_seconds:.3f} s, {filled / best_rows:.2%} "
        f"(first-fit {first_seconds:.2f} s, {filled / first_rows:.2%})"
    )


def _plans(lengths: np.ndarray) -> None:
    half = SAMPLES // 2
    mix = [Share("a", 0.37, ((0, half),)), Share("b", 2.6, ((half, SAMPLES),))]
    for world_size in (1, 8, 200):
        batch_tokens = world_size * 4 * 8192
        plan = BatchPlan(lengths, seed=0, batch_tokens=batch_tokens)
        seconds, steps = _timed(lambda plan=plan: plan.steps_for(1))
        layouts, passes = _timed(
            lambda plan=plan, steps=steps, ranks=world_size: sum(
                len(_layout(plan.samples(step), lengths, ranks)[0]) for step in range(steps)
            )
        )
        print(
            f"plan: a million samples, {world_size} ranks of 4 x 8192: cut into {steps:,} steps in {seconds:.2f} s, "
            f"laid out in {layouts:.2f} s ({layouts / steps * 1e3:.1f} ms a step), {passes / steps:.2f} passes a step"
        )
    mixed = BatchPlan(lengths, seed=0, batch_tokens=4 * 8192, mix=mix)
    seconds, steps = _timed(lambda: mixed.steps_for(1))
    print(f"plan: a million samples of a mixture: an epoch cut into {steps:,} steps in {seconds:.2f} s")


def _layout(samples: np.ndarray, lengths: np.ndarray, world_size: int) -> list[list[tuple[tuple[int, ...], ...]]]:
    return layout(samples, lengths, world_size=world_size, micro_batch_tokens=8192, kind=RowKind.packed)


def _first_fit_rows(lengths: np.ndarray, capacity: int) -> int:
    """First-fit decreasing, a sample at a time."""
    room: list[int] = []
    for length in np.sort(lengths)[::-1].tolist():
        at = next((i for i, left in enumerate(room) if left >= length), None)
        if at is None:
            room.append(capacity)
            at = len(room) - 1
        room[at] -= length
    return len(room)


def _timed(work: Callable[[], int]) -> tuple[float, int]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


if __name__ == "__main__":
    main()
