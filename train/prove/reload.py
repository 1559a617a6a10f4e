"""A checkpoint into an engine and out again, without a step in between: what of it an engine keeps, and its memory."""

from __future__ import annotations

import json
import logging
import os
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import psutil

from configs.compose import build
from configs.schema.model import Precision
from configs.schema.outputs import SaveMode
from configs.schema.roots import TrainConfig
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.restore import restore_latest
from train.checkpoint.storage import resolve_storage
from train.devices.base import Device
from train.engine.base import init_world
from train.faults import told
from train.models.families import family_of
from train.models.load import load_config
from train.objectives.base import Objective
from train.run import make_engine, row_kind
from train.run_folder import RunFolder

logger = logging.getLogger(__name__)

MEMORY = "memory.json"
SAMPLE_SECONDS = 0.002


def load_and_save(cfg: TrainConfig, run: RunFolder, out: Path) -> None:
    """Loads the run's latest checkpoint and saves it at the same step; called in each worker process.

    Args:
        cfg: how it is loaded: sharding, device, precision; ranks are those of the processes.
        run: whose checkpoint.
        out: takes the new checkpoint, and beside it ``memory.json``: by rank, MiB that loading took beyond what the
            rank then holds, and MiB that it holds.

    Raises:
        CheckpointError: it does not load.
    """
    record = run.read_record()
    cfg = replace(cfg, model=replace(cfg.model, precision=Precision(record.precision)))
    model_dir, trusted = Path(record.model_dir), cfg.model.trust_remote_code
    device = build(cfg.device, Device)
    device.activate(int(os.environ.get("LOCAL_RANK", "0")))
    with closing(init_world(device)) as world, told(device, cfg, rank=world.rank, world_size=world.size):
        note = logger.info if world.rank == 0 else logger.debug
        family = family_of(load_config(model_dir, trust_remote_code=trusted), trust_remote_code=trusted)
        kind, objective = row_kind(cfg, family, note, world.size), build(cfg.objective, Objective)
        with closing(make_engine(cfg, model_dir, family, kind, device, world, note, objective)) as engine:
            storage = resolve_storage(cfg.checkpoint.storage, run.checkpoints, world, note)
            with HostMemory() as memory:
                state = restore_latest(engine, run.checkpoints, world, storage=storage, run_id=record.run_id, note=note)
            keep = replace(cfg.checkpoint, mode=SaveMode.synchronous)
            with closing(
                Checkpointer(engine, out, keep, world, storage=storage, run_id=record.run_id, note=note)
            ) as checkpointer:
                checkpointer.save(state, {})
                checkpointer.wait()
        figures = [json.loads(each) for each in world.all_gather_bytes(json.dumps(memory.figures()).encode())]
        if world.rank == 0:
            (out / MEMORY).write_text(json.dumps(figures), encoding="utf-8")


class HostMemory:
    """Samples this process's own memory, mapped files not counted: their pages go as soon as others need them."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._peak = self._last = 0

    def figures(self) -> dict[str, float]:
        """MiB held at the end, and MiB more than that at the peak."""
        return {"held_mib": self._last / 2**20, "extra_mib": max(0, self._peak - self._last) / 2**20}

    def __enter__(self) -> HostMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._last = self._now()

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss) - int(getattr(memory, "shared", 0))
