"""Plays allocations to this machine's malloc and tells how much it holds at the most. A script; needs no package.

Standard input: a JSON list of [number, bytes], with -1 where the piece is freed. Only address space is taken: no page
is written to. Run as a file, so that it starts in a blink and its heap is its own.
"""

from __future__ import annotations

import ctypes
import json
import sys

ALIGNMENT = 64
"""Of torch's host tensors (``c10/core/alignment.h``)."""
SMALL = 48
"""Bytes of an object beside each tensor (its storage, shape, node of the graph) that lives as long as it."""


class Mallinfo2(ctypes.Structure):
    """See mallinfo2(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def main() -> None:
    """Prints the most bytes that malloc held beyond what it held before."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]

    def held() -> int:
        found = libc.mallinfo2()
        return int(found.arena + found.hblkhd)

    events = json.load(sys.stdin)
    before, most = held(), 0
    live: dict[int, tuple[ctypes.c_void_p, int]] = {}
    for number, size in events:
        if size < 0:
            for place in live.pop(number):
                libc.free(place)
            continue
        place = ctypes.c_void_p()
        beside = libc.malloc(SMALL)
        if libc.posix_memalign(ctypes.byref(place), ALIGNMENT, max(size, 1)) != 0:
            sys.exit("no address space")
        live[number] = (place, beside)
        most = max(most, held())
    print(most - before)


if __name__ == "__main__":
    main()
