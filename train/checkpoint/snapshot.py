"""What one rank puts into a checkpoint: as it lies in the engine, or copied to the host while the steps go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from configs.errors import first_line
from train.checkpoint.layout import tensor_key
from train.checkpoint.rng import rng_states
from train.devices.base import Device
from train.engine.base import Engine, Fragment

CHUNK = 2**26
"""Bytes that are moved at a time. A power of two, to which page-locked memory is rounded up."""
Tensors = Sequence[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Share:
    """One rank's pieces of parameters and optimizer state, and its random generators, at one moment."""

    pieces: list[dict[str, Any]]
    """Name, shape, kinds, scalars, offset and numel of each fragment."""
    entries: list[tuple[str, torch.dtype, int]]
    """Key, dtype and number of elements of each tensor of the file."""
    chunks: Callable[[], Iterator[memoryview]]
    """The tensors' bytes, one after the other."""

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(numel * dtype.itemsize for _, dtype, numel in self.entries)


def live_share(engine: Engine) -> tuple[Share, Tensors]:
    """What this rank answers for, read from the engine when the chunks are drawn.

    Memory: a chunk at a time on the host.

    Returns:
        The share, and the tensors themselves, those of fp32 first.

    Raises:
        CheckpointError: the optimizer's state has no place in a checkpoint.
    """
    fragments = engine.fragments(owned=True)
    tensors = [(tensor_key(f.name, kind, f.offset), f.view(kind)) for f in fragments for kind in f.kinds]
    tensors += [(f"rng:{name}", data) for name, data in rng_states(engine.device).items()]
    entries = [(key, tensor.dtype, tensor.numel()) for key, tensor in tensors]
    return Share([_describe(f) for f in fragments], entries, lambda: _chunks(tensors)), tensors


def _describe(fragment: Fragment) -> dict[str, Any]:
    return {
        "name": fragment.name,
        "shape": fragment.shape,
        "kinds": fragment.kinds,
        "scalars": fragment.scalars,
        "offset": fragment.offset,
        "numel": fragment.numel,
    }


def _chunks(tensors: Tensors) -> Iterator[memoryview]:
    for _, tensor in tensors:
        count = CHUNK // tensor.element_size()
        for at in range(0, tensor.numel(), count):
            yield tensor.detach()[at : at + count].cpu().contiguous().numpy().view(np.uint8).data


class HostCopy:
    """Host memory that a share is copied to, used again by every save.

    Memory: the share's bytes, in chunks; page-locked beside an accelerator, whose copies then run at full speed.

    Args:
        device: whose tensors are copied.
        note: takes a line for the user.
    """

    def __init__(self, device: Device, note: Callable[[str], None]) -> None:
        self._device, self._note = device, note
        self._page_locked = device.torch_type != "cpu"
        self._blocks: list[torch.Tensor] = []

    @property
    def capacity(self) -> int:
        """Bytes held."""
        return sum(block.numel() for block in self._blocks)

    def take(self, share: Share, tensors: Tensors) -> Share:
        """Copies a share as it is now; whoever changes the tensors afterwards does not change it.

        Args:
            share: of `live_share`.
            tensors: its tensors, those of 4 bytes an element first.

        Returns:
            The share, valid until the next call.

        Raises:
            RuntimeError: there is no memory for it.
        """
        if self.capacity < share.nbytes:
            self._blocks = []
            self._blocks = [self._block(min(CHUNK, share.nbytes - at)) for at in range(0, share.nbytes, CHUNK)]
        at = 0
        for _, tensor in tensors:
            done, size = 0, tensor.element_size()
            while done < tensor.numel():
                block, begin = divmod(at, CHUNK)
                count = min(tensor.numel() - done, (CHUNK - begin) // size)
                place = self._blocks[block][begin : begin + count * size].view(tensor.dtype)
                place.copy_(tensor.detach()[done : done + count], non_blocking=True)
                done, at = done + count, at + count * size
        self._device.synchronize()
        return replace(share, chunks=lambda: self._filled(at))

    def _filled(self, size: int) -> Iterator[memoryview]:
        for at, block in zip(range(0, size, CHUNK), self._blocks, strict=False):
            yield block[: size - at].numpy().data

    def _block(self, size: int) -> torch.Tensor:
        if self._page_locked:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:  # no such memory for this device, or no more of it may be locked
                self._page_locked = False
                self._note(
                    f"checkpoint: no page-locked memory ({first_line(error)}), so the steps wait longer for copies"
                )
        return torch.empty(size, dtype=torch.uint8)
