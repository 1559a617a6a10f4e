"""Assembly of a training run, in one worker process. Reads as the story of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import psutil

from configs.compose import build
from configs.errors import ConfigError, CrosstuneError, DataError
from configs.schema.roots import Packing, TrainConfig
from configs.schema.sharding import ZeroConfig
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.storage import resolve_storage
from train.data.images import ImageInputs
from train.data.plan import BatchPlan, RowKind
from train.data.prepared import PreparedData, PreparedSplit
from train.data.sampler import RowLayout, StepSampler, fill_step
from train.devices.base import Device
from train.engine.base import Engine, World, init_world
from train.engine.needs import needs_of
from train.faults import told
from train.guard.heartbeat import Heartbeat
from train.guard.limits import collective_seconds
from train.guard.stop import StopRequests
from train.guard.watch import HangWatch
from train.loop import Hook, Loop
from train.models.families import Family, family_of
from train.models.load import load_config, load_model, resolve_precision
from train.models.recompute import recompute_activations
from train.models.short_rows import always_compress
from train.objectives.base import Objective
from train.observe.metrics import MetricsHook
from train.observe.progress import Progress
from train.ops.lora_linear import fuse_adapters
from train.ops.packed_mixers import attention_for_packing, wrap_mixers
from train.ops.packing_check import check_packing
from train.ops.select import KernelSelection
from train.origin import BaseDigests, Origin, begin, go_on
from train.plan.kept import Foresight, PredictionKept
from train.run_folder import STARTED, RunFolder
from train.schedule import Schedule
from train.tuning.base import Tuning, count_parameters

logger = logging.getLogger(__name__)

Note = Callable[[str], None]


def train(
    cfg: TrainConfig,
    *,
    model_dir: Path,
    prepared: Path,
    run_dir: Path,
    resume: bool = False,
    last_words: Callable[[CrosstuneError], None] = lambda error: None,
) -> None:
    """Trains on prepared data; called in each worker process.

    Args:
        cfg: the whole config.
        model_dir: folder of the base model.
        prepared: folder of the prepared data.
        run_dir: folder of the run; must exist.
        resume: go on from the latest complete checkpoint.
        last_words: tells a fault before this process ends itself, which a rank that hangs cannot do by raising it.

    Raises:
        CrosstuneError: of the kind that says what the user can mend.
    """
    started = float(os.environ.get(STARTED) or psutil.Process().create_time())
    if resume:
        precision = RunFolder(run_dir).read_record().precision_from_here(cfg.model.precision)
        cfg = replace(cfg, model=replace(cfg.model, precision=precision))
    device = build(cfg.device, Device)
    device.activate(int(os.environ.get("LOCAL_RANK", "0")))
    patience = collective_seconds(cfg.guard.hang_timeout_seconds)
    with closing(init_world(device, patience)) as world, ExitStack() as stack:
        rank = {"rank": world.rank, "world_size": world.size}
        stack.enter_context(told(device, cfg, **rank))
        note: Note = logger.info if world.rank == 0 else logger.debug
        run, objective = RunFolder(run_dir), build(cfg.objective, Objective)
        data = PreparedData.open(prepared).require(objective.needs, f"objective {objective.name}")
        validation = validation_split(data, cfg)
        trusted = cfg.model.trust_remote_code
        model_config = load_config(model_dir, trust_remote_code=trusted)
        objective.check(model_config, note)
        family = family_of(model_config, trust_remote_code=trusted)
        kind = row_kind(cfg, family, note, world.size)
        images = ImageInputs.of(data, model_dir, model_config)
        sampler = make_sampler(cfg, data, kind, family, device, world, note, images)
        total_steps = cfg.max_steps or sampler.plan.steps_for(cfg.epochs)
        digests = BaseDigests(model_dir) if world.rank == 0 and not resume else None
        foresight = Foresight(model_dir, device, world, kind, sampler.split)
        asked, cfg = cfg, foresight.settle(cfg, note, images=images is not None)
        stack.enter_context(told(device, cfg, **rank))  # what helps depends on what was settled
        if world.rank == 0:
            foresight.foretell(cfg, run, images=images is not None)
        with closing(make_engine(cfg, model_dir, family, kind, device, world, note, objective)) as engine:
            if kind is RowKind.packed and cfg.check_packing:
                place, dtype = device.torch_device, engine.working_dtype
                check_packing(engine.forward, engine.module, family, device=place, dtype=dtype, world=world, note=note)
            storage = resolve_storage(cfg.checkpoint.storage, run.checkpoints, world, note)
            start = go_on if resume else begin
            origin = Origin(model_dir, prepared, total_steps, digests)
            state, run_id = start(asked, run, engine, storage, origin, note)
            heartbeat = Heartbeat()
            checkpointer = Checkpointer(
                engine,
                run.checkpoints,
                cfg.checkpoint,
                world,
                storage=storage,
                run_id=run_id,
                note=note,
                beat=heartbeat.beat,
            )
            stop = StopRequests(run_dir, cfg.guard, started, world=world, note=note, last_words=last_words)
            with closing(checkpointer), stop:
                Loop(
                    engine=engine,
                    objective=objective,
                    sampler=sampler,
                    schedule=build(cfg.schedule, Schedule, total_steps),
                    device=device,
                    world=world,
                    peak_lr=cfg.optim.lr,
                    total_steps=total_steps,
                    checkpointer=checkpointer,
                    checkpoint_every=cfg.checkpoint.every,
                    validation=validation,
                    eval_every=cfg.eval_every,
                    stop=stop,
                    guard=cfg.guard,
                    heartbeat=heartbeat,
                    hooks=hooks_of(cfg, run, device, world, heartbeat, last_words, first_step=state.step),
                ).run(state)


def make_sampler(
    cfg: TrainConfig,
    data: PreparedData,
    kind: RowKind,
    family: Family,
    device: Device,
    world: World,
    note: Note,
    images: ImageInputs | None = None,
) -> StepSampler:
    """The global steps over the training split, and this rank's share of each.

    Raises:
        DataError: the split is empty, or a sample of it fits no forward pass.
    """
    split = data.split("train")
    check_lengths("train", split, cfg, data.path)
    mix = data.mix()
    for share in mix:
        note(f"mixture: an epoch shows {share.name} {share.epochs:g} times")
    plan = BatchPlan(split.lengths, seed=cfg.seed, batch_tokens=cfg.batch_tokens, mix=mix)
    dtype = resolve_precision(cfg.model.precision, device, on_note=lambda text: None)
    # Mixers of some families take a row sample by sample, and would take what fills it up for one.
    step = fill_step(
        1 if family.packed_mixers else device.row_step(dtype),
        int(split.lengths.max()),
        batch_tokens=cfg.batch_tokens,
        world_size=world.size,
        micro_batch_tokens=cfg.micro_batch_tokens,
    )
    if family.turns_by_length is not None:  # what fills a row up may be no longer than what the samples may
        step = min(step, family.turns_by_length[1])
    rows = RowLayout(world.rank, world.size, cfg.micro_batch_tokens, kind, device.torch_device, images, step)
    return StepSampler(split, plan, rows)


def make_engine(
    cfg: TrainConfig,
    model_dir: Path,
    family: Family,
    kind: RowKind,
    device: Device,
    world: World,
    note: Note,
    objective: Objective,
) -> Engine:
    """Model, tuning method and engine; the objective says what it trains of the model, and hooks itself in.

    Raises:
        DeviceError: the precision does not work on the device, or a kernel that was asked for by name does not.
        ModelError: the folder does not open.
        ConfigError: the tuning method or the objective does not fit the model.
    """
    dtype = resolve_precision(cfg.model.precision, device, on_note=note)
    packed = kind is RowKind.packed
    kernels = KernelSelection(device, family, dtype, packed=packed)
    device.seed(cfg.seed)
    attention = attention_for_packing(family) if packed else "sdpa"
    model = load_model(model_dir, dtype=dtype, attention=attention, trust_remote_code=cfg.model.trust_remote_code)
    if (own := model.config._attn_implementation) != attention:
        note(f"attention: {own}, the only one that {type(model).__name__} knows")
    if packed and (wrapped := wrap_mixers(model, family)):
        note(f"packing: {wrapped} layers of {', '.join(family.packed_mixers or ())} take a row sample by sample")
    always_compress(model)
    tuning = build(cfg.tuning, Tuning)
    module = tuning.apply(model, family, note)
    on_host = device.torch_type == "cpu"
    objective.choose(module, note, on_host=on_host)
    if not (isinstance(cfg.sharding, ZeroConfig) and cfg.sharding.stage == 3):
        fuse_adapters(module, on_host=on_host)
    recompute_activations(model, cfg.recompute_every)
    trained, total = count_parameters(module)
    note(f"{tuning.name}: {trained:,} of {total:,} parameters train ({trained / total:.2%})")
    module.to(device.torch_device)
    # Before the engine, which may cut the weights into pieces; after the adapters, which wrap only projections.
    own_kernels = kernels.use(model, note)
    given = {"optim": cfg.optim, "device": device, "world": world, "working_dtype": dtype, "needs": needs_of(module)}
    engine = build(cfg.sharding, Engine, module, **given)
    engine.kernels = own_kernels
    objective.attach(module)
    # Every rank draws its own dropout masks from here on.
    device.seed(cfg.seed + 1 + world.rank)
    return engine


def row_kind(cfg: TrainConfig, family: Family, note: Note, world_size: int) -> RowKind:
    """What rows hold.

    Under ZeRO-3 the ranks gather a layer's weights together, and a wrapped mixer runs once for each group of samples,
    of which ranks have different numbers: there a row of such a family holds one sample. A rank that is alone has
    nobody to fall out of step with.

    Raises:
        ConfigError: packing was asked for by name where it is not proven exact, or cannot be had.
    """
    if (turns := family.turns_by_length) is not None and cfg.max_length > turns[1]:
        return _apart_by_length(cfg, *turns, note)
    if cfg.packing is Packing.off:
        return RowKind.padded
    spread = isinstance(cfg.sharding, ZeroConfig) and cfg.sharding.stage == 3 and world_size > 1
    in_pieces = spread and bool(family.packed_mixers)
    if family.packing_exact and not in_pieces:
        return RowKind.packed
    if in_pieces:
        why = "runs its mixers sample by sample, which ranks of ZeRO-3 cannot do in step"
    elif family.listed:
        why = "is not proven to keep packed samples apart"
    else:
        why = "is not one that crosstune knows (docs/families.md)"
    if cfg.packing is Packing.on:
        raise ConfigError(
            "packing",
            f"on, but family '{family.model_type}' {why}",
            allowed="auto (one sample a row, exact by construction), off (padded rows)",
        )
    note(f"packing: family '{family.model_type}' {why}, so each row holds one sample")
    return RowKind.single


def _apart_by_length(cfg: TrainConfig, rope: str, bound: int, note: Note) -> RowKind:
    """Rows where positions of all samples of a pass would turn by how long the longest of them is."""
    found = f"{cfg.max_length}, but positions beyond {bound} of this model's rotary embedding ('{rope}')"
    shorter = f"max_length={bound}, up to which it turns all alike"
    if "dynamic" in rope:
        raise ConfigError(
            "max_length", f"{found} turn by the longest sample seen so far, so by the order of the data", remedy=shorter
        )
    if cfg.packing is not Packing.auto:
        raise ConfigError(
            "max_length",
            f"{found} turn by the longest sample of the pass: no two samples may share one, as packing="
            f"{cfg.packing.value} has it",
            remedy=f"packing=auto (one sample a row), or {shorter}",
        )
    note(f"packing: max_length={found} turn by the longest sample of the pass, so each row holds one sample")
    return RowKind.single


def check_lengths(name: str, split: PreparedSplit, cfg: TrainConfig, prepared: Path) -> None:
    """Refuses a split of which a sample fits no forward pass.

    Raises:
        DataError: the split is empty, or its longest sample exceeds `micro_batch_tokens`.
    """
    if len(split) == 0:
        raise DataError(str(prepared), f"the {name} split is empty")
    longest = int(split.lengths.max())
    if longest > cfg.micro_batch_tokens:
        raise DataError(
            "micro_batch_tokens",
            f"{cfg.micro_batch_tokens}, but the longest sample of {prepared} has {longest} tokens",
            remedy=f"micro_batch_tokens={longest} or more, or prepare with a smaller max_length",
        )


def validation_split(data: PreparedData, cfg: TrainConfig) -> PreparedSplit | None:
    """The split that `eval_every` measures.

    Raises:
        ConfigError: measuring was asked for and there is nothing to measure.
        DataError: a sample of it fits no forward pass.
    """
    if not cfg.eval_every:
        return None
    if "validation" not in data.split_names():
        raise ConfigError(
            "eval_every",
            f"{cfg.eval_every}, but the data has no validation split",
            remedy="dataset.validation_path=FILE or dataset.validation_fraction=0.02",
        )
    split = data.split("validation")
    check_lengths("validation", split, cfg, data.path)
    return split


def hooks_of(
    cfg: TrainConfig,
    run: RunFolder,
    device: Device,
    world: World,
    heartbeat: Heartbeat,
    last_words: Callable[[CrosstuneError], None],
    *,
    first_step: int,
) -> list[Hook]:
    """What watches the loop; rank 0 writes and shows."""
    hooks: list[Hook] = []
    if cfg.guard.hang_timeout_seconds:
        asynchronous = device.torch_type != "cpu"
        limit = cfg.guard.hang_timeout_seconds
        hooks.append(HangWatch(heartbeat, world, run.path, limit, asynchronous=asynchronous, last_words=last_words))
    if world.rank == 0:
        hooks += [MetricsHook(run.metrics, keep_until=first_step), Progress(), PredictionKept(run, device)]
    return hooks
