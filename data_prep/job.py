"""What a preparation is to make, under which name, and whether that is there already."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import DataError, StorageError
from configs.schema.roots import PrepConfig
from data_prep import manifest as manifests
from data_prep.dataset import Dataset
from data_prep.hashes import SourceHashes
from data_prep.images import FOLDER, Images, changed_images
from data_prep.render import Renderer
from data_prep.tokenizer import load_tokenizer, template_sha256, template_text, tokenizer_sha256
from data_prep.vision import vision_of, why_blind

logger = logging.getLogger(__name__)

_WORDS_REMEMBERED = 2**17
"""They take 30 MB in each worker."""


def template_path(cfg: PrepConfig) -> Path | None:
    """The file that replaces the model's chat template, if there is one."""
    return Path(cfg.template.path) if cfg.template.path is not None else None


def renderer_for(cfg: PrepConfig, model_dir: Path, store: Path | None = None) -> Callable[[], Renderer]:
    """Makes renderers, all with one tokenizer.

    Args:
        cfg: the whole config.
        model_dir: folder of the model.
        store: folder to keep images in; None: they are only looked at.

    Raises:
        ModelError: the model folder has no tokenizer that can be loaded.
    """
    tokenizer = load_tokenizer(model_dir, template=template_path(cfg), trust_remote_code=cfg.model.trust_remote_code)
    _remember_more_words(tokenizer)
    images = None
    if (vision := vision_of(model_dir)) is not None:
        base = Path(cfg.image_folder).expanduser() if cfg.image_folder else None
        images = Images(vision, base=base, max_pixels=cfg.max_image_pixels, store=store)
    return partial(
        Renderer,
        tokenizer,
        max_length=cfg.max_length,
        model_name=str(model_dir),
        too_long=cfg.too_long,
        template_kwargs=cfg.template.kwargs,
        images=images,
        blind="" if images else why_blind(model_dir),
    )


def _remember_more_words(tokenizer: Any) -> None:
    """The tokens of a word are kept for when it comes again, of 10,000 words by default; more is a tenth faster."""
    resize = getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "_resize_cache", None)
    if resize is not None:
        resize(_WORDS_REMEMBERED)


class Job:
    """What is to be made, and where."""

    def __init__(self, cfg: PrepConfig, model_dir: Path, dataset: Dataset, out: Path | None) -> None:
        self.cfg, self.model_dir, self.dataset, self._out = cfg, model_dir, dataset, out
        cache = Path(cfg.cache_dir).expanduser()
        self.facts: dict[str, Any] = {
            "dataset": {"name": cfg.dataset.name, "license": dataset.license},
            "tokenizer": {"sha256": tokenizer_sha256(model_dir)},
            "template_sha256": template_sha256(template_text(model_dir, template_path(cfg))),
            "max_length": cfg.max_length,
            "too_long": cfg.too_long.value,
        }
        self._settings = {
            **self.facts,
            "reader": cfg.dataset._target_,
            "settings": dataset.settings(),
            "template": cfg.template.kwargs,
            "clean": manifests.plain(cfg.clean),
            "dedup": manifests.plain(cfg.dedup),
        }
        vision = vision_of(model_dir)
        self.vision: dict[str, Any] = {}
        """What the images of samples depend on; nothing for a model that does not see."""
        if vision is not None:
            self.vision = {"processor_sha256": vision.sha256, "max_image_pixels": cfg.max_image_pixels}
            files = [Path(part.source.path) for part in dataset.parts()]
            roots = [Path(cfg.image_folder)] if cfg.image_folder else [file.parent for file in files]
            # The same records beside other images are other data.
            folders = sorted({str(root.expanduser().absolute()) for root in roots})
            self._settings["images"] = {**self.vision, "folders": folders}
        self.hashes = SourceHashes(dataset.parts(), cache / "hashes")
        # The hidden name does not depend on the content: what was made of an older content is found and replaced.
        paths = [part.source.path for part in dataset.parts()]
        key = manifests.fingerprint({**self._settings, "paths": paths})
        name = out.name if out else f"{cfg.dataset.name}-{key[:12]}"
        self._parent = out.expanduser().parent if out else cache / "prepared"
        self.work = self._parent / f".{name}.making"
        """The folder under its hidden name."""
        self.binding = manifests.fingerprint(
            {**self._settings, "stamps": self.hashes.stamps, "executor": cfg.executor._target_}
        )
        """Of what an interrupted preparation must share with this one to be of use."""
        if out is not None:
            _refuse_foreign(out.expanduser())

    def fingerprint(self) -> str:
        """Of all that decides the content; waits for the hashes of the sources."""
        sources = [[p.source.path, sha] for p, sha in zip(self.dataset.parts(), self.hashes.result(), strict=True)]
        return manifests.fingerprint({**self._settings, "sources": sources})

    def target(self) -> Path:
        """The folder to make; waits for the hashes of the sources."""
        if self._out is not None:
            return self._out.expanduser()
        return self._parent / f"{self.cfg.dataset.name}-{self.fingerprint()[:12]}"

    def found(self) -> dict[str, Any] | None:
        """The manifest of what stands at the target, if it is what is wanted; None if it may be (re)made.

        Raises:
            DataError: something else stands there and must not be replaced; or more rows of it were at fault than may
                be now.
        """
        found = _reusable(self.target(), self.fingerprint(), may_replace=self._out is None or self.cfg.overwrite)
        if found is not None and (changed := changed_images(self.target(), found)):
            logger.info("%s: %s; preparing again", self.target(), changed)
            return None
        if found is not None:
            _check_faults(self.target(), found["rejects"], self.cfg.dataset.max_rejects)
        return found

    @property
    def store(self) -> Path:
        """The folder that images are kept in."""
        return self.work / FOLDER

    def put_in_place(self) -> None:
        """Renames the finished folder; what stood at its place is moved aside first and deleted last."""
        target = self.target()
        old = target.parent / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        self.work.rename(target)
        shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One preparation of a folder at a time; who waits finds the other's result."""
        from filelock import FileLock, Timeout

        try:
            self._parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.work.with_suffix(".lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("another process is preparing the same data; waiting for it")
                lock.acquire()
        except OSError as error:
            raise StorageError(str(self._parent), f"cannot be written: {error.strerror or error}") from error
        try:
            yield
        finally:
            lock.release()


def _check_faults(target: Path, rejects: dict[str, Any], most: int) -> None:
    """What was prepared under a higher `max_rejects` is not handed out under a lower one."""
    faults = rejects.get("faults", 0)
    if 0 <= most < faults:
        raise DataError(
            str(target),
            f"holds this data, but {faults:,} rows were left out for faults, more than dataset.max_rejects={most}",
            remedy=f"mend the rows that {target / 'rejects.jsonl'} names, or raise dataset.max_rejects",
        )


def _is_empty(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _refuse_foreign(target: Path) -> None:
    if not _is_empty(target) and not manifests.is_prepared(target):
        raise DataError(
            str(target), "holds something that is no prepared data; it is left alone", remedy="choose another out"
        )


def _reusable(target: Path, fingerprint: str, *, may_replace: bool) -> dict[str, Any] | None:
    if _is_empty(target):
        return None
    _refuse_foreign(target)
    try:
        found = manifests.read(target)
    except DataError:
        if may_replace:
            return None
        raise
    if found["fingerprint"] == fingerprint:
        return found
    if may_replace:
        return None
    raise DataError(
        str(target),
        f"holds other prepared data ('{found['dataset']['name']}', {found['fingerprint'][:12]})",
        remedy="overwrite=true to replace it, or choose another out",
    )
