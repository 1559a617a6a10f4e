"""The story of each command in the calling process. Each returns its result as plain values, for ``--json``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.compose import amend, load_resolved, save_resolved
from configs.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RunFailedError,
    StoppedError,
)
from configs.schema.roots import EvalJobConfig, ExportJobConfig, PrepConfig, RunConfig, TrainConfig
from launchers.accelerator import check_processes, choose_accelerator, device_of_one
from launchers.failure import last_words, traceback_kept_in, with_way_on
from launchers.run_dir import alone_in, existing_run, fresh_folder, make_writable, new_run, with_run_dir
from launchers.stages import Stages, is_first_rank
from launchers.torchrun import EndedBySignal, new_attempt, run_workers

if TYPE_CHECKING:
    from data_prep.prepare import Prepared
    from train.run_folder import RunFolder, RunRecord

Result = dict[str, Any]

MAY_CHANGE_ON_RESUME = (
    *("nproc", "sharding", "device", "packing", "micro_batch_tokens", "activation_checkpointing"),
    *("activation_checkpointing_every", "activation_budget"),
    *("checkpoint", "guard", "eval_every", "export", "eval", "cache_dir"),
)
"""How a run is computed may change on the way; what it computes may not."""
ALSO_WITH_LORA = "model.precision"
"""Adapters may be carried to another precision of their base: see `RunRecord.precision_from_here`."""


def train(cfg: TrainConfig, *, worker: bool = False, resume: bool = False, launched: bool = False) -> Result:
    """`crosstune train`: records or prepared data -> checkpoints.

    Args:
        cfg: the whole config.
        worker: this process is one of several that we started ourselves; their parent has made the folder and talks.
        resume: go on from the latest checkpoint.
        launched: this process is a rank of a job, which goes on where it can and else begins again.
    """
    cfg = with_run_dir(cfg)
    folder = Path(str(cfg.run_dir))
    stages = Stages(3, quiet=worker)
    with resumable(folder, worker=worker or launched), traceback_kept_in(folder / "logs"):
        with nullcontext() if worker else alone_in(folder, patient=launched) if resume else new_run(folder):
            _train(cfg, folder, stages, resume=resume and not (launched and _has_nothing(folder)))
    stages.end(f"run: {folder}")
    return {"run_dir": str(folder)}


def run(cfg: RunConfig, *, resume: bool = False, launched: bool = False) -> Result:
    """`crosstune run`: records -> checkpoints -> exported model and figures. See `train`."""
    cfg = with_run_dir(cfg)
    folder = Path(str(cfg.run_dir))
    stages = Stages(5)
    with resumable(folder, worker=launched), traceback_kept_in(folder / "logs"):
        with alone_in(folder, patient=launched) if resume else new_run(folder):
            _train(cfg, folder, stages, resume=resume and not (launched and _has_nothing(folder)))
            if not is_first_rank():  # under an outer torchrun the other ranks are done here
                return {"run_dir": str(folder)}
            job = ExportJobConfig(str(folder), overwrite=resume, export=cfg.export)
            exported = _export(_run_folder(folder), job, stages)
            figures = _evaluate(EvalJobConfig(run_dir=str(folder), eval=cfg.eval, device=cfg.device), stages)
    stages.end(f"run: {folder}")
    return {"run_dir": str(folder), **exported, "summary": figures}


@contextmanager
def resumable(folder: Path, *, worker: bool = False) -> Iterator[None]:
    """Says, where a run is ended by a signal or fails, how it can go on, if it can; a worker leaves that to its parent.

    Raises:
        StoppedError: it was ended by a signal before it could save, and has an earlier checkpoint.
        RunFailedError: as it came, with the way on.
    """
    try:
        yield
    except RunFailedError as error:
        raise error if worker else with_way_on(error, folder) from error.__cause__
    except (KeyboardInterrupt, EndedBySignal):
        saved = sorted(folder.glob("checkpoints/step-*[0-9]/COMPLETE"))  # by name: a stop imports no torch
        if not saved:
            raise
        step = int(saved[-1].parent.name.removeprefix("step-"))
        way_on = f"crosstune resume {shlex.quote(str(folder))} goes on after step {step}"
        raise StoppedError(str(folder), "stopped at once", remedy=way_on) from None


def resumed_config(
    folder: Path, overrides: list[str], *, config_dir: Path | None = None, begun_as: Path | None = None
) -> TrainConfig:
    """The config that a run goes on with.

    Args:
        folder: of the run.
        overrides: what is to change on the way.
        config_dir: folder with group options of the user's own.
        begun_as: the config of a job that ended before the run wrote its own.

    Raises:
        CheckpointError: not a run.
        ConfigError: an override would change what the run computes.
    """
    folder = folder.resolve() if begun_as else existing_run(folder)
    cfg = load_resolved(begun_as or folder / "resolved.yaml")
    if not isinstance(cfg, TrainConfig):
        raise CheckpointError(str(folder / "resolved.yaml"), f"a {type(cfg).__name__}, nothing that trains")
    keys = [text.lstrip("+~").partition("=")[0] for text in overrides]
    for key, text in zip(keys, overrides, strict=True):
        if key.partition(".")[0] not in MAY_CHANGE_ON_RESUME and key != ALSO_WITH_LORA:
            raise ConfigError(
                text,
                "would change what the run computes",
                allowed=", ".join([*MAY_CHANGE_ON_RESUME, f"{ALSO_WITH_LORA} (adapters only)"]),
                remedy="start a new run",
            )
    cfg = amend(cfg, overrides, config_dir=config_dir) if overrides else cfg
    if ALSO_WITH_LORA in keys and not begun_as:
        _run_folder(folder).read_record().precision_from_here(cfg.model.precision)
    return replace(cfg, run_dir=str(folder))


def resume(cfg: TrainConfig) -> Result:
    """`crosstune resume RUN`: goes on with the command that made the run.

    Raises:
        CheckpointError: the run has no complete checkpoint.
    """
    if "RANK" not in os.environ:  # under an outer launcher another machine may have what this one lacks
        _latest_checkpoint(Path(str(cfg.run_dir)))
    return run(cfg, resume=True) if isinstance(cfg, RunConfig) else train(cfg, resume=True)


def export(cfg: ExportJobConfig) -> Result:
    """`crosstune export`: checkpoint of a run -> adapter and merged model."""
    stages = Stages(1)
    folder = existing_run(Path(cfg.run_dir).expanduser())
    choose_accelerator("cpu")
    with traceback_kept_in(folder / "logs"):
        return _export(_run_folder(folder), cfg, stages)


def evaluate(cfg: EvalJobConfig) -> Result:
    """`crosstune eval`: figures of a run's checkpoint, or of any model folder.

    Raises:
        ConfigError: it is not said what to measure.
    """
    if cfg.run_dir is None and not (cfg.model.path and cfg.data):
        raise ConfigError(
            "run_dir", "nothing to measure", remedy="run_dir=RUN, or model.path=FOLDER with data=PREPARED_FOLDER"
        )
    return _evaluate(cfg, Stages(1))


def report(path: Path) -> Result:
    """`crosstune report PATH`: an export's provenance, a checkpoint's state, or a run's report.html written anew.

    Raises:
        CheckpointError: the path is none of them, or a checkpoint that cannot be read.
    """
    exports = [found for found in (path, path / "merged", path / "adapter") if (found / "provenance.json").is_file()]
    if exports:
        from train.export.provenance import read_chain

        chain = read_chain(exports[0])
        print(chain)
        return chain.to_json()
    if (path / "run.json").is_file():
        from train.observe.report import write_report

        page = write_report(_run_folder(path.resolve()))
        print(f"report: {page}")
        return {"report": str(page)}
    from train.checkpoint.describe import describe, is_checkpoint

    if is_checkpoint(path):
        described = describe(path.resolve())
        print(described)
        return described.to_json()
    raise CheckpointError(
        str(path),
        "neither an export (no provenance.json) nor a run (no run.json) nor a checkpoint of one (no index.json)",
        remedy="name RUN, RUN/checkpoints/step-NUMBER or RUN/export/merged",
    )


def model_folder(cfg: PrepConfig, stages: Stages, record: RunRecord | None = None) -> Path:
    """The model's folder; for a resumed run the one it began with, wherever the command is called now.

    Of a model whose weights are quantised it is the bf16 copy, which the first of several processes makes.
    """
    from train.models.load import ensure_model

    with stages.stage("model"):
        if record and Path(record.model_dir).is_dir():
            model_dir = Path(record.model_dir)
        else:
            model_dir = ensure_model(cfg.model, _cache_dir(cfg), on_note=stages.note)
        if record and not stages.quiet:
            record.refuse_changed_base(model_dir)  # a checkpoint may hold adapters only
        stages.note(str(model_dir))
    return model_dir


def prepared_data(
    cfg: PrepConfig,
    model_dir: Path,
    stages: Stages,
    *,
    out: Path | None = None,
    record: RunRecord | None = None,
    whole: bool = False,
) -> Prepared:
    """Prepares the data, or finds it prepared; refuses at once what `crosstune run` would miss at its end.

    `whole`: the summary says all, not just how many samples there are.
    """
    from data_prep.prepare import find_prepared, prepare
    from data_prep.summary import summary_lines

    with stages.stage("data"):
        if record and _same_data(record, Path(record.prepared)):
            prepared = find_prepared(Path(record.prepared))
        else:
            with stages.preparation() as on_progress:
                prepared = prepare(cfg, model_dir, out=out, on_progress=on_progress)
            if record and not _same_data(record, prepared.path):
                raise DataError(
                    str(prepared.path),
                    "differs from the data that the run began with",
                    remedy="bring back the original records, or start a new run",
                )
        if isinstance(cfg, RunConfig) and cfg.eval.split not in prepared.manifest["splits"]:
            raise ConfigError(
                "eval.split",
                f"{cfg.eval.split}, but the data has only: {', '.join(prepared.manifest['splits'])}",
                remedy="dataset.test_fraction=0.1 or dataset.test_path=FILE, when the records are prepared; "
                "or stop after `crosstune train`",
            )
        stages.note(f"{'reused' if prepared.reused else 'prepared'} {prepared.path}")
        for note in prepared.notes:
            stages.note(note)
        for line in summary_lines(prepared.manifest, prepared.path) if whole else [_in_short(prepared)]:
            stages.note(line)
    return prepared


def _in_short(prepared: Prepared) -> str:
    splits = ", ".join(f"{name} {split['rows']:,}" for name, split in prepared.manifest["splits"].items())
    rejected = prepared.manifest["rejects"]["total"]
    return f"samples: {splits}" + (f"; {rejected:,} rejected, see rejects.jsonl there" if rejected else "")


def _train(cfg: TrainConfig, folder: Path, stages: Stages, *, resume: bool) -> None:
    """Model, data and training; in this process, or in `nproc` workers."""
    record = _run_folder(folder).read_record() if resume else None
    check_processes(cfg, record.precision_from_here(cfg.model.precision).value if record else None)
    model_dir = model_folder(cfg, stages, record)
    prepared = prepared_data(cfg, model_dir, stages, record=record).path
    with stages.stage("train"):
        if cfg.nproc == 1 or "RANK" in os.environ:
            from train.run import train as train_here

            train_here(
                cfg, model_dir=model_dir, prepared=prepared, run_dir=folder, resume=resume, last_words=last_words
            )
        else:
            # What the workers compute is in a file: the run's own is only written once training has begun.
            request = folder / "logs" / "request.yaml"
            make_writable(request.parent, "run_dir")
            save_resolved(cfg, request)
            arguments = ["train", "--resolved", str(request), *(["--resume"] if resume else [])]
            run_workers(
                cfg.nproc,
                arguments,
                new_attempt(folder / "logs"),
                threads=cfg.device.threads,
                grace_seconds=cfg.guard.grace_seconds,
            )


def _same_data(record: RunRecord, prepared: Path) -> bool:
    """Whether a folder holds the prepared data that the run began with."""
    from train.run_folder import sha256_of

    manifest = prepared / "manifest.json"
    return manifest.is_file() and sha256_of(manifest) == record.manifest_sha256


def _has_nothing(folder: Path) -> bool:
    """Whether a run that was begun has nothing to go on from."""
    return not any(folder.glob("checkpoints/step-*[0-9]/COMPLETE"))


def _latest_checkpoint(folder: Path) -> Path:
    from train.checkpoint.retention import latest

    return latest(_run_folder(folder).checkpoints)


def _export(folder: RunFolder, cfg: ExportJobConfig, stages: Stages) -> Result:
    from train.export.run import export as export_run

    out = Path(cfg.out).expanduser() if cfg.out else None
    with stages.stage("export"):
        done = export_run(
            folder, cfg.export, checkpoint=cfg.checkpoint, out=out, overwrite=cfg.overwrite, on_note=stages.note
        )
    return {"adapter": done.adapter and str(done.adapter), "merged": done.merged and str(done.merged)}


def _evaluate(cfg: EvalJobConfig, stages: Stages) -> Result:
    seconds_before = stages.seconds
    device = device_of_one(cfg.device)
    from train.evaluate.run import evaluate_model, evaluate_run
    from train.faults import told
    from train.models.load import ensure_model
    from train.observe.report import write_report

    data = Path(cfg.data).expanduser() if cfg.data else None
    out = Path(cfg.out).expanduser() if cfg.out else None
    if cfg.run_dir is None and out is None:
        # Never the working folder itself: figures replace those that lie in theirs.
        out = fresh_folder(f"eval-{Path(cfg.model.path).name}")
    if out is not None:
        make_writable(out, "out")
    with stages.stage("eval"), told(device, cfg.eval):
        device.activate(0)
        if cfg.run_dir is None:
            assert data is not None and out is not None
            model_dir = ensure_model(cfg.model, Path(PrepConfig.cache_dir).expanduser(), on_note=stages.note)
            trusted = cfg.model.trust_remote_code
            figures = evaluate_model(
                model_dir, data, cfg.eval, device, out, on_note=stages.note, trust_remote_code=trusted
            )
        else:
            folder = _run_folder(existing_run(Path(cfg.run_dir).expanduser()))
            figures = evaluate_run(
                folder,
                cfg.eval,
                device,
                checkpoint=cfg.checkpoint,
                data=data,
                out=out,
                on_note=stages.note,
                seconds_before=seconds_before,
            )
            stages.note(f"report: {write_report(folder)}")
        if out is not None:
            stages.note(f"figures: {out / 'summary.json'}")
    return figures


def _run_folder(path: Path) -> RunFolder:
    from train.run_folder import RunFolder

    return RunFolder(path)


def _cache_dir(cfg: PrepConfig) -> Path:
    return Path(cfg.cache_dir).expanduser()
