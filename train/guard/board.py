"""A table that every rank can write to and read, outside the collectives: it works when they do not.

It lies in one of torch's TCP stores, in the memory of one process; no file system is shared. A store whose process has
stopped blocks its clients beyond any timeout of theirs (torch 2.13: `get` returns when the process goes on), and so all
talk with it is on a thread of its own, and whoever asks looks at what the last round brought.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from configs.errors import first_line

CALL = "call"
"""What the rank that decides asks of the others."""
CONNECT_SECONDS = 60
FAREWELL_SECONDS = 2
"""Time for the last round. Python 3.11 ends daemon threads as it ends itself, and one that is inside the store's client
then takes the process down with it (``terminate called without an active exception``, SIGABRT)."""


def cell(rank: int) -> str:
    """Key under which a rank says where it is."""
    return f"cell/{rank}"


def answer(rank: int) -> str:
    """Key under which a rank answers a call."""
    return f"answer/{rank}"


def packed(content: dict[str, Any]) -> str:
    """For a table of the ranks."""
    return json.dumps(content, separators=(",", ":"))


def unpacked(content: bytes) -> dict[str, Any]:
    """What `packed` gave; empty where there is nothing yet."""
    found: dict[str, Any] = json.loads(content) if content else {}
    return found


class Board:
    """One table, seen through a client of this process.

    Args:
        name: for messages, such as ``host:port``.
        store: of the table; its keys begin with what is the attempt's own.
        clock: seconds that never go back.
    """

    def __init__(self, name: str, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.name, self._store, self._clock = name, store, clock
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._posted: dict[str, str] = {}
        self._wanted: set[str] = {CALL}
        self._seen: dict[str, bytes] = {}
        self._closed = False
        self.answered_at = clock()
        """When the store last answered."""
        self.fault: str | None = None
        """What ended the talk with the store."""
        self.thread = threading.Thread(target=self._talk, name=f"hang watch, {name}", daemon=True)

    def lay_out(self, rank: int, sign: str) -> None:
        """Makes this rank's keys, so that no reader waits for one that is not there; before all ranks `start`."""
        self._store.set(cell(rank), sign)
        self._store.set(answer(rank), "")
        if rank == 0:
            self._store.set(CALL, "")

    def start(self) -> None:
        """All ranks have laid out their keys: the talk begins."""
        self.thread.start()

    def exchange(self, posts: dict[str, str], wanted: Iterable[str]) -> None:
        """Asks for a round in which `posts` are written, then `wanted` and `CALL` read; does not wait for it."""
        with self._lock:
            self._posted.update(posts)
            self._wanted = {CALL, *wanted}
        self._wake.set()

    def read(self, key: str) -> bytes:
        """What the last round that asked for the key brought; empty where none did."""
        with self._lock:
            return self._seen.get(key, b"")

    @property
    def sent(self) -> bool:
        """Whether nothing waits to be written."""
        with self._lock:
            return not self._posted

    def close(self) -> None:
        """Ends the talk after a last round; waits for it, but no longer than a store that answers needs."""
        self._closed = True
        self._wake.set()
        if self.thread.is_alive():
            self.thread.join(FAREWELL_SECONDS)

    def _talk(self) -> None:
        last = False
        while not last:
            self._wake.wait()
            self._wake.clear()
            last = self._closed
            try:
                self._round()
            except Exception as error:  # of whatever kind the store's client finds: the board is of no more use
                self.fault = f"{type(error).__name__}: {first_line(error)[:200]}"
                return

    def _round(self) -> None:
        with self._lock:
            posts, wanted = dict(self._posted), sorted(self._wanted)
        for key, value in posts.items():
            self._store.set(key, value)
        found = self._store.multi_get(wanted)
        with self._lock:
            self._seen.update(zip(wanted, found, strict=True))
            for key, value in posts.items():
                if self._posted.get(key) is value:
                    del self._posted[key]
            self.answered_at = self._clock()


def serve() -> tuple[TCPStore, str]:
    """A store in this process, and the address at which the other ranks find it.

    Raises:
        RuntimeError: of torch, when no port can be had.
        OSError: this machine has no address towards the first.
    """
    master = socket.getaddrinfo(os.environ.get("MASTER_ADDR", "127.0.0.1"), 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(*master[:3]) as probe:
        probe.connect(master[4])  # sends nothing: it only chooses the interface
        host = str(probe.getsockname()[0])
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    return store, f"{host} {store.port}"


def connect(host: str, port: int, prefix: str) -> Board:
    """A client of its own: the process group's may be waiting for something.

    Raises:
        RuntimeError: of torch, when nothing answers there.
    """
    timeout = timedelta(seconds=CONNECT_SECONDS)
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    return Board(f"{host}:{port}", PrefixStore(prefix, store))
