"""Whether all ranks see one folder of checkpoints, or each machine has one of its own; and who acts for a folder."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, StorageError
from configs.schema.outputs import Storage
from train.checkpoint.together import together
from train.engine.base import World

LOOK_SECONDS = 10
"""A network file system may show a new file to other machines only after a while."""
MARK = ".seen-by-"


def resolve_storage(wanted: Storage, folder: Path, world: World, note: Callable[[str], None]) -> Storage:
    """What `checkpoint.storage` means here; called on all ranks.

    Args:
        wanted: the setting.
        folder: the run's ``checkpoints``; made where it is not there.
        world: the ranks.
        note: takes a line for the user.

    Raises:
        StorageError: the folder cannot be made or written; on every rank.
        ConfigError: it should be shared and is not.
    """
    together(world, folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    if wanted is Storage.per_node or world.size == 1:
        return Storage.per_node if wanted is Storage.per_node else Storage.shared
    answers = _look(folder, world, patience=LOOK_SECONDS)
    blind = [(rank, answer["host"]) for rank, answer in enumerate(answers) if 0 not in answer["sees"]]
    alone = blind or [(rank, a["host"]) for rank, a in enumerate(answers) if a["sees"] != answers[0]["sees"]]
    if not alone:
        return Storage.shared
    who = f"{len(alone)} rank(s), the first being rank {alone[0][0]} on {alone[0][1]}"
    if wanted is Storage.shared:
        raise ConfigError(
            "checkpoint.storage",
            f"shared, but {who}, do not see what rank 0 on {answers[0]['host']} writes to {folder}",
            remedy="checkpoint.storage=per_node, or a run_dir on a file system that every machine mounts",
        )
    note(f"checkpoint.storage: {who}, do not see rank 0's {folder}, so each machine keeps what its own ranks write")
    return Storage.per_node


def owner_of(folder: Path, world: World, storage: Storage) -> int:
    """The rank that makes, completes and clears the checkpoints in this rank's folder; called on all ranks.

    The first rank of a machine, unless machines see one folder though each was said to have its own: then only one of
    them may act in it.
    """
    if storage is Storage.shared or world.size == 1:
        return 0
    together(world, folder, lambda: folder.mkdir(parents=True, exist_ok=True))
    sees: list[int] = _look(folder, world, patience=0)[world.rank]["sees"]
    return min(sees)


def _look(folder: Path, world: World, *, patience: float) -> list[dict[str, Any]]:
    """Each machine's first rank leaves a mark, and every rank says whose marks it sees within `patience` seconds."""
    token = world.broadcast_bytes(uuid.uuid4().hex.encode()).decode()
    mine = folder / f"{MARK}{token}-{world.rank}"
    leads = [rank for rank, leads in enumerate(together(world, folder, lambda: world.leads_node)) if leads]
    expected = {f"{MARK}{token}-{rank}": rank for rank in leads}

    def seen() -> dict[str, Any]:
        began = time.monotonic()
        while True:
            # A listing asks the server, where a look-up may be answered from a cache.
            ranks = sorted(expected[name] for name in os.listdir(folder) if name in expected)
            waited = time.monotonic() - began
            if ranks == leads or (ranks and waited >= patience):
                return {"host": socket.gethostname(), "sees": ranks}
            if waited > LOOK_SECONDS:
                raise StorageError(str(folder), "is not the folder that the first rank of this machine sees")
            time.sleep(0.1)

    try:
        together(world, folder, lambda: mine.touch() if world.leads_node else None)
        return together(world, folder, seen)
    finally:
        mine.unlink(missing_ok=True)
