"""One process of a check, under torchrun or alone: ``python -m tests.device.worker TASK JSON``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from configs.compose import build, compose
from launchers.environment import prepare_environment


def main() -> None:
    """Runs the task on this rank; rank 0 hands its results to the parent."""
    task, job = sys.argv[1], json.loads(sys.argv[2])
    overrides = [f"device={job['device']}", *job["overrides"]]
    cfg = compose("train", ["model.path=.", "dataset.path=.", *overrides])
    prepare_environment(cfg)  # before torch is imported
    from tests.device.training import Bench, references
    from train.devices.base import Device
    from train.engine.base import init_world

    device = build(cfg.device, Device)
    device.activate(int(os.environ.get("LOCAL_RANK", "0")))
    with closing(init_world(device)) as world:
        bench = Bench(device, world, Path(job["model"]), Path(job["prepared"]), Path(job["work"]), overrides)
        if task == "reference":
            Path(job["expected"]).write_text(json.dumps(references(bench, tuple(job["precisions"]))))
            return
        for result in _results(task, bench, job):
            if world.rank == 0:
                result.emit()


def _results(task: str, bench: Any, job: dict[str, Any]) -> Iterable[Any]:
    from tests.device.numerics import collectives, numerics
    from tests.device.training import matrix, speed

    if task == "speed":
        yield from speed(bench, job["fastest"], job["tokens"])
        return
    # Each rank has a device of its own to look at; what the first one shows is told, and a fault of any other too.
    for result in numerics(bench.device):
        bad = int(bench.world.all_reduce_sum([float(result.verdict == "FAILED")])[0])
        yield result if not bad else type(result)(result.name, "FAILED", f"{result.detail} (on {bad} ranks)")
    yield from collectives(bench.device, bench.world)
    yield from matrix(bench, json.loads(Path(job["expected"]).read_text()), tuple(job["engines"]))


if __name__ == "__main__":
    main()
