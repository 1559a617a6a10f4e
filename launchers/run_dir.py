"""The folder of a run: made for a new one, found again for `resume`."""

from __future__ import annotations

import itertools
import os
import shlex
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from configs.errors import CheckpointError, ConfigError, RunFailedError, StorageError
from configs.schema.roots import TrainConfig
from launchers.stages import is_first_rank

C = TypeVar("C", bound=TrainConfig)

LOCK = ".lock"
LOCK_SECONDS = 240.0
"""A server of NFS gives a dead client's lock away after its lease (90 s); a machine that is merely cut off ends its
ranks after a few time-outs."""
SIGNS_OF_A_RUN = ("metrics.jsonl", "checkpoints")
"""There from the first step on. A folder that a fault left before that may be used again."""


def with_run_dir(cfg: C) -> C:
    """The config with the run's folder filled in, as an absolute path.

    Raises:
        ConfigError: ranks of an outer launcher would each choose a folder of their own.
    """
    if cfg.run_dir is not None:
        return replace(cfg, run_dir=str(Path(cfg.run_dir).expanduser().resolve()))
    if "RANK" in os.environ:
        raise ConfigError(
            "run_dir",
            "not set, while an outer torchrun starts several processes that must share one folder",
            remedy="add run_dir=FOLDER",
        )
    return replace(cfg, run_dir=str(fresh_folder(cfg.name)))


def fresh_folder(name: str) -> Path:
    """A folder ``runs/<name>-<date>-<time>`` of the working folder that is not there yet."""
    stamped = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (stamped if number == 1 else f"{stamped}-{number}" for number in itertools.count(1))
    return next(path for path in (Path("runs", n).resolve() for n in names) if not path.exists())


@contextmanager
def new_run(folder: Path) -> Iterator[None]:
    """Makes the folder before anything slow starts; takes it away again if it is still empty after a fault.

    Raises:
        ConfigError: it holds a run already.
        StorageError: it cannot be made or written.
    """
    if is_first_rank() and any((folder / name).exists() for name in SIGNS_OF_A_RUN):
        saved = any(folder.glob("checkpoints/step-*[0-9]/COMPLETE"))
        remedy = f"crosstune resume {shlex.quote(str(folder))}, or name another run_dir"
        raise ConfigError(
            "run_dir",
            f"'{folder}' holds a run already" + ("" if saved else ", one without a checkpoint"),
            remedy=remedy if saved else "name another run_dir, or remove the folder",
        )
    make_writable(folder, "run_dir")
    try:
        with alone_in(folder):
            yield
    finally:
        if is_first_rank():
            remove_if_empty(folder)


@contextmanager
def alone_in(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Holds the run for this command; ranks other than the first of an outer launcher leave that to it.

    Args:
        folder: of the run.
        patient: a job's next attempt may begin while the lock is still that of the machine that was lost.

    Raises:
        ConfigError: another command is at work in the folder.
        RunFailedError: it still is after `LOCK_SECONDS`.
    """
    if not is_first_rank():
        yield
        return
    try:
        with held(folder / LOCK, LOCK_SECONDS if patient else 0.0):
            yield
    except LockedError:
        found, remedy = f"another crosstune is at work in '{folder}'", "wait for it, stop it, or name another run_dir"
        if patient:
            raise RunFailedError("run_dir", f"{found}, after {LOCK_SECONDS:.0f} s still", remedy=remedy) from None
        raise ConfigError("run_dir", found, remedy=f"{remedy}; {FREE_AGAIN.format(folder / LOCK)}") from None


class LockedError(Exception):
    """Somebody else holds a lock."""


FREE_AGAIN = "if none is at work there, on any machine, remove '{}'"
"""A file system without locks (Lustre without ``-o flock``) keeps that of a process that was killed on another host."""


@contextmanager
def held(lock: Path, seconds: float = 0.0) -> Iterator[None]:
    """Holds a lock file; says so where it has to wait.

    Args:
        lock: the file.
        seconds: to wait for it.

    Raises:
        LockedError: somebody else holds it.
        StorageError: it cannot be made.
    """
    own = FileLock(lock)
    try:
        try:
            own.acquire(blocking=False)
        except Timeout:
            if seconds:
                print(f"waits up to {seconds:.0f} s for another crosstune to let go of {lock}", flush=True)
            own.acquire(timeout=seconds)
    except Timeout:
        raise LockedError from None
    except OSError as error:
        raise StorageError(str(lock), f"cannot be locked: {error.strerror or error}") from None
    try:
        yield
    finally:
        own.release()


def remove_if_empty(folder: Path) -> None:
    """Takes a folder away in which nothing but a lock is left."""
    with suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
        folder.rmdir()


def make_writable(folder: Path, key: str) -> None:
    """Makes a folder and tries it with a file.

    Raises:
        StorageError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".try-"):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            key, f"cannot write '{folder}': {reason}", remedy=f"name another folder with {key}=..."
        ) from None


def existing_run(folder: Path) -> Path:
    """The absolute path of a run's folder.

    Raises:
        CheckpointError: there is no such folder, or it is not that of a run.
    """
    remedy = "name a folder made by `crosstune train` or `crosstune run`"
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such folder", remedy=remedy)
    if not (folder / "resolved.yaml").is_file():
        raise CheckpointError(str(folder), "not the folder of a run (no resolved.yaml)", remedy=remedy)
    return folder.resolve()
