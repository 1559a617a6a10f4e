"""A bf16 copy of a model whose weights are quantised: training needs whole numbers to change.

Written once beside the other models of the cache, tensor by tensor, in the hub's names and layout; in memory is the
largest tensor and a constant. A changed original gets a copy of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from filelock import FileLock

from configs.errors import NoRoomError, StorageError
from train.checkpoint.files import sync
from train.export.tensors import Planned, stored_tensors, write_model
from train.models.quantised import Original
from train.models.quantised_config import without_quantisation
from train.models.quantised_weight import Quantised, Shards
from train.units import in_gib

SHARD_BYTES = 4 * 2**30
RESERVE = 64 * 2**20
"""Bytes for tokenizer, configs and headers."""
SAY_EVERY = 30.0
"""Seconds between two notes of how far it is."""
ORIGIN = "ORIGIN"
"""File that tells what a copy was made of."""
_VERSION = 1
"""Counts the ways that copies have been made; another one makes them anew."""

Note = Callable[[str], None]


def bf16_folder(original: Original, name: str, cache_dir: Path, on_note: Note, *, write: bool = True) -> Path:
    """The bf16 copy of a quantised model, made on first use.

    Args:
        original: the model.
        name: that the copy's folder begins with.
        cache_dir: where copies are kept, in ``models``.
        on_note: is told what is done, and how far it is.
        write: False: only looks; where there is no copy, the original's folder is given back.

    Raises:
        NoRoomError: the disk does not hold it.
        StorageError: the cache cannot be written.
        ModelError: a file of the original is damaged.
    """
    models = cache_dir.expanduser() / "models"
    folder = models / f"{name}-bf16-{fingerprint(original.folder)[:12]}"
    size = sum(planned.num_bytes for planned in _planned(original, Shards()))
    if folder.is_dir():
        on_note(f"model {name}: its bf16 copy is reused from {folder}")
        return folder
    told = f"model {name}: quantised ({original.method}; {original.codings})"
    if not write:
        on_note(f"{told}; `crosstune prep` or the run itself writes a bf16 copy first: {in_gib(size)} in {folder}")
        return original.folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        # One process makes it; the other ranks wait here and find it.
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():
                on_note(f"model {name}: its bf16 copy is reused from {folder}")
                return folder
            on_note(f"{told}; dequantising to bf16 once: {in_gib(size)} into {folder}")
            _sweep(folder)
            _require_room(models, size)
            _make(original, folder, size, on_note)
    except OSError as error:
        kind = NoRoomError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind("cache_dir", f"cannot write '{folder}': {error.strerror or error}") from None
    older = sorted(p.name for p in models.iterdir() if p.name.startswith(f"{name}-bf16-") and p.is_dir())
    older.remove(folder.name)
    if older:
        on_note(f"older copies in {models}, not needed by new runs: {', '.join(older)}")
    return folder


def fingerprint(folder: Path) -> str:
    """Of a model folder: names, sizes, times and headers of its weights, and the content of its other files."""
    digest = hashlib.sha256(str(_VERSION).encode())
    weights = {tensor.file for tensor in stored_tensors(folder).values()}  # others may be no such files at all
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        digest.update(f"\0{file.name}\0".encode())
        if file.suffix == ".safetensors":
            stat = file.stat()
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
            if file in weights:
                with file.open("rb") as opened:
                    (length,) = struct.unpack("<Q", opened.read(8))
                    digest.update(opened.read(length))
        elif file.suffix in (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _planned(original: Original, shards: Shards) -> list[Planned]:
    """All tensors of the copy, in the order in which the original's files have them."""

    def whole(weight: Quantised) -> tuple[tuple[Path, str], Planned]:
        planned = Planned(weight.name, weight.shape, torch.bfloat16, lambda: weight.read(shards))
        return (weight.codes.file, weight.name), planned

    made = [whole(weight) for weight in original.weights.values()]
    for stored in original.others.values():
        make = lambda stored=stored: shards.read(stored)  # noqa: E731
        made.append(((stored.file, stored.name), Planned(stored.name, stored.shape, stored.dtype, make)))
    return [planned for _, planned in sorted(made, key=lambda pair: pair[0])]


def _make(original: Original, folder: Path, size: int, on_note: Note) -> None:
    # Named after host and process: a lock may not reach other hosts, and whoever is first wins.
    partial = folder.with_name(f".{folder.name}.{socket.gethostname()}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    started = time.monotonic()
    try:
        from train.export.merged import copy_along

        copy_along(original.folder, partial, None)
        config = json.loads((original.folder / "config.json").read_text())
        (partial / "config.json").write_text(json.dumps(without_quantisation(config), indent=2) + "\n")
        (partial / ORIGIN).write_text(f"dequantised to bf16 from {original.folder.resolve()} ({original.codings})\n")
        progress = _Progress(size, on_note)
        write_model(partial, [progress.watched(each) for each in _planned(original, Shards())], SHARD_BYTES)
        _flush(partial)  # the name alone tells later runs that it is whole
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another host was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.monotonic() - started
    on_note(f"dequantised {in_gib(size)} in {seconds:.0f} s ({in_gib(int(size / max(seconds, 1e-3)))}/s)")
    if original.left_out:
        on_note(f"{len(original.left_out)} scales of activations are left out: training has no use for them")


def _flush(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            sync(opened)


class _Progress:
    """Says now and then how much is written."""

    def __init__(self, total: int, on_note: Note) -> None:
        self.total, self.done, self._note = total, 0, on_note
        self._started = self._said = time.monotonic()

    def watched(self, planned: Planned) -> Planned:
        def make() -> torch.Tensor | Iterator[torch.Tensor]:
            self._say()
            made = planned.make()
            self.done += planned.num_bytes
            return made

        return Planned(planned.name, planned.shape, planned.dtype, make)

    def _say(self) -> None:
        now = time.monotonic()
        if now - self._said >= SAY_EVERY and self.done:
            self._said = now
            left = (now - self._started) * (self.total - self.done) / self.done
            self._note(f"{in_gib(self.done)} of {in_gib(self.total)} dequantised, about {left:.0f} s left")


def _require_room(models: Path, size: int) -> None:
    needed = size + size // 100 + RESERVE
    free = shutil.disk_usage(models).free
    if free < needed:
        raise NoRoomError(
            "cache_dir",
            f"the bf16 copy of the model needs {in_gib(needed)} in {models}, and {in_gib(free)} are free",
            remedy=f"free {in_gib(needed - free)} or more there, or cache_dir=FOLDER on a larger disk",
        )


def _sweep(folder: Path) -> None:
    """Removes what killed processes of this host left of this copy."""
    begin = f".{folder.name}.{socket.gethostname()}."
    for left in folder.parent.iterdir():
        pid = left.name.removeprefix(begin)
        if left.name.startswith(begin) and pid.isdigit() and not _lives(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
