"""Plays allocations to this machine's malloc and tells how much it holds at the most. A script; needs no package.

Standard input: a JSON list of three. [number, bytes] for each event, with -1 where the piece is freed; the numbers that
are no tensors; and the calls of mallopt with which a run begins. Only address space is taken: no page is written to.
Run as a file, so that it starts in a blink and its heap is its own.
"""

from __future__ import annotations

import ctypes
import json
import sys

ALIGNMENT = 64
"""Of torch's host tensors (``c10/core/alignment.h``)."""
STORAGE, TENSOR = (104,), (184, 24)
"""Bytes of the objects that come with a tensor, before and after its data: they live as long as it does. Small pieces
count: glibc keeps freed ones for the next of their size and does not join them with their neighbours, so that they cut
the holes that tensors leave."""
LOOKED_AT = 2**16
"""The heap is looked at after pieces of so many bytes; a look costs as much as many pieces."""


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

    events, numbers, settings = json.load(sys.stdin)
    for parameter, value in settings:
        libc.mallopt(parameter, value)
    objects = set(numbers)
    before, most = held(), 0
    live: dict[int, list[int | None]] = {}
    for number, size in events:
        if size < 0:
            for piece in live.pop(number):
                libc.free(piece)
            continue
        if number in objects:
            live[number] = [libc.malloc(size)]
            continue
        place = ctypes.c_void_p()
        storage = [libc.malloc(each) for each in STORAGE]
        if libc.posix_memalign(ctypes.byref(place), ALIGNMENT, size) != 0:
            sys.exit("no address space")
        live[number] = [*storage, place.value, *(libc.malloc(each) for each in TENSOR)]
        if size >= LOOKED_AT:
            most = max(most, held())
    print(most - before)


if __name__ == "__main__":
    main()
