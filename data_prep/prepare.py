"""Raw records -> a folder of prepared data: read, check, render, tokenize, write, report.

The folder is made under a temporary name beside its final one and renamed when whole, so that a name never stands for
half the data. By default the name carries a hash of all that decides the content, and a second preparation finds the
first.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.compose import build
from configs.errors import DataError, StorageError
from configs.schema.dataset import FilesDatasetConfig
from configs.schema.roots import PrepConfig
from data_prep import manifest as manifests
from data_prep.dataset import SPLITS, Dataset
from data_prep.records import AnyRecord, Reject
from data_prep.rejects import RejectLog
from data_prep.render import Renderer, Sample
from data_prep.report import write_report
from data_prep.samples import samples_of_shard
from data_prep.shards import ROWS_PER_SHARD, SplitWriter
from data_prep.tokenizer import load_tokenizer, template_sha256, template_text, tokenizer_sha256

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called now and then with (rows read, tokens written) so far."""

_Row = tuple[str, AnyRecord | Reject]
_BATCH_ROWS = 512
_SAMPLES_SHOWN = 3


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
    """
    ready = _given_prepared(cfg, model_dir)
    if ready is not None:
        return ready
    dataset = build(cfg.dataset, Dataset, seed=cfg.seed)
    facts = _facts(cfg, model_dir, dataset)
    name = f"{cfg.dataset.name}-{facts['fingerprint'][:12]}"
    target = out.expanduser() if out else Path(cfg.cache_dir).expanduser() / "prepared" / name
    with _locked(target):
        found = _reusable(target, facts["fingerprint"], is_cache=out is None, overwrite=cfg.overwrite)
        if found is not None:
            return Prepared(target, found, reused=True)
        manifest = _build(cfg, model_dir, dataset, facts, target, on_progress)
    return Prepared(target, manifest, reused=False)


def find_prepared(folder: Path) -> Prepared:
    """A folder of prepared data as it stands, whatever it was made from.

    Raises:
        DataError: it is no such folder, or not whole.
    """
    return Prepared(folder, manifests.read(folder), reused=True)


def _given_prepared(cfg: PrepConfig, model_dir: Path) -> Prepared | None:
    """The data set's own folder, if it was made by `crosstune prep`; it must fit the model and the length."""
    if not isinstance(cfg.dataset, FilesDatasetConfig):
        return None
    folder = Path(cfg.dataset.path).expanduser()
    if not manifests.is_prepared(folder):
        return None
    manifest = manifests.read(folder)
    if manifest["tokenizer"]["sha256"] != tokenizer_sha256(model_dir):
        raise DataError(
            cfg.dataset.path,
            f"was prepared with another tokenizer than that of {model_dir}",
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
    if manifest["template_sha256"] != template_sha256(template_text(model_dir, _template_path(cfg))):
        notes.append(f"{cfg.dataset.path} was prepared with another chat template than is configured now")
    return Prepared(folder, manifest, reused=True, notes=notes)


def _facts(cfg: PrepConfig, model_dir: Path, dataset: Dataset) -> dict[str, Any]:
    """What decides the content, as it stands in the manifest, with the fingerprint over it."""
    facts = {
        "dataset": {"name": cfg.dataset.name, "license": cfg.dataset.license},
        "tokenizer": {"sha256": tokenizer_sha256(model_dir)},
        "template_sha256": template_sha256(template_text(model_dir, _template_path(cfg))),
        "max_length": cfg.max_length,
    }
    sources = [[source.path, source.sha256] for source in dataset.sources()]
    settings = {"reader": cfg.dataset._target_, **dataset.settings()}
    return {"fingerprint": manifests.fingerprint({**facts, "sources": sources, "settings": settings}), **facts}


def _template_path(cfg: PrepConfig) -> Path | None:
    return Path(cfg.template.path) if cfg.template.path is not None else None


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One preparation of a folder at a time; who waits finds the other's result."""
    from filelock import FileLock, Timeout

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("another process is preparing %s; waiting for it", target)
            lock.acquire()
    except OSError as error:
        raise StorageError(str(target.parent), f"cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _reusable(target: Path, fingerprint: str, *, is_cache: bool, overwrite: bool) -> dict[str, Any] | None:
    """The manifest of what stands at `target` if it is what is wanted; None if it may be (re)made.

    Raises:
        DataError: something else stands there and must not be replaced.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    if not manifests.is_prepared(target):
        raise DataError(
            str(target), "holds something that is no prepared data; it is left alone", remedy="choose another out"
        )
    try:
        found = manifests.read(target)
    except DataError:
        if is_cache or overwrite:
            return None
        raise
    if found["fingerprint"] == fingerprint:
        return found
    if is_cache or overwrite:
        return None
    raise DataError(
        str(target),
        f"holds other prepared data ('{found['dataset']['name']}', {found['fingerprint'][:12]})",
        remedy="overwrite=true to replace it, or choose another out",
    )


def _build(
    cfg: PrepConfig,
    model_dir: Path,
    dataset: Dataset,
    facts: dict[str, Any],
    target: Path,
    on_progress: Progress | None,
) -> dict[str, Any]:
    """Makes the folder; the caller holds its lock and has made sure that what stands there may go."""
    tokenizer = load_tokenizer(model_dir, template=_template_path(cfg), trust_remote_code=cfg.model.trust_remote_code)
    renderer = Renderer(tokenizer, max_length=cfg.max_length, model_name=str(model_dir))
    work = target.parent / f".{target.name}.making"
    try:
        shutil.rmtree(work, ignore_errors=True)  # left by a preparation that was killed; the lock makes it ours
        work.mkdir()
        with RejectLog(work / "rejects.jsonl", cfg.dataset.max_rejects) as rejects:
            splits = _write_splits(dataset, renderer, rejects, work, on_progress)
        _check_not_empty(cfg, splits, rejects)
        sources = [{"path": s.path, "sha256": s.sha256, "rows": s.rows} for s in dataset.sources()]
        made = {**facts, "sources": sources, "splits": splits, "rejects": rejects.summary(), "notes": dataset.notes}
        shard = work / splits["train"]["shards"][0]["file"]
        write_report(
            work / "report.html", made, samples_of_shard(shard, renderer.decode, _SAMPLES_SHOWN, split="train")
        )
        manifests.write(work, made)
        _put_in_place(work, target)
    except OSError as error:
        raise StorageError(str(target), f"cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifests.read(target)


def _write_splits(
    dataset: Dataset, renderer: Renderer, rejects: RejectLog, folder: Path, on_progress: Progress | None
) -> dict[str, dict[str, Any]]:
    """Reads and writes all rows, a batch at a time; the manifest's entry per split that has rows."""
    writers: dict[str, SplitWriter] = {}
    rows = 0
    with ExitStack() as stack:
        for batch in _batches(dataset.rows()):
            rows += len(batch)
            for split, result in _rendered(batch, renderer):
                if isinstance(result, Reject):
                    rejects.add(result, split)
                    continue
                if split not in writers:
                    writers[split] = SplitWriter(
                        folder / split, max_length=renderer.max_length, rows_per_shard=ROWS_PER_SHARD
                    )
                    stack.callback(writers[split].abandon)
                writers[split].add(result)
            if on_progress is not None:
                on_progress(rows, sum(w.tokens for w in writers.values()))
        return {split: writers[split].close() for split in SPLITS if split in writers}


def _batches(rows: Iterator[_Row]) -> Iterator[list[_Row]]:
    while batch := list(itertools.islice(rows, _BATCH_ROWS)):
        yield batch


def _rendered(batch: list[_Row], renderer: Renderer) -> Iterator[tuple[str, Sample | Reject]]:
    """The batch in its order, records replaced by samples."""
    results = iter(renderer.render([row for _, row in batch if not isinstance(row, Reject)]))
    for split, row in batch:
        yield split, row if isinstance(row, Reject) else next(results)


def _check_not_empty(cfg: PrepConfig, splits: dict[str, dict[str, Any]], rejects: RejectLog) -> None:
    where = getattr(cfg.dataset, "path", None) or cfg.dataset.name
    if not splits and not rejects.total:
        raise DataError(where, "holds no records at all")
    if not splits:
        raise DataError(where, f"all {rejects.total} rows were left out; the first:\n{rejects.first()}")
    if "train" not in splits:
        raise DataError(
            where,
            f"no record is left for training; there are {', '.join(splits)}",
            remedy="lower dataset.validation_fraction and dataset.test_fraction, or add records",
        )


def _put_in_place(work: Path, target: Path) -> None:
    """Renames the finished folder; what stood at its place is moved aside first and deleted last."""
    old = target.parent / f".{target.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)
