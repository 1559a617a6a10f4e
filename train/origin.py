"""Where a run begins: a new one with its records, a former one with its newest checkpoint. Called on all ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from configs.compose import build, load_resolved, save_resolved
from configs.errors import ModelError
from configs.schema.model import Precision
from configs.schema.outputs import Storage
from configs.schema.roots import TrainConfig
from train.checkpoint.layout import TrainerState
from train.checkpoint.restore import restore_latest
from train.engine.base import Engine
from train.models.load import dtype_name
from train.observe.environment import code_version, write_environment
from train.run_folder import RunFolder, RunRecord, sha256_of
from train.tuning.base import Tuning

Note = Callable[[str], None]


class BaseDigests:
    """SHA-256 of a model's files by name, computed while the run gets ready: some ten seconds for 16 GB.

    Args:
        folder: of the model.
    """

    def __init__(self, folder: Path) -> None:
        found = [path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in folder.glob(pattern)]
        self._files = sorted(path for path in found if path.is_file())
        self._found: dict[str, str] = {}
        self._fault: BaseException | None = None
        # A daemon: a run that fails meanwhile ends at once.
        self._thread = threading.Thread(target=self._compute, name="digests", daemon=True)
        self._thread.start()

    def _compute(self) -> None:
        try:
            for path in self._files:
                self._found[path.name] = sha256_of(path)
        except BaseException as error:  # noqa: BLE001  # raised where they are waited for
            self._fault = error

    def wait(self) -> dict[str, str]:
        """All of them.

        Raises:
            ModelError: a file cannot be read.
        """
        self._thread.join()
        if isinstance(self._fault, OSError):
            fault = self._fault
            raise ModelError(str(fault.filename), f"cannot be read: {fault.strerror}") from fault
        if self._fault is not None:
            raise self._fault
        return self._found


@dataclass(frozen=True)
class Origin:
    """What a run is made from."""

    model_dir: Path
    prepared: Path
    total_steps: int
    digests: BaseDigests | None = None
    """Of a run that begins, on rank 0."""


def begin(
    cfg: TrainConfig, run: RunFolder, engine: Engine, storage: Storage, origin: Origin, note: Note
) -> tuple[TrainerState, str]:
    """A new run: step 0, and an id of its own; each folder gets the records.

    Raises:
        StorageError: they cannot be written.
    """
    run_id = engine.world.broadcast_bytes(uuid4().hex.encode()).decode()
    if _keeps_records(engine, storage):
        _record(run, cfg, engine, origin, run_id)
    return TrainerState(step=0, epoch=0, samples_seen=0, tokens_seen=0, seed=cfg.seed), run_id


def go_on(
    cfg: TrainConfig, run: RunFolder, engine: Engine, storage: Storage, origin: Origin, note: Note
) -> tuple[TrainerState, str]:
    """A former run, from its newest checkpoint.

    Raises:
        CheckpointError: there is none, or it does not fit.
    """
    record, precision = run.read_record(), cfg.model.precision
    state = restore_latest(engine, run.checkpoints, engine.world, storage=storage, run_id=record.run_id, note=note)
    if record.precision != precision.value:
        note(f"adapters of a base in {record.precision} go on with it in {precision.value}")
        if _keeps_records(engine, storage):
            _record_carry(run, record, precision, state.step)
    return state, record.run_id


def _keeps_records(engine: Engine, storage: Storage) -> bool:
    """Whether this rank writes what stands once in a folder."""
    return engine.world.rank == 0 or (storage is Storage.per_node and engine.world.leads_node)


def _record(run: RunFolder, cfg: TrainConfig, engine: Engine, origin: Origin, run_id: str) -> None:
    """Writes what the run was made from."""
    folder, prepared = origin.model_dir, origin.prepared
    save_resolved(cfg, run.resolved)
    write_environment(run.environment, engine.device)
    run.write_record(
        RunRecord(
            model_dir=str(folder.resolve()),
            model_sha256=(origin.digests or BaseDigests(folder)).wait(),
            prepared=str(prepared.resolve()),
            manifest_sha256=sha256_of(prepared / "manifest.json"),
            precision=dtype_name(engine.working_dtype),
            engine=type(engine).__name__,
            kernels=list(engine.kernels),
            world_size=engine.world.size,
            tuning=build(cfg.tuning, Tuning).name,
            code_version=code_version(),
            total_steps=origin.total_steps,
            run_id=run_id,
        )
    )


def _record_carry(run: RunFolder, record: RunRecord, precision: Precision, step: int) -> None:
    """Later resumes, and the export, take the base in the precision with which the adapters now go on."""
    cfg = load_resolved(run.resolved)
    # First the config: killed in between, the next resume takes it for asked again and ends this.
    save_resolved(replace(cfg, model=replace(cfg.model, precision=precision)), run.resolved)
    carried = [*record.carried, f"{record.precision} until step {step}"]
    run.write_record(replace(record, precision=precision.value, carried=carried))
