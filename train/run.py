"""Assembly of a training run, in one worker process. Reads as the story of a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import psutil

from configs.compose import build, load_resolved, save_resolved
from configs.errors import ConfigError, CrosstuneError, DataError
from configs.schema.model import Precision
from configs.schema.outputs import Storage
from configs.schema.roots import Packing, TrainConfig
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import TrainerState
from train.checkpoint.restore import restore_latest
from train.checkpoint.storage import resolve_storage
from train.data.plan import BatchPlan, RowKind
from train.data.prepared import PreparedData, PreparedSplit
from train.data.sampler import RowLayout, StepSampler
from train.devices.base import Device
from train.engine.base import Engine, World, init_world
from train.faults import told
from train.guard.heartbeat import Heartbeat
from train.guard.limits import collective_seconds
from train.guard.stop import STARTED, StopRequests
from train.guard.watch import HangWatch
from train.loop import Hook, Loop
from train.models.families import Family, family_of
from train.models.load import dtype_name, load_config, load_model, resolve_precision
from train.objectives.base import Objective
from train.observe.environment import code_version, write_environment
from train.observe.metrics import MetricsHook
from train.observe.progress import Progress
from train.ops.packed_attention import register
from train.ops.select import KernelSelection
from train.run_folder import RunFolder, RunRecord, sha256_of
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
    with closing(init_world(device, patience)) as world, told(device, cfg, rank=world.rank, world_size=world.size):
        note: Note = logger.info if world.rank == 0 else logger.debug
        run, objective = RunFolder(run_dir), build(cfg.objective, Objective)
        data = PreparedData.open(prepared).require(objective.needs, f"objective {objective.name}")
        split = data.split("train")
        check_lengths("train", split, cfg, prepared)
        validation = validation_split(data, cfg)
        trusted = cfg.model.trust_remote_code
        family = family_of(load_config(model_dir, trust_remote_code=trusted), trust_remote_code=trusted)
        kind = row_kind(cfg.packing, family, note)
        mix = data.mix()
        for share in mix:
            note(f"mixture: an epoch shows {share.name} {share.epochs:g} times")
        plan = BatchPlan(split.lengths, seed=cfg.seed, batch_tokens=cfg.batch_tokens, mix=mix)
        rows = RowLayout(world.rank, world.size, cfg.micro_batch_tokens, kind, device.torch_device)
        total_steps = cfg.max_steps or plan.steps_for(cfg.epochs)
        with closing(make_engine(cfg, model_dir, family, kind, device, world, note)) as engine:
            storage = resolve_storage(cfg.checkpoint.storage, run.checkpoints, world, note)
            records = world.rank == 0 or (storage is Storage.per_node and world.leads_node)
            if resume:
                record = run.read_record()
                run_id = record.run_id
                state = restore_latest(engine, run.checkpoints, world, storage=storage, run_id=run_id, note=note)
                if record.precision != cfg.model.precision.value:
                    note(f"adapters of a base in {record.precision} go on with it in {cfg.model.precision.value}")
                    if records:
                        record_carry(run, record, cfg.model.precision, state.step)
            else:
                run_id = world.broadcast_bytes(uuid4().hex.encode()).decode()
                state = TrainerState(step=0, epoch=0, samples_seen=0, tokens_seen=0, seed=cfg.seed)
                if records:
                    record_run(run, cfg, engine, device, world, model_dir, prepared, total_steps, run_id)
            heartbeat = Heartbeat()
            with (
                closing(
                    Checkpointer(
                        engine,
                        run.checkpoints,
                        cfg.checkpoint,
                        world,
                        storage=storage,
                        run_id=run_id,
                        note=note,
                        beat=heartbeat.beat,
                    )
                ) as checkpointer,
                StopRequests(run_dir, cfg.guard, started, world=world, note=note, last_words=last_words) as stop,
            ):
                Loop(
                    engine=engine,
                    objective=objective,
                    sampler=StepSampler(split, plan, rows),
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


def make_engine(
    cfg: TrainConfig, model_dir: Path, family: Family, kind: RowKind, device: Device, world: World, note: Note
) -> Engine:
    """Model, tuning method and engine.

    Raises:
        DeviceError: the precision does not work on the device, or a kernel that was asked for by name does not.
        ModelError: the folder does not open.
        ConfigError: the tuning method does not fit the model.
    """
    dtype = resolve_precision(cfg.model.precision, device, on_note=note)
    packed = kind is RowKind.packed
    kernels = KernelSelection(device, family, packed=packed)
    device.seed(cfg.seed)
    attention = register() if packed else "sdpa"
    model = load_model(model_dir, dtype=dtype, attention=attention, trust_remote_code=cfg.model.trust_remote_code)
    tuning = build(cfg.tuning, Tuning)
    module = tuning.apply(model, family)
    if cfg.activation_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    trained, total = count_parameters(module)
    note(f"{tuning.name}: {trained:,} of {total:,} parameters train ({trained / total:.2%})")
    module.to(device.torch_device)
    # Before the engine, which may cut the weights into pieces; after the adapters, which wrap only projections.
    own_kernels = kernels.use(model, dtype, note)
    engine = build(cfg.sharding, Engine, module, optim=cfg.optim, device=device, world=world, working_dtype=dtype)
    engine.kernels = own_kernels
    # Every rank draws its own dropout masks from here on.
    device.seed(cfg.seed + 1 + world.rank)
    return engine


def row_kind(packing: Packing, family: Family, note: Note) -> RowKind:
    """What rows hold.

    Raises:
        ConfigError: packing was asked for by name on a family for which it is not proven exact.
    """
    if packing is Packing.off:
        return RowKind.padded
    if family.packing_exact:
        return RowKind.packed
    if packing is Packing.on:
        raise ConfigError(
            "packing",
            f"on, but family '{family.model_type}' is not proven to keep packed samples apart",
            allowed="auto (one sample a row, exact by construction), off (padded rows)",
        )
    note(f"packing: family '{family.model_type}' is not proven exact, so each row holds one sample")
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


def record_run(
    run: RunFolder,
    cfg: TrainConfig,
    engine: Engine,
    device: Device,
    world: World,
    model_dir: Path,
    prepared: Path,
    total_steps: int,
    run_id: str,
) -> None:
    """Writes what the run was made from; one rank's work in each folder."""
    base_files = sorted([*model_dir.glob("*.safetensors"), *model_dir.glob("*.json"), *model_dir.glob("*.jinja")])
    save_resolved(cfg, run.resolved)
    write_environment(run.environment, device)
    run.write_record(
        RunRecord(
            model_dir=str(model_dir.resolve()),
            model_sha256={path.name: sha256_of(path) for path in base_files},
            prepared=str(prepared.resolve()),
            manifest_sha256=sha256_of(prepared / "manifest.json"),
            precision=dtype_name(engine.working_dtype),
            engine=type(engine).__name__,
            kernels=list(engine.kernels),
            world_size=world.size,
            tuning=build(cfg.tuning, Tuning).name,
            code_version=code_version(),
            total_steps=total_steps,
            run_id=run_id,
        )
    )


def record_carry(run: RunFolder, record: RunRecord, precision: Precision, step: int) -> None:
    """Later resumes, and the export, take the base in the precision with which the adapters now go on."""
    cfg = load_resolved(run.resolved)
    # First the config: killed in between, the next resume takes it for asked again and ends this.
    save_resolved(replace(cfg, model=replace(cfg.model, precision=precision)), run.resolved)
    carried = [*record.carried, f"{record.precision} until step {step}"]
    run.write_record(replace(record, precision=precision.value, carried=carried))


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
        hooks += [MetricsHook(run.metrics, keep_until=first_step), Progress()]
    return hooks
