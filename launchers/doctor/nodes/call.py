"""A process through which nodes are asked: it keeps off the terminal and ends with this one."""

from __future__ import annotations

import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from launchers.torchrun import end_with_parent

Inbox = queue.Queue[tuple["Call", subprocess.Popen[bytes], str | None]]
"""Takes each line of standard output; None: the process has ended."""


@dataclass
class Call:
    """A process through which nodes are asked, and how far it has come."""

    nodes: tuple[int, ...]
    command: Sequence[str]
    process: subprocess.Popen[bytes] | None = None
    complaints: IO[bytes] | None = None
    tries: int = 0
    due: float = 0.0
    """When to start it."""
    late: float = 0.0
    """When its nodes must have given a sign."""

    def start(self, inbox: Inbox) -> None:
        """Starts the process; must be called by a thread that stays: Linux ends a child with the thread that forked it.

        Raises:
            OSError: there is no such command.
        """
        self.complaints = tempfile.TemporaryFile()
        self.tries += 1
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.complaints,
            start_new_session=True,  # neither asks at the terminal nor gets its Ctrl-C
            env=os.environ | {"SSH_ASKPASS_REQUIRE": "never"},
            preexec_fn=end_with_parent,
        )
        threading.Thread(target=self._read, args=(self.process, inbox), daemon=True).start()

    def _read(self, process: subprocess.Popen[bytes], inbox: Inbox) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            inbox.put((self, process, line.decode(errors="replace").rstrip("\r\n")))
        process.wait()
        inbox.put((self, process, None))

    def say(self, text: str) -> None:
        """Writes to the process, from a thread of its own: one that does not read holds up no other."""
        assert self.process is not None and self.process.stdin is not None
        pipe = self.process.stdin

        def write() -> None:
            with suppress(OSError, ValueError):  # it has gone
                pipe.write(text.encode())
                pipe.flush()

        threading.Thread(target=write, daemon=True).start()

    def hush(self) -> None:
        """Ends what the process reads."""
        if self.process is not None and self.process.stdin is not None:
            pipe = self.process.stdin

            def close() -> None:
                with suppress(OSError, ValueError):
                    pipe.close()

            threading.Thread(target=close, daemon=True).start()

    def said(self) -> str:
        """What the process printed on standard error."""
        assert self.complaints is not None
        self.complaints.seek(0)
        return self.complaints.read().decode(errors="replace").strip()

    def end(self) -> None:
        """Wishes the process to end."""
        if self.process is not None:
            self.process.terminate()


def all_end(running: Sequence[subprocess.Popen[bytes]], seconds: float) -> bool:
    """Whether all processes end by themselves within so many seconds."""
    by = time.monotonic() + seconds
    for process in running:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, by - time.monotonic()))
    return all(process.returncode is not None for process in running)
