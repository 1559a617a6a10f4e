"""What a checkpoint costs the steps: full fine-tuning of SmolLM2-135M, saves behind the steps beside saves waited for.

python -m tests.bench.checkpoint [folder of the model]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from configs.compose import build, compose
from configs.schema.outputs import CheckpointConfig, SaveMode, Storage
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import TrainerState
from train.devices.base import Device
from train.engine.base import Engine, World
from train.models.load import ensure_model, load_model

ROUNDS = 3
"""Saves of each kind. The first copy, for which memory is made, is told apart."""
STEPS = 2
"""Steps between the saves, with nothing else going on."""
SHAPE = (2, 64)
"""Samples and tokens of a step."""


def main(model: str | None = None) -> None:
    """Prints the stall of a save and the time of a step, both as ratios."""
    chosen = f"model.path={model}" if model else "model=smollm2_135m"
    cfg = compose("train", [chosen, "dataset.path=.", "device=cpu", "optim=adamw", "optim.lr=1e-6"])
    device, world = build(cfg.device, Device), World()
    device.activate(0)
    folder = ensure_model(cfg.model, Path(cfg.cache_dir))
    module = load_model(folder, dtype=torch.float32, attention="sdpa")
    made = build(cfg.sharding, Engine, module, optim=cfg.optim, device=device, world=world, working_dtype=torch.float32)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as scratch, closing(made) as engine:
        ids = torch.randint(0, 1000, SHAPE, generator=torch.Generator().manual_seed(0))

        def step() -> None:
            engine.backward(engine.forward(input_ids=ids, labels=ids, use_cache=False).loss, last=True)
            engine.step(1e-6)

        _report(_measured(engine, step, Path(scratch)))


def _measured(engine: Engine, step: Callable[[], None], folder: Path) -> dict[str, list[float]]:
    """Seconds of each thing, the two kinds of saves in turn, so that what else the machine does meets both."""
    found: dict[str, list[float]] = {"synchronous": [], "stall": [], "alone": [], "beside": [], "behind": []}
    savers = {
        mode: Checkpointer(
            engine,
            folder,
            CheckpointConfig(mode=mode, keep_last=1),
            engine.world,
            storage=Storage.shared,
            run_id="bench",
            note=print,
        )
        for mode in (SaveMode.synchronous, SaveMode.asynchronous)
    }
    behind = savers[SaveMode.asynchronous]
    step()
    for i in range(1, ROUNDS + 1):
        found["alone"] += [_seconds(step) for _ in range(STEPS)]
        state = TrainerState(2 * i, epoch=0, samples_seen=0, tokens_seen=0, seed=0)
        found["synchronous"].append(_seconds(savers[SaveMode.synchronous].save, state, {}))
        state.step += 1
        began = time.perf_counter()
        found["stall"].append(_seconds(behind.save, state, {}))
        while not behind.finished():
            found["beside"].append(_seconds(step))
        found["behind"].append(time.perf_counter() - began)
    return found


def _seconds(work: Callable[..., None], *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - began


def _report(found: dict[str, list[float]]) -> None:
    waited, stall = statistics.median(found["synchronous"]), statistics.median(found["stall"][1:])
    alone, beside = statistics.median(found["alone"]), statistics.median(found["beside"])
    print(
        f"checkpoint: a save that is waited for takes {waited:.2f} s; one behind the steps stalls them {stall:.2f} s "
        f"({found['stall'][0]:.2f} s the first time), ratio {stall / waited:.2f}, and is complete after "
        f"{statistics.median(found['behind']):.1f} s"
    )
    print(
        f"checkpoint: a step takes {alone:.2f} s, {beside:.2f} s while a checkpoint is written "
        f"({len(found['beside'])} steps), ratio {beside / alone:.2f}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
