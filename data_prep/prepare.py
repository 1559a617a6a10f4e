"""Raw records -> a folder of prepared data: read, check, render, tokenize, write, report.

The folder is made under a hidden name beside its final one and renamed when whole, so that a name never stands for half
the data. By default the name carries a hash of all that decides the content, and a second preparation finds the first.
What an interrupted preparation of some size has done is kept under the hidden name; the same command goes on with it.
"""

from __future__ import annotations

import errno
import logging
import shutil
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.compose import build
from configs.errors import ConfigError, DataError, ModelError, StoppedError, StorageError
from configs.schema.dataset import FilesDatasetConfig, MixDatasetConfig
from configs.schema.roots import PrepConfig
from data_prep import images as kept_images
from data_prep import manifest as manifests
from data_prep.corpus import Executor
from data_prep.dataset import Dataset
from data_prep.job import Job, renderer_for, template_path
from data_prep.journal import Journal, JournalError
from data_prep.mixture import epochs_per_source
from data_prep.output import Output
from data_prep.passes import Passes
from data_prep.progress import Progress
from data_prep.rejects import remedy_for
from data_prep.report import write_report
from data_prep.samples import samples_of
from data_prep.tokenizer import template_sha256, template_text, tokenizer_sha256
from data_prep.vision import vision_of

logger = logging.getLogger(__name__)

_SAMPLES_SHOWN = 8


@dataclass(frozen=True)
class Prepared:
    """A folder of prepared data. `reused`: it was there already, whole, with the same fingerprint."""

    path: Path
    manifest: dict[str, Any]
    reused: bool
    notes: list[str] = field(default_factory=list)
    """What the caller should tell the user about this use of it; not part of the data."""


def prepare(
    cfg: PrepConfig, model_dir: Path, *, out: Path | None = None, on_progress: Progress | None = None
) -> Prepared:
    """Prepares the configured data for a model, or finds it prepared.

    Args:
        cfg: the resolved config.
        model_dir: local folder of the model whose tokenizer and template are used.
        out: folder to make; None: ``<cache_dir>/prepared/<name>-<fingerprint>``.
        on_progress: see `Progress`.

    Raises:
        DataError: records, or `out`, cannot be used; or too many rows are at fault.
        ModelError: tokenizer or chat template is missing.
        StorageError: the folder cannot be written.
        StoppedError: it was interrupted by Ctrl-C and can go on from where it was.
        RunFailedError: a worker died.
    """
    ready = _given_prepared(cfg, model_dir, out)
    if ready is not None:
        return ready
    job = Job(cfg, model_dir, build(cfg.dataset, Dataset, seed=cfg.seed), out)
    with job.locked():
        if job.hashes.known and (found := job.found()):
            return Prepared(job.target(), found, reused=True)
        return _build(job, on_progress)


def find_prepared(folder: Path) -> Prepared:
    """A folder of prepared data as it stands, whatever it was made from.

    Raises:
        DataError: it is no such folder, or not whole.
    """
    return Prepared(folder, manifests.read(folder), reused=True)


def _given_prepared(cfg: PrepConfig, model_dir: Path, out: Path | None) -> Prepared | None:
    """The data set's own folder, if it was made by `crosstune prep`; it must fit the model and the length."""
    if not isinstance(cfg.dataset, FilesDatasetConfig):
        return None
    folder = Path(cfg.dataset.path).expanduser()
    if not manifests.is_prepared(folder):
        return None
    manifest = manifests.read(folder)
    if out is not None and out.expanduser().resolve() != folder.resolve():
        raise ConfigError(
            f"out={out}",
            f"{cfg.dataset.path} is prepared data already, so there is nothing to write",
            remedy="leave out away; or copy the folder, or name the records it was made from",
        )
    if manifest["tokenizer"]["sha256"] != tokenizer_sha256(model_dir):
        raise DataError(
            cfg.dataset.path,
            f"was prepared with another tokenizer than that of {model_dir}",
            remedy="prepare it for this model",
        )
    if "images" in manifest:
        vision = vision_of(model_dir)
        if vision is None or vision.sha256 != manifest["images"]["processor_sha256"]:
            raise DataError(
                cfg.dataset.path,
                f"was prepared with another image processor than that of {model_dir}",
                remedy="prepare it for this model",
            )
    longest = max(split["max_length"] for split in manifest["splits"].values())
    if longest > cfg.max_length:
        raise DataError(
            cfg.dataset.path,
            f"holds samples of {longest} tokens, above max_length={cfg.max_length}",
            remedy=f"max_length={longest}, or prepare it again",
        )
    notes = [f"{cfg.dataset.path} is prepared data and is used as it is"]
    if manifest["template_sha256"] != template_sha256(template_text(model_dir, template_path(cfg))):
        notes.append(f"{cfg.dataset.path} was prepared with another chat template than is configured now")
    return Prepared(folder, manifest, reused=True, notes=notes)


def _build(job: Job, on_progress: Progress | None) -> Prepared:
    """Makes the folder; the caller holds its lock."""
    journal = Journal(job.work, job.binding)
    try:
        job.dataset.open()
        made = _resumed(job, journal, on_progress)
    except (ConfigError, DataError, ModelError):
        # Mending the records or the settings mostly changes what is made; a raised max_rejects, too, begins anew.
        shutil.rmtree(job.work, ignore_errors=True)
        raise
    except BaseException as error:
        if not journal.exists:
            shutil.rmtree(job.work, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            stopped = "the preparation was stopped; what is done is kept here"
            raise StoppedError(str(job.work), stopped, remedy="run the same command again to go on") from None
        if isinstance(error, OSError):
            found = f"cannot be written: {error.strerror or error}"
            elsewhere = "the same command then goes on" if journal.exists else "or choose another out or cache_dir"
            remedy = f"make room; {elsewhere}" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
            raise StorageError(str(job.work), found, remedy=remedy) from error
        raise
    shutil.rmtree(job.work, ignore_errors=True)
    return made


def _resumed(job: Job, journal: Journal, on_progress: Progress | None) -> Prepared:
    """Goes on with what an interrupted preparation has left, or begins."""
    notes = []
    if journal.exists:
        try:
            made = _made(job, journal, journal.read(), on_progress)
            return replace(made, notes=["went on with a preparation that had been interrupted", *made.notes])
        except JournalError as error:
            notes.append(f"an interrupted preparation was found, but not used: {error}")
            logger.warning("%s; beginning anew", notes[0])
    shutil.rmtree(job.work, ignore_errors=True)
    job.work.mkdir()
    made = _made(job, journal, None, on_progress)
    return replace(made, notes=[*notes, *made.notes])


def _made(job: Job, journal: Journal, entry: dict[str, Any] | None, on_progress: Progress | None) -> Prepared:
    """The finished folder, in its place; or another's that turns out to be the same."""
    cfg = job.cfg
    make_renderer = renderer_for(cfg, job.model_dir, job.store)
    executor = build(cfg.executor, Executor)
    dataset = executor.stage(cfg, job.dataset, on_note=logger.info)
    passes = Passes(executor.rest(cfg), dataset, job.work, journal, make_renderer, on_progress)
    looked = job.hashes.known
    job.hashes.start()
    with closing(passes.steps(entry)) as steps:
        for _ in steps:
            if not looked and job.hashes.known:
                looked = True
                if found := job.found():
                    return Prepared(job.target(), found, reused=True)
    if not looked and (found := job.found()):
        return Prepared(job.target(), found, reused=True)
    job.hashes.check_unchanged()
    assert passes.output is not None
    manifest = _manifest(job, passes, passes.output)
    samples = samples_of(job.work, manifest["splits"]["train"], make_renderer().decode, _SAMPLES_SHOWN, split="train")
    write_report(job.work / "report.html", manifest, samples)
    passes.tidy()
    kept_images.tidy(job.store)
    manifests.write(job.work, manifest)
    job.put_in_place()
    return Prepared(job.target(), manifests.read(job.target()), reused=False)


def _manifest(job: Job, passes: Passes, output: Output) -> dict[str, Any]:
    splits = output.splits(job.cfg.max_length)
    _check_not_empty(job.cfg, splits, output)
    parts, hashes = job.dataset.parts(), job.hashes.result()
    return {
        "fingerprint": job.fingerprint(),
        "kind": output.kind,
        **job.facts,
        "tokenizer": {**job.facts["tokenizer"], "path": job.cfg.model.path},
        "sources": [
            {"name": p.source.name, "path": p.source.path, "sha256": sha256, "bytes": p.source.bytes, "rows": rows}
            for p, sha256, rows in zip(parts, hashes, output.rows, strict=True)
        ],
        "splits": splits,
        **({"images": {**job.vision, **kept_images.stored(job.store)}} if output.images else {}),
        "mix": _mix(job.cfg, output.training_tokens()),
        "duplicates": passes.duplicates(),
        "rejects": output.rejects.summary(),
        "cleaned": passes.cleaned(),
        "notes": [*job.dataset.notes, *output.notes()],
    }


def _mix(cfg: PrepConfig, tokens: dict[str, int]) -> dict[str, Any]:
    """Source -> how often an epoch shows it, and how many tokens that is; empty where there is no mixture."""
    if not isinstance(cfg.dataset, MixDatasetConfig):
        return {}
    epochs = epochs_per_source(cfg.dataset, tokens)
    return {name: {"epochs": epochs[name], "tokens": round(epochs[name] * tokens[name])} for name in sorted(epochs)}


def _check_not_empty(cfg: PrepConfig, splits: dict[str, Any], output: Output) -> None:
    where, rejects = getattr(cfg.dataset, "path", None) or cfg.dataset.name, output.rejects
    if not splits and not rejects.total:
        raise DataError(where, "holds no records at all")
    if not splits:
        raise DataError(
            where,
            f"all {rejects.total:,} rows were left out; the first:\n{rejects.first()}",
            remedy=remedy_for(rejects.summary()["by_reason"]),
        )
    if "train" not in splits:
        raise DataError(
            where,
            f"no record is left for training; there are {', '.join(splits)}",
            remedy="lower dataset.validation_fraction and dataset.test_fraction, or add records",
        )
