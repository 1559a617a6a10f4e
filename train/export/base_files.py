"""The base's weights, read once from the first byte to the last and hashed on the way.

What is exported is then what was hashed, and a model that is larger than the memory is read from its disk only once.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

import numpy as np
import torch

from train.export.digest import Digest
from train.export.tensors import Stored

BLOCK_BYTES = 1 << 20
"""Read, converted and written at a time, in whole rows: small enough for a processor's cache."""


class BaseFiles:
    """Gives out the tensors of `stored_tensors` in just that order, each exactly once."""

    def __init__(self) -> None:
        self.hashes: dict[str, str] = {}
        """Name of each file that was read to its end -> SHA-256."""
        self._path: Path | None = None
        self._file: BufferedReader | None = None
        self._digest = Digest()
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def rows(self, tensor: Stored) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Its values in blocks of rows (of its first dimension).

        A block is overwritten when the one after the next is read; by then the bytes have been hashed.

        Yields:
            First row, row after the last, values ``[rows, ...]``; a scalar is one row.
        """
        file = self._open(tensor.file)
        shape = tensor.shape or (1,)
        row_bytes = math.prod(shape[1:]) * tensor.dtype.itemsize
        step = max(1, BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            data = self._read(file, (stop - start) * row_bytes)
            yield start, stop, torch.from_numpy(data).view(tensor.dtype).view(stop - start, *shape[1:])

    def _read(self, file: BufferedReader, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        self._buffers.reverse()
        if self._buffers[0].size < size:
            self._buffers[0] = np.empty(max(size, BLOCK_BYTES), np.uint8)
        data = self._buffers[0][:size]
        if file.readinto(data.data) != size:
            raise OSError(5, "shorter than its header says", str(self._path))
        self._digest.update(data.data)
        return data

    def _open(self, path: Path) -> BufferedReader:
        if path != self._path or self._file is None:
            self.close()
            assert path.name not in self.hashes, "a tensor out of turn"
            self._path, self._file, self._digest = path, path.open("rb"), Digest()
            head = self._file.read(8)
            self._digest.update(head)
            self._digest.update(self._file.read(struct.unpack("<Q", head)[0]))
        return self._file

    def close(self) -> None:
        """Ends the file that is open; its hash is known now."""
        if self._file is not None and self._path is not None:
            if not self._file.read(1):
                self.hashes[self._path.name] = self._digest.hexdigest()
            self._file.close()
            self._file = None
        self._digest.close()
