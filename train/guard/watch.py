"""The watch over hangs as a hook of the loop: its thread, its way to the other ranks, and how it ends a process.

What it decides is in `lookout.py`. The ranks meet in the job's own TCP store (of torchrun's agent, else of rank 0) and
in a second one that the last rank keeps, since the process or the machine of the first may be what hangs.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

from rich.console import Console
from torch._C._distributed_c10d import TCPStore

from configs.errors import EXIT_RUN_FAILED, CrosstuneError, HangError, StoppedError, first_line
from train.engine.base import World
from train.guard.board import Board, connect, packed, serve, unpacked
from train.guard.hang_report import within
from train.guard.heartbeat import Heartbeat
from train.guard.limits import Limits
from train.guard.lookout import Lookout
from train.guard.verdict import DONE
from train.guard.witness import Account, Member, give_account
from train.loop import Hook

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5
"""For the stacks of this process: their source lines may lie on a disk that hangs."""
TELL_SECONDS = 5
"""For the last words, which may be a file in the run's folder."""


class HangWatch(Hook):
    """From the first step to the last; a hook on every rank.

    Args:
        heartbeat: of this rank.
        world: the engine's.
        folder: of the run, for the report.
        timeout_seconds: ``guard.hang_timeout_seconds``, above 0.
        asynchronous: the device computes behind the thread of the steps.
        last_words: tells an error before this process ends itself.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        world: World,
        folder: Path,
        timeout_seconds: float,
        *,
        asynchronous: bool,
        last_words: Callable[[CrosstuneError], None],
    ) -> None:
        self.heartbeat, self.world, self.folder = heartbeat, world, folder
        self.limits = Limits.of(timeout_seconds)
        self.asynchronous, self.last_words = asynchronous, last_words
        self._served: TCPStore | None = None
        """Lives as long as this process: another rank may still be talking with it when this one is done."""
        self._over = threading.Event()
        self._lookout: Lookout | None = None
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def on_start(self, first_step: int, total_steps: int) -> None:
        """Finds the other ranks and begins."""
        me = Member.of_this_process(self.world.rank)
        members = [Member(**unpacked(content)) for content in self.world.all_gather_bytes(packed(asdict(me)).encode())]
        boards = self._boards() if self.world.size > 1 else []
        neighbours = [member for member in members if member.machine == me.machine]
        self._lookout = Lookout(
            me,
            members,
            self.heartbeat,
            boards,
            self.limits,
            first_step=first_step,
            give_account=partial(self._give_account, neighbours, boards),
            tell=self._tell,
            leave=_leave,
            folder=self.folder,
        )
        sign = packed(asdict(self._lookout.sign(time.monotonic())))
        for board in boards:
            board.lay_out(me.rank, sign)
        self.world.barrier()
        for board in boards:
            board.start()
        self._thread.start()

    def on_end(self) -> None:
        """This rank's steps are over, in good order or not."""
        if self._lookout is None or self._over.is_set():
            return
        error = sys.exception()
        if self._lookout.leaving is not None:  # what came up here only follows from it: the watch ends this process
            self._thread.join()
        in_order = error is None or isinstance(error, StoppedError)
        self._over.set()
        self._thread.join(timeout=LOOK_SECONDS)
        self._lookout.say_farewell(DONE if in_order else f"{type(error).__name__}: {first_line(error)[:200]}")
        for board in self._lookout.boards:
            board.close()

    def _watch(self) -> None:
        assert self._lookout is not None
        while not self._over.wait(self._lookout.pause):
            self._lookout.tick()

    def _boards(self) -> list[Board]:
        """Every table that can be reached; a fault is told and leaves the other."""
        prefix = self.world.broadcast_bytes(uuid4().hex.encode()).decode()
        places: list[tuple[str, int]] = []
        if "MASTER_PORT" in os.environ:
            places.append((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
        last = self.world.size - 1
        offered = self.world.broadcast_bytes(self._serve() if self.world.rank == last else b"", source=last)
        if offered:
            host, _, number = offered.decode().partition(" ")
            places.append((host, int(number)))
        boards = []
        for host, port in places:
            try:
                boards.append(connect(host, port, f"hang-watch/{prefix}"))
            except Exception as error:  # torch has several kinds for a store that does not answer
                logger.warning("hang watch: rank %d has no way by %s:%d: %s", self.world.rank, host, port, error)
        return boards

    def _serve(self) -> bytes:
        try:
            self._served, address = serve()
        except (OSError, RuntimeError) as error:
            logger.warning("hang watch: rank %d keeps no second table: %s", self.world.rank, error)
            return b""
        return address.encode()

    def _give_account(self, neighbours: list[Member], boards: list[Board]) -> Account | None:
        found: list[Account] = []

        def look() -> None:
            found.append(
                give_account(
                    self.heartbeat.beats,
                    self.heartbeat.phase,
                    neighbours,
                    asynchronous=self.asynchronous,
                    background=self.world.background,
                    leave_out=[self._thread, threading.current_thread(), *(board.thread for board in boards)],
                )
            )

        return found[0] if within(LOOK_SECONDS, look) else None

    def _tell(self, error: HangError) -> None:
        Console(stderr=True).show_cursor()  # a bar may have hidden it
        within(TELL_SECONDS, lambda: self.last_words(error))


def _leave(silent: list[Member]) -> NoReturn:
    """Ends this process at once, and before it those that are not heard of: they would be waited for.

    The thread of the steps hangs: no exception would reach it, nor would an orderly exit come to an end.
    """
    for member in silent:
        member.kill()
    os._exit(EXIT_RUN_FAILED)
