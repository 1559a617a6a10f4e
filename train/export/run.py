"""`crosstune export`: checkpoint of a run -> adapter and merged model.

Reads the run's folder only, so it does not matter which engine trained, or on how many ranks.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, StorageError
from configs.schema.outputs import ExportConfig
from train.export.adapter import write_adapter
from train.export.card import write_card
from train.export.merged import write_merged
from train.export.provenance import NAME, read_provenance, write_provenance
from train.export.trained import Trained
from train.run_folder import RunFolder, sha256_of

ADAPTER, MERGED = "adapter", "merged"


@dataclass(frozen=True)
class ExportResult:
    """Folders that were written."""

    adapter: Path | None
    merged: Path | None


def export(
    run: RunFolder,
    cfg: ExportConfig,
    *,
    checkpoint: str = "latest",
    out: Path | None = None,
    overwrite: bool = False,
    on_note: Callable[[str], None] = print,
) -> ExportResult:
    """Writes ``out/adapter`` (LoRA only) and ``out/merged``, each with model card and provenance.

    Args:
        run: folder of the run.
        cfg: the export group.
        checkpoint: ``latest``, a step number, or a folder.
        out: where to; None: ``export/`` of the run.
        overwrite: replace an export of ours that is already there.
        on_note: what the user should know.

    Raises:
        CheckpointError: no such checkpoint, or one that does not fit the base model.
        ConfigError: nothing is left to write.
        ModelError: the base model's files cannot be used.
        StorageError: `out` is taken or cannot be written. What was there before is untouched then.
    """
    out = out or run.export
    with Trained.open(run, checkpoint) as trained:
        wanted = {ADAPTER: cfg.adapter and trained.is_lora, MERGED: cfg.merged}
        if not any(wanted.values()):
            raise ConfigError(
                "export",
                "neither an adapter nor a merged model is left to write",
                remedy="export.merged=true; full fine-tuning has no adapter",
            )
        _must_be_free(out, overwrite)
        partial = out.with_name(f".{out.name}.{os.getpid()}")
        try:
            for name in (name for name, is_wanted in wanted.items() if is_wanted):
                folder = partial / name
                folder.mkdir(parents=True)
                if name == ADAPTER:
                    hashes = write_adapter(trained, folder, on_note)
                else:
                    hashes = write_merged(trained, cfg, folder, on_note)
                write_provenance(trained, folder, hashes)
                write_card(trained, folder, adapter=name == ADAPTER)
            _put_in_place(partial, out)
        except OSError as error:
            raise StorageError(str(error.filename or out), f"cannot be written: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for name in (name for name, is_wanted in wanted.items() if is_wanted):
            on_note(f"{name}: {out / name} (step {trained.reader.state.step})")
    return ExportResult(*(out / name if wanted[name] else None for name in (ADAPTER, MERGED)))


def refresh_cards(trained: Trained, out: Path) -> None:
    """Writes the cards of an export of this very checkpoint anew, once figures are there."""
    for name in (ADAPTER, MERGED):
        if is_export_of(trained, out / name):
            write_card(trained, out / name, adapter=name == ADAPTER)


def is_export_of(trained: Trained, folder: Path) -> bool:
    """Whether `folder` was exported from this checkpoint."""
    if not (folder / NAME).is_file():
        return False
    recorded = read_provenance(folder)["checkpoint"]["index_sha256"]
    return bool(recorded == sha256_of(trained.checkpoint / "index.json"))


def _must_be_free(out: Path, overwrite: bool) -> None:
    """Refuses to replace anything but an export of ours, and that only when told to.

    Raises:
        StorageError: `out` is taken.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_ours(out):
        raise StorageError(
            str(out), "holds something that is not an export", remedy="name another folder with out=, or clear it"
        )
    if not overwrite:
        raise StorageError(
            str(out), "an export is already there", remedy="overwrite=true replaces it; or name another out="
        )


def _is_ours(out: Path) -> bool:
    """Whether everything in `out` is an export of ours."""
    if not out.is_dir():
        return False
    inside = {path.name for path in out.iterdir()}
    return inside <= {ADAPTER, MERGED} and all((out / name / NAME).is_file() for name in inside)


def _put_in_place(partial: Path, out: Path) -> None:
    """Gives the finished export its name; the one before is moved aside first and removed last."""
    old = out.with_name(f".{out.name}.old.{os.getpid()}")
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
