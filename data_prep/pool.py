"""An ordered map over worker processes, with bounded memory, for work whose pieces take some tenths of a second.

Why not `concurrent.futures`: a worker that is killed while it writes a result leaves that executor waiting for ever,
and one whose parent is killed waits for ever for work. Here each worker has a pipe of its own, so that either end sees
the other's end of life.
"""

from __future__ import annotations

import gc
import itertools
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from configs.errors import CrosstuneError, RunFailedError

T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")

Make = Callable[[], Callable[[A], R]]
"""Makes the function that is mapped. Where processes are forked it is called once, before; else in each worker."""

_AHEAD = 2
"""Tasks that a worker has at a time: one in work, one to go on with while the parent writes."""
_WINDOW = 4
"""Tasks per worker, at most, between the oldest without a result and the newest."""
_TASKS_OF_GARBAGE = 8
_SIZE_AT_WORK = 2.5 * 2**20
"""Of tasks that are much larger than others, as many are given out at a time as have this size per worker."""


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_here(make: Make[A, R], tasks: Iterable[tuple[T, A]]) -> Generator[tuple[T, R]]:
    """As `map_ordered`, in this process."""
    function = make()
    with _collecting_between_tasks() as collect:
        for tag, argument in tasks:
            yield tag, function(argument)
            collect()


def map_ordered(
    make: Make[A, R], tasks: Iterable[tuple[T, A]], workers: int, size: Callable[[A], int] = lambda _: 0
) -> Generator[tuple[T, R]]:
    """Results in the order of their tasks. What the function raises is raised here, in that order too.

    No worker outlives the generator, nor this process.

    Args:
        make: see `Make`.
        tasks: (tag, argument) pairs; the tag stays here.
        workers: processes.
        size: of a task; sets bounds to the memory that unusually large ones take together.

    Raises:
        RunFailedError: a worker died.
    """
    team = _Team(make, workers, size)
    try:
        yield from team.map(tasks)
    finally:
        team.close()


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    at_work: int = 0
    """Tasks it has."""


@dataclass
class _Pending(Generic[T]):
    """A task without a result, or whose result waits for those before it."""

    number: int
    tag: T
    size: int
    outcome: Any = None
    done: bool = False
    failed: bool = False


class _Team(Generic[A, R]):
    def __init__(self, make: Make[A, R], workers: int, size: Callable[[A], int]) -> None:
        self._size, self._at_work = size, 0
        forked = sys.platform == "linux"
        context: Any = get_context("fork" if forked else "spawn")
        start: Make[A, R] = make
        if forked:
            function = make()
            start = lambda: function  # noqa: E731 (inherited, never pickled)
        self._workers: list[_Worker] = []
        with _no_threads_in_tokenizers():
            for _ in range(workers):
                ours, theirs = context.Pipe()
                others = [*(w.pipe for w in self._workers), ours] if forked else []
                process = context.Process(target=_serve, args=(theirs, others, start), daemon=True)
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))

    def map(self, tasks: Iterable[tuple[T, A]]) -> Iterator[tuple[T, R]]:
        numbered = enumerate(tasks)
        pending: deque[_Pending[T]] = deque()
        waiting = next(numbered, None)
        while waiting or pending:
            while waiting and len(pending) < _WINDOW * len(self._workers) and (worker := self._free_for(waiting[1][1])):
                number, (tag, argument) = waiting
                pending.append(_Pending(number, tag, self._size(argument)))
                self._send(worker, (number, argument), pending[-1].size)
                waiting = next(numbered, None)
            if pending[0].done:
                done = pending.popleft()
                if done.failed:
                    raise done.outcome
                yield done.tag, done.outcome
            else:
                for number, failed, outcome in self._receive():
                    each = pending[number - pending[0].number]
                    each.outcome, each.failed, each.done = outcome, failed, True
                    self._at_work -= each.size

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.pipe.close()

    def _free_for(self, argument: A) -> _Worker | None:
        """A worker that a task can be given to now."""
        worker = min(self._workers, key=lambda w: w.at_work)
        if worker.at_work == _AHEAD:
            return None
        too_much = self._at_work + self._size(argument) > _SIZE_AT_WORK * len(self._workers)
        return None if self._at_work and too_much else worker

    def _send(self, worker: _Worker, message: Any, size: int) -> None:
        try:
            worker.pipe.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise _died(worker) from None
        worker.at_work += 1
        self._at_work += size

    def _receive(self) -> Iterator[tuple[int, bool, Any]]:
        """Waits until there is a result, then takes what is there."""
        busy: dict[Any, _Worker] = {w.pipe: w for w in self._workers if w.at_work}
        for pipe in wait(list(busy)):
            worker = busy[pipe]
            try:
                number, failed, outcome = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise _died(worker) from None
            worker.at_work -= 1
            yield number, failed, outcome


def _died(worker: _Worker) -> RunFailedError:
    worker.process.join()
    code = worker.process.exitcode or 0
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    memory = "there was not enough memory for so many" if code == -signal.SIGKILL else "see above, if it said why"
    return RunFailedError(
        "workers", f"a process that prepares data {how}: {memory}", remedy="workers=1, or run the same command again"
    )


@contextmanager
def _no_threads_in_tokenizers() -> Iterator[None]:
    """Workers are forked with this setting: the cores are theirs already, and the library warns where it is not set."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def _collecting_between_tasks() -> Iterator[Callable[[], object]]:
    """Cyclic garbage is collected every few times it is asked for, and not looked for in what was there before.

    A task makes so many objects that live as long as it does that looking for garbage among them took a seventh of the
    time.
    """
    was_on, asked = gc.isenabled(), itertools.count(1)
    gc.freeze()
    gc.disable()
    try:
        yield lambda: next(asked) % _TASKS_OF_GARBAGE or gc.collect()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _serve(pipe: Connection, others: list[Connection], start: Make[Any, Any]) -> None:
    """A worker's life: it ends with its parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for inherited in others:
        inherited.close()
    tasks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, tasks), daemon=True).start()
    function = start()
    with _collecting_between_tasks() as collect:
        while True:
            number, argument = tasks.get()
            try:
                pipe.send((number, *_outcome(function, argument)))
            except (BrokenPipeError, ConnectionResetError):
                os._exit(1)
            del argument
            collect()


def _outcome(function: Callable[[A], R], argument: A) -> tuple[bool, R | Exception]:
    """(whether it failed, the result or the fault)."""
    try:
        return False, function(argument)
    except CrosstuneError as error:
        return True, error
    except Exception as error:
        return True, RuntimeError(f"in a worker: {error!r}\n{traceback.format_exc()}")


def _listen(pipe: Connection, tasks: queue.SimpleQueue[Any]) -> None:
    """Takes tasks as they come, so that the parent never waits for a busy worker to read."""
    while True:
        try:
            tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)  # the parent is gone; whatever is in work is for nobody
