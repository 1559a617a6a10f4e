"""Files that travel from rank to rank, in chunks, over the group that carries host values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from configs.errors import CheckpointError
from train.checkpoint.files import sync, sync_folder
from train.checkpoint.layout import StoredFile, way_back
from train.engine.base import World

CHUNK_BYTES = 2**24
"""So much memory a transfer takes on either side."""
INCOMING = ".incoming"
"""Suffix of a file that is not whole yet."""


def send_file(world: World, path: Path, facts: StoredFile, to: int) -> None:
    """Sends a file to another rank, which must call `receive_file`.

    As many chunks as the index promises, whatever happens: the receiver counts on them.

    Args:
        world: both ranks'.
        path: of the file.
        facts: what the index says of it.
        to: the other rank.

    Raises:
        CheckpointError: it cannot be read; once all chunks are sent.
    """
    fault: OSError | None = None
    with ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("rb"))
        except OSError as error:
            fault = error
        for size in _chunks(facts.bytes):
            data = b""
            if fault is None:
                try:
                    data = file.read(size)
                except OSError as error:
                    fault = error
            world.send(torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8), to)
    if fault is not None:
        raise CheckpointError(str(path), f"cannot be read: {fault.strerror or fault}", remedy=way_back(path.parent))


def receive_file(world: World, path: Path, facts: StoredFile, source: int) -> None:
    """Takes a file that another rank sends: all chunks, also when they cannot be written.

    Args:
        world: both ranks'.
        path: of the file; it gets this name when its hash fits.
        facts: what the index says of it.
        source: the other rank.

    Raises:
        OSError: it cannot be written.
        CheckpointError: it arrived damaged.
    """
    incoming = path.with_name(path.name + INCOMING)
    fault: OSError | None = None
    digest = hashlib.sha256()
    with ExitStack() as stack:
        try:
            file = stack.enter_context(incoming.open("wb"))
        except OSError as error:
            fault = error
        for size in _chunks(facts.bytes):
            buffer = torch.empty(size, dtype=torch.uint8)
            world.receive(buffer, source)
            data = buffer.numpy().data
            digest.update(data)
            if fault is None:
                try:
                    file.write(data)
                except OSError as error:
                    fault = error
        if fault is None:
            sync(file)
    fits = digest.hexdigest() == facts.sha256
    if fault is not None or not fits:
        incoming.unlink(missing_ok=True)
        raise fault or CheckpointError(
            str(path),
            f"as rank {source}'s machine has it, does not match its SHA-256 in the index; host {facts.host} wrote it",
            remedy=way_back(path.parent),
        )
    incoming.rename(path)
    sync_folder(path.parent)


def _chunks(total: int) -> Iterator[int]:
    for at in range(0, total, CHUNK_BYTES):
        yield min(CHUNK_BYTES, total - at)
