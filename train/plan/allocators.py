"""How much memory an allocator holds for what a tape takes: more than what lives, for not every hole fits a request.

On the host the tape is played to this machine's own malloc (`replay`). Of glibc's malloc three things matter: a tensor
is aligned to 64 bytes, so that a hole of its own size does not take the next one of that size; small objects that
belong to a tensor lie between the holes and keep them apart; and a run has it keep what is freed
(`train.devices.cpu.MALLOC`).

On an accelerator torch's caching allocator rounds sizes up and keeps its segments; the figures are those of torch 2.13
(``c10/core/AllocatorConfig.h`` and the allocators beside it), which vendors' plugins took over.
"""

from __future__ import annotations

import json
import subprocess
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence, Set
from pathlib import Path

from train.devices.cpu import MALLOC
from train.plan.trace import FREED, Event

SECONDS = 120
MIB = 2**20
SMALLEST = 512
"""Bytes that every size is rounded up to a multiple of."""
SMALL = MIB
"""Up to so many bytes a block is cut from a segment of `SMALL_SEGMENT`."""
SMALL_SEGMENT = 2 * MIB
MIDDLE = 10 * MIB
"""Up to so many, from one of `MIDDLE_SEGMENT`; a larger block has a segment of its own, a multiple of 2 MiB."""
MIDDLE_SEGMENT = 20 * MIB


def host_peak(events: Sequence[Event], objects: Set[int] = frozenset()) -> int | None:
    """The most bytes that malloc holds for these events.

    Args:
        events: of a tape.
        objects: numbers that are no tensors: taken as they are.

    Returns:
        None where there is no glibc here, or it has not so much address space.
    """
    if not sys.platform.startswith("linux"):
        return None
    script = Path(__file__).with_name("replay.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(script)],
            input=json.dumps([list(events), sorted(objects), MALLOC]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        return int(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def caching_peak(events: Sequence[Event]) -> int:
    """The most bytes that torch's caching allocator reserves: best fit, with its segments kept until the end."""
    pools = {True: _Pool(), False: _Pool()}
    places: dict[int, tuple[_Pool, tuple[int, int, int]]] = {}
    for number, size in events:
        if size == FREED:
            pool, block = places.pop(number)
            pool.give(block)
        else:
            rounded = max(SMALLEST, -(-size // SMALLEST) * SMALLEST)
            pool = pools[rounded <= SMALL]
            places[number] = (pool, pool.take(rounded, small=rounded <= SMALL))
    return sum(pool.reserved for pool in pools.values())


class _Pool:
    """Free blocks of one pool, as (size, segment, offset)."""

    def __init__(self) -> None:
        self.reserved = 0
        self._segments = 0
        self._free: list[tuple[int, int, int]] = []
        self._starts: dict[tuple[int, int], int] = {}
        self._ends: dict[tuple[int, int], int] = {}

    def take(self, size: int, small: bool) -> tuple[int, int, int]:
        at = bisect_left(self._free, (size, -1, -1))
        if at < len(self._free):
            found = self._free.pop(at)
            self._forget(found)
        else:
            whole = SMALL_SEGMENT if small else MIDDLE_SEGMENT if size < MIDDLE else -(-size // (2 * MIB)) * 2 * MIB
            self.reserved += whole
            self._segments += 1
            found = (whole, self._segments, 0)
        have, segment, offset = found
        rest = have - size
        if rest >= SMALLEST if small else rest > SMALL:
            self._keep((rest, segment, offset + size))
            return size, segment, offset
        return found

    def give(self, block: tuple[int, int, int]) -> None:
        size, segment, offset = block
        if (before := self._ends.get((segment, offset))) is not None:
            self._drop((before, segment, offset - before))
            size, offset = size + before, offset - before
        if (after := self._starts.get((segment, offset + size))) is not None:
            self._drop((after, segment, offset + size))
            size += after
        self._keep((size, segment, offset))

    def _keep(self, block: tuple[int, int, int]) -> None:
        size, segment, offset = block
        insort(self._free, block)
        self._starts[segment, offset] = size
        self._ends[segment, offset + size] = size

    def _drop(self, block: tuple[int, int, int]) -> None:
        self._free.pop(bisect_left(self._free, block))
        self._forget(block)

    def _forget(self, block: tuple[int, int, int]) -> None:
        size, segment, offset = block
        del self._starts[segment, offset], self._ends[segment, offset + size]
