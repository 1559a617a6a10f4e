"""Whether all ranks see one folder of checkpoints, or each machine has one of its own."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from configs.schema.outputs import Storage
from train.engine.base import World

LOOK_SECONDS = 10
"""A network file system may show a new file to other machines only after a while."""


def resolve_storage(wanted: Storage, folder: Path, world: World, note: Callable[[str], None]) -> Storage:
    """What `checkpoint.storage` means here; called on all ranks.

    Args:
        wanted: the setting.
        folder: the run's ``checkpoints``; made where it is not there.
        world: the ranks.
        note: takes a line for the user.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if wanted is not Storage.auto:
        return wanted
    name = world.broadcast_bytes(f".seen-by-all-{uuid.uuid4().hex}".encode()).decode()
    if world.rank == 0:
        (folder / name).touch()
    world.barrier()
    missing = sum(world.all_reduce_sum([float(not _sees(folder, name))]))
    if world.rank == 0:
        (folder / name).unlink()
    if not missing:
        return Storage.shared
    note(f"checkpoint.storage: {int(missing)} rank(s) do not see rank 0's folder, so each machine keeps its own pieces")
    return Storage.per_node


def _sees(folder: Path, name: str) -> bool:
    give_up = time.monotonic() + LOOK_SECONDS
    while name not in os.listdir(folder):  # a listing asks the server, where a look-up may be answered from a cache
        if time.monotonic() > give_up:
            return False
        time.sleep(0.1)
    return True
