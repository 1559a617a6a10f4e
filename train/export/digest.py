"""SHA-256 of bytes that pass by, taken beside the thread that reads or writes them."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

ALONE = 1 << 16
"""Bytes that are hashed where they are: handing them over would cost more."""


class Digest:
    """A SHA-256 that is computed by a thread of its own; hashing lets go of the interpreter's lock.

    One update is under way at a time: its bytes must stay as they are until the next call returns.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._under_way: Future[None] | None = None

    def update(self, data: bytes | memoryview) -> None:
        """Takes in more bytes."""
        self.wait()
        if memoryview(data).nbytes < ALONE:
            self._hash.update(data)
        else:
            self._under_way = self._thread.submit(self._hash.update, data)

    def hexdigest(self) -> str:
        """Of all bytes so far."""
        self.wait()
        return self._hash.hexdigest()

    def wait(self) -> None:
        """Until the bytes are no longer needed."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def __enter__(self) -> Digest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
