"""Training on a device against training on the CPU: losses, a resumed engine, speed."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from configs.compose import build, compose
from configs.schema.outputs import Storage
from configs.schema.roots import TrainConfig
from tests.device.board import SKIPPED, Result, verdict
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import TrainerState
from train.checkpoint.restore import restore
from train.data.plan import BatchPlan
from train.data.prepared import PreparedData
from train.data.sampler import RowLayout, StepSampler
from train.devices.base import Device
from train.engine.base import Engine, World
from train.guard.heartbeat import Heartbeat
from train.guard.stop import StopRequests
from train.loop import Hook, Loop, Record
from train.models.families import family_of
from train.models.load import load_config
from train.objectives.base import Objective
from train.observe.flops import flops_per_token, mean_length, model_flops_utilisation
from train.run import make_engine, row_kind
from train.schedule import Schedule

ENGINES = ("plain", "zero1", "zero2", "zero3")
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""Of a loss of the device against the CPU's in the same format: other kernels round and sum otherwise."""
STEPS, SAVED = 6, 3
"""Steps of each run, and those before the checkpoint that is resumed from."""
logger = logging.getLogger(__name__)


class Losses(Hook):
    """Keeps every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def on_step(self, record: Record) -> None:
        self.records.append(record)

    @property
    def values(self) -> list[float]:
        return [record["loss"] for record in self.records]


@dataclass(frozen=True)
class Bench:
    """What every run of a check shares."""

    device: Device
    world: World
    model_dir: Path
    prepared: Path
    work: Path
    overrides: list[str]
    """Of the device group, as they were given."""

    def config(self, *words: str) -> TrainConfig:
        paths = [f"model.path={self.model_dir}", f"dataset.path={self.prepared}"]
        return compose("train", [*paths, *self.overrides, "optim.lr=1e-3", *words])

    def engine(self, cfg: TrainConfig) -> Engine:
        family = family_of(load_config(self.model_dir))
        kind = row_kind(cfg, family, logger.debug, self.world.size)
        return make_engine(
            cfg, self.model_dir, family, kind, self.device, self.world, logger.debug, build(cfg.objective, Objective)
        )

    def loop(self, cfg: TrainConfig, engine: Engine, steps: int) -> Loop:
        split = PreparedData.open(self.prepared).split("train")
        kind = row_kind(cfg, family_of(load_config(self.model_dir)), logger.debug, self.world.size)
        rows = RowLayout(self.world.rank, self.world.size, cfg.micro_batch_tokens, kind, self.device.torch_device)
        plan = BatchPlan(split.lengths, seed=cfg.seed, batch_tokens=cfg.batch_tokens)
        return Loop(
            engine=engine,
            objective=build(cfg.objective, Objective),
            sampler=StepSampler(split, plan, rows),
            schedule=build(cfg.schedule, Schedule, steps),
            device=self.device,
            world=self.world,
            peak_lr=cfg.optim.lr,
            total_steps=steps,
            checkpointer=self.checkpointer(cfg, engine),
            checkpoint_every=SAVED,
            validation=None,
            eval_every=0,
            stop=StopRequests(self.work, cfg.guard, time.time()),
            heartbeat=Heartbeat(),
            hooks=[Losses()],
        )

    def checkpointer(self, cfg: TrainConfig, engine: Engine) -> Checkpointer:
        keep = replace(cfg.checkpoint, keep_last=9)
        return Checkpointer(
            engine, self.work, keep, self.world, storage=Storage.shared, run_id="check", note=logger.debug
        )

    def losses(self, cfg: TrainConfig, resume_from: Path | None = None) -> list[float]:
        """Takes `STEPS` steps with a new engine; checkpoints of step `SAVED` and of the last stay in `work`."""
        with closing(self.engine(cfg)) as engine:
            loop = self.loop(cfg, engine, STEPS)
            loop.run(begin(cfg) if resume_from is None else restore(engine, resume_from, self.world))
        [hook] = loop.hooks
        assert isinstance(hook, Losses)
        return hook.values


def begin(cfg: TrainConfig) -> TrainerState:
    return TrainerState(step=0, epoch=0, samples_seen=0, tokens_seen=0, seed=cfg.seed)


def cases(tunings: tuple[str, ...], engines: tuple[str, ...], precisions: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for precision in precisions:
        for tuning in tunings:
            for engine in engines:
                yield tuning, engine, precision


def words_of(tuning: str, engine: str, precision: str) -> list[str]:
    small = ["batch_tokens=512", "micro_batch_tokens=256", "max_length=256"]
    return [f"tuning={tuning}", f"sharding={engine}", f"model.precision={precision}", *small]


def references(bench: Bench, precisions: tuple[str, ...]) -> dict[str, list[float]]:
    """Losses of the CPU, alone, by tuning and precision."""
    found = {}
    for tuning, engine, precision in cases(("lora", "full"), ("plain",), precisions):
        found[f"{tuning} {precision}"] = bench.losses(bench.config(*words_of(tuning, engine, precision)))
        shutil.rmtree(bench.work)
    return found


def matrix(bench: Bench, expected: dict[str, list[float]], engines: tuple[str, ...]) -> Iterator[Result]:
    """Every engine, both tunings, every precision with a reference: losses, then those of a resumed engine."""
    precisions = tuple(dict.fromkeys(key.split()[1] for key in expected))
    for tuning, engine, precision in cases(("lora", "full"), engines, precisions):
        name = f"{tuning} {engine} {precision}"
        if engine != "plain" and bench.device.deepspeed_accelerator is None:
            yield Result(name, SKIPPED, f"DeepSpeed has no class for {bench.device.name}")
            continue
        cfg = bench.config(*words_of(tuning, engine, precision))
        first = bench.losses(cfg)
        yield _compared(name, first, expected[f"{tuning} {precision}"], precision)
        again = bench.losses(cfg, resume_from=bench.work / f"step-{SAVED:08d}")
        yield _resumed(f"{name}, resumed", again, first[SAVED:], precision)
        bench.world.barrier()
        if bench.world.rank == 0:
            shutil.rmtree(bench.work)
        bench.world.barrier()


def _compared(name: str, found: list[float], expected: list[float], precision: str) -> Result:
    error = _largest(found, expected)
    ok = error <= TOLERANCE[precision] and found[-1] < found[0]
    detail = f"{len(found)} losses off by {error:.1e} of the CPU's, allowed {TOLERANCE[precision]:.0e}"
    return Result(name, verdict(ok), detail, {"error": error, "first_loss": found[0], "last_loss": found[-1]})


def _resumed(name: str, found: list[float], expected: list[float], precision: str) -> Result:
    if found == expected:
        return Result(name, verdict(True), "bit by bit", {"error": 0.0})
    error = _largest(found, expected)
    allowed = TOLERANCE[precision] / 10
    detail = f"off by {error:.1e}, allowed {allowed:.0e}: a kernel of this device is not deterministic"
    return Result(name, verdict(error <= allowed), detail, {"error": error})


def _largest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def speed(bench: Bench, precision: str, tokens: int) -> Iterator[Result]:
    """Tokens per second and model FLOP/s utilisation of both tunings, data parallel."""
    lengths = PreparedData.open(bench.prepared).split("train").lengths
    for tuning in ("lora", "full"):
        sizes = [f"batch_tokens={tokens * bench.world.size}", f"micro_batch_tokens={tokens}", f"max_length={tokens}"]
        cfg = bench.config(f"tuning={tuning}", f"model.precision={precision}", *sizes)
        with closing(bench.engine(cfg)) as engine:
            flops = flops_per_token(engine.module, length=mean_length(lengths.tolist()), supervised_share=0.5)
            loop, state = bench.loop(cfg, engine, STEPS), begin(cfg)
            records = [loop.take_step(state) for _ in range(STEPS)][2:]  # the first ones compile, tune and allocate
        rate = sum(r["tokens"] for r in records) / sum(r["tokens"] / r["tokens_per_second"] for r in records)
        peak = bench.device.peak_flops(torch.bfloat16 if precision == "bf16" else torch.float32)
        share = model_flops_utilisation(rate, flops, peak, bench.world.size)
        yield _speed(f"speed {tuning} {precision}", rate, share, records[-1]["peak_gib"])


def _speed(name: str, rate: float, share: float | None, peak_gib: float) -> Result:
    mfu = "MFU unknown: peak unknown, device.peak_tflops=... tells it" if share is None else f"MFU {share:.1%}"
    figures = {"tokens_per_second": rate, "mfu": share, "peak_gib": peak_gib}
    return Result(name, verdict(rate > 0), f"{rate:,.0f} tokens/s, {mfu}, {peak_gib:.2f} GiB", figures)
