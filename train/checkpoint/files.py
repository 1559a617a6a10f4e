"""Files that survive a power cut: written, hashed and synced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from train.checkpoint.layout import STALE

DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
SYNC_BYTES = 2**30
"""So often a long file is synced on the way: its progress can be seen, and the last sync is not one long silence."""


def write_safetensors(
    path: Path,
    entries: Sequence[tuple[str, torch.dtype, int]],
    chunks: Iterable[memoryview],
    on_chunk: Callable[[], None] = lambda: None,
) -> str:
    """Writes 1-d tensors, chunk after chunk, and syncs the file.

    The library's own writer wants all tensors in host memory at once; the format is a length, a JSON header and the
    data (https://github.com/huggingface/safetensors#format).

    Args:
        path: of the file.
        entries: key, dtype and number of elements of each tensor.
        chunks: their bytes, one tensor after the other, cut anywhere.
        on_chunk: called after each chunk.

    Returns:
        SHA-256 of the file.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {}
    at = 0
    for key, dtype, numel in entries:
        size = numel * dtype.itemsize
        header[key] = {"dtype": DTYPES[dtype], "shape": [numel], "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    unsynced = 0
    with path.open("wb") as file:
        for chunk in (struct.pack("<Q", len(head)), head):
            digest.update(chunk)
            file.write(chunk)
        for data in chunks:
            digest.update(data)
            file.write(data)
            at -= data.nbytes
            unsynced += data.nbytes
            if unsynced >= SYNC_BYTES:
                sync(file)
                unsynced = 0
            on_chunk()
        assert at == 0, f"{path}: {at} bytes too few"
        sync(file)
    return digest.hexdigest()


def write_synced(path: Path, content: bytes) -> None:
    """Writes a whole file."""
    with path.open("wb") as file:
        file.write(content)
        sync(file)


def sync(file: BinaryIO) -> None:
    """Makes what was written to a file durable."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Removes a folder.

    It is renamed first, so that a checkpoint half removed is never taken for a whole one. What a file system keeps
    because somebody still has it open is left under that name, for `clear_torn` to try again.

    Raises:
        OSError: it cannot be renamed.
    """
    stale = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{STALE}")
    path.rename(stale)
    shutil.rmtree(stale, ignore_errors=True)
