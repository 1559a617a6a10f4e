"""A wish to stop: by a signal, a file or the clock. The ranks agree on the step, save and leave with exit code 75.

Signals are heard by a thread of their own, through the descriptor that Python's signal handler writes to: the thread of
the steps may sit in a kernel or a collective for long, and a user wants an answer at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import psutil

from configs.errors import EXIT_RESUMABLE, CrosstuneError, StoppedError
from configs.schema.guard import GuardConfig
from train.checkpoint.layout import checkpoints, step_of
from train.engine.base import World
from train.run_folder import STOP_FILE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
REPEAT_SECONDS = 1.0
"""A signal so soon after the first is the same wish: schedulers and `timeout` signal a process and then its group."""
REPEAT_SECONDS_TORCHRUN = 10.0
"""The same where torchrun hands signals on besides; when its own time is over it ends the workers by SIGKILL."""
LOOK_SECONDS = 1.0
"""Between two looks for the file: it may be on a file system that a thousand ranks share."""


def _say(text: str) -> None:
    """To the terminal past all buffers, which the thread of the steps may hold."""
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())


class StopRequests:
    """Collects what asks this rank to stop, from the first step to the last. A context manager of the main thread.

    Args:
        folder: of the run.
        cfg: the guard group.
        started: `time.time` at which the command began.
        world: the ranks; one on each machine looks for the file.
        note: takes lines for the user.
        last_words: tells a fault before this process ends itself.
    """

    def __init__(
        self,
        folder: Path,
        cfg: GuardConfig,
        started: float,
        *,
        world: World | None = None,
        note: Callable[[str], None] = _say,
        last_words: Callable[[CrosstuneError], None] = lambda error: _say(error.render()),
    ) -> None:
        self.folder, self.cfg, self.started = folder, cfg, started
        self.world, self.note, self.last_words = world or World(), note, last_words
        self._signal: int | None = None
        self._signalled = 0.0
        self._file = False
        self._looked = -LOOK_SECONDS
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        self._remove_stale()
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="stop-requests", daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, _heard_by_thread) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._outbox.close()
        self._thread.join()
        self._inbox.close()

    def wanted(self) -> str | None:
        """Why this rank wants to stop, in words; None: it does not."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        if self._sees_file():
            return f"the file {STOP_FILE}"
        minutes = self.cfg.stop_after_minutes
        if minutes and time.time() - self.started > 60 * minutes:
            return f"guard.stop_after_minutes={minutes:g}"
        return None

    def reason(self) -> str:
        """Who wants to stop and why, the same on all ranks. Called on all of them once one is known to want it."""
        wish = self.wanted()
        if self.world.size == 1:
            return wish or ""
        mine = f"{wish}|{socket.gethostname()}" if wish else ""
        answers = [text.decode().split("|") for text in self.world.all_gather_bytes(mine.encode())]
        wishes = [(rank, *answer) for rank, answer in enumerate(answers) if answer != [""]]
        rank, why, host = wishes[0]
        if len(wishes) == self.world.size and all(other == why for _, other, _ in wishes):
            return f"{why} (all ranks)"
        return f"{why} (rank {rank} on {host})" + (f" and {len(wishes) - 1} more rank(s)" if wishes[1:] else "")

    def honoured(self) -> None:
        """The run stops: takes the file away, so that it does not stop the next command too."""
        if self.world.leads_node:
            self._remove(self.folder / STOP_FILE)

    def _sees_file(self) -> bool:
        now = time.monotonic()
        if not self._file and self.world.leads_node and now - self._looked >= LOOK_SECONDS:
            self._looked = now
            self._file = (self.folder / STOP_FILE).exists()
        return self._file

    def _remove_stale(self) -> None:
        file = self.folder / STOP_FILE
        if self.world.leads_node:
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime < self.started and self._remove(file):
                    self.note(f"{file} is older than this command: removed")

    def _remove(self, file: Path) -> bool:
        """Whether it was this rank that removed it: several machines may see the same one."""
        try:
            file.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            self.note(f"{file} cannot be removed ({error.strerror}): remove it, or the next command stops too")
            return False
        return True

    def _listen(self) -> None:
        while heard := self._inbox.recv(1):
            if heard[0] in SIGNALS:
                self._on_signal(heard[0])

    def _on_signal(self, number: int) -> None:
        """Answers the first signal; a later one ends this process."""
        now, name = time.monotonic(), signal.Signals(number).name
        if number == signal.SIGTERM and _torchrun_cleans_up():
            os._exit(128 + number)  # there is nobody to save with
        if self._signal is None:
            self._signal, self._signalled = number, now
            who = f"rank {self.world.rank}: " if self.world.size > 1 else ""
            _say(f"{who}{name}: stopping after this step; again to end at once")
        elif now - self._signalled > (REPEAT_SECONDS_TORCHRUN if _under_torchrun() else REPEAT_SECONDS):
            self._end_at_once(name, number)

    def _end_at_once(self, name: str, number: int) -> NoReturn:
        saved = checkpoints(self.folder / "checkpoints")
        if not saved:
            _say(f"{name} again: ended at once; there is no checkpoint to go on from")
            os._exit(128 + number)
        step = step_of(saved[-1])
        remedy = f"crosstune resume {shlex.quote(str(self.folder))} goes on after step {step}"
        self.last_words(StoppedError(str(self.folder), f"ended at once by {name}, unsaved", remedy=remedy))
        os._exit(EXIT_RESUMABLE)


def _heard_by_thread(number: int, frame: FrameType | None) -> None:
    """There has to be a Python handler for the signal's number to be written to the thread's descriptor."""


def _under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _torchrun_cleans_up() -> bool:
    """Whether SIGTERM comes because another worker of this machine has ended, and not as a wish to stop.

    torchrun ends the others in that way. They would wait for the dead one in a collective until torchrun's patience
    ends too.
    """
    if not _under_torchrun():
        return False
    try:
        family = psutil.Process(os.getppid()).children()
        return sum(map(_is_live_worker, family)) < int(os.environ["LOCAL_WORLD_SIZE"])
    except (psutil.Error, KeyError):
        return False


def _is_live_worker(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "LOCAL_RANK" in process.environ()
    except psutil.NoSuchProcess:
        return False
