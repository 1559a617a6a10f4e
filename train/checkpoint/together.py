"""Work whose failure on one rank is raised on all: else the others would wait for that rank for ever."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import CheckpointError, CrosstuneError, NoRoomError, OutOfMemoryError, RunFailedError, StorageError
from train.engine.base import World

FULL = {errno.ENOSPC, errno.EDQUOT}
KINDS: dict[str, type[CrosstuneError]] = {
    kind.__name__: kind for kind in (CheckpointError, NoRoomError, OutOfMemoryError, StorageError)
}
"""What another rank's fault is raised as; what nobody foresaw is a `RunFailedError`."""


class LostContactError(RunFailedError):
    """The other ranks no longer answer, so that nothing could be agreed."""


def together(world: World, where: Path, work: Callable[[], Any]) -> list[Any]:
    """Runs `work` on this rank and waits for all.

    Args:
        world: called on all its ranks.
        where: place to name where an error of the system names none.
        work: returns a JSON value.

    Returns:
        What it returned on each rank, by rank.

    Raises:
        NoRoomError: a disk or a quota is full, on every rank though it be that of one.
        StorageError: another error of the system.
        CrosstuneError: what `work` raised on the lowest rank where it failed; that rank is named on the others.
        LostContactError: a rank has gone.
    """
    answer: dict[str, Any] = {}
    own: Exception | None = None
    try:
        answer["result"] = work()
    except OSError as error:
        own = _storage_error(error, where)
        own.__cause__ = error
    except Exception as error:
        own = error
    if own is not None:
        answer["fault"] = _described(own, where)
    try:
        answers = [json.loads(data) for data in world.all_gather_bytes(json.dumps(answer).encode())]
    except RuntimeError as error:  # gloo's
        raise own or LostContactError(str(where), f"rank {world.rank} lost the other ranks: {error}") from error
    faults = [(rank, answer["fault"]) for rank, answer in enumerate(answers) if "fault" in answer]
    if own is not None and (faults[0][0] == world.rank or not isinstance(own, CrosstuneError)):
        raise own
    if faults:
        raise _of_another(*faults[0])
    return [answer["result"] for answer in answers]


def _storage_error(error: OSError, where: Path) -> StorageError:
    place = str(error.filename or where)
    if error.errno in FULL:
        remedy = "free space there; what was saved before is whole, and `crosstune resume` goes on from it"
        return NoRoomError(place, f"the disk is full: {error.strerror}", remedy=remedy)
    return StorageError(place, f"cannot be written: {error.strerror or error}")


def _described(fault: Exception, where: Path) -> dict[str, Any]:
    host = socket.gethostname()
    if not isinstance(fault, CrosstuneError):
        found = f"{type(fault).__name__}: {fault}"
        return {"kind": "", "host": host, "where": str(where), "found": found, "allowed": None, "remedy": None}
    parts = {"where": fault.where, "found": fault.found, "allowed": fault.allowed, "remedy": fault.remedy}
    return {"kind": type(fault).__name__, "host": host, **parts}


def _of_another(rank: int, fault: dict[str, Any]) -> CrosstuneError:
    kind = KINDS.get(fault["kind"], RunFailedError)
    found = f"{fault['found']} (rank {rank} on {fault['host']})"
    return kind(fault["where"], found, allowed=fault["allowed"], remedy=fault["remedy"])
