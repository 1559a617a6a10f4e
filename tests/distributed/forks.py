"""Ranks as forks of one process that has imported everything: a start takes a fraction of a second instead of six.

Python's fork server is started once in a session, when the first ranks are; it never trains, and holds no process group
and no thread. A device's own runtime might not survive a fork: where CROSSTUNE_TEST_DEVICE names one, ranks are started
afresh.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from launchers.torchrun import free_port

DEVICE_VARIABLE = "CROSSTUNE_TEST_DEVICE"
ROOT = str(Path(__file__).parents[2])
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
}


@cache
def _server() -> BaseContext:
    if os.environ.get(DEVICE_VARIABLE, "cpu") != "cpu":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with pytest.MonkeyPatch.context() as patch:
        for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.delenv(key, raising=False)
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("PYTHONPATH", ROOT, prepend=os.pathsep)
        forkserver.ensure_running()
    first = context.Process(target=_nothing)  # waits for the imports, so that they are not in the first ranks' time
    first.start()
    first.join()
    return context


def _nothing() -> None:
    pass


class Ranks:
    """Processes that each call ``work(*arguments)`` as one rank of a world, as torchrun would start them.

    Args:
        work: a function of a module, so that its name suffices to find it.
        size: number of ranks.
        arguments: what it is called with.
        logs: folder for each rank's output.
        environment: variables besides those of a rank.
    """

    def __init__(
        self, work: Callable[..., None], size: int, *arguments: object, logs: Path, environment: Mapping[str, str]
    ) -> None:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
        self.logs = [logs / f"rank{rank}.log" for rank in range(size)]
        self.processes: list[BaseProcess] = []
        for rank, log in enumerate(self.logs):
            own = shared | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
            process = _server().Process(target=_as_rank, args=(own, log, work, arguments), daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Of the ranks that have not ended."""
        return [process.pid for process in self.processes if process.exitcode is None and process.pid is not None]

    @property
    def codes(self) -> list[int | None]:
        """Exit codes; None: it has not ended; negative: by a signal."""
        return [process.exitcode for process in self.processes]

    def wait(self, seconds: float) -> list[int | None]:
        """Exit codes once all have ended, or one has with a fault, or the time is over."""
        give_up = time.monotonic() + seconds
        while not any(self.codes) and None in self.codes and (left := give_up - time.monotonic()) > 0:
            connection.wait([p.sentinel for p in self.processes if p.exitcode is None], timeout=left)
        return self.codes

    def kill(self) -> None:
        """SIGKILL for all that live, as torchrun does when one has ended; returns when they have."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def output(self) -> str:
        """The end of what each rank printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-6000:]}" for log in self.logs if log.exists())


def _as_rank(environment: dict[str, str], log: Path, work: Callable[..., None], arguments: Sequence[object]) -> None:
    os.environ.update(ENVIRONMENT | environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    work(*arguments)


def in_ranks(
    work: Callable[..., None], size: int, *arguments: object, seconds: float = 900, environment: Mapping[str, str] = {}
) -> None:
    """Runs `work` in `size` ranks to its end; what they printed is the message if one fails."""
    with TemporaryDirectory() as logs:
        ranks = Ranks(work, size, *arguments, logs=Path(logs), environment=environment)
        try:
            codes = ranks.wait(seconds)
        finally:
            ranks.kill()
        assert codes == [0] * size, f"ended with {codes}\n{ranks.output()}"
