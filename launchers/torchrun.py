"""Several processes on this machine, one per device, through torch's own torchrun.

Static rendezvous on the loopback address and no restarts inside torchrun: a failed run goes on from its checkpoint with
`crosstune resume`. Rank 0 writes to our terminal, so its progress is seen live; the other ranks, and torchrun's own
messages, go to files under ``RUN/logs/<attempt>/``. Of a job of several machines this is one machine's part.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from configs.errors import EXIT_DONE, CrosstuneError, RunFailedError, WorkerLostError
from data_prep.pool import usable_cores
from launchers.failure import ERROR_DIR, UnexpectedError, earliest_error
from train.run_folder import STARTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Passed on to torchrun, which passes them on to the workers."""
REPEAT_SECONDS = 1.0
"""A signal so soon after the first is the same wish: `timeout` and schedulers signal a process and then its group."""
CLEANED_UP = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit codes of workers that torchrun ended because another one had ended."""
ENDED = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*exitcode\s*:\s*(-?\d+)")
"""Rank and exit code of a worker in torchrun's own report."""
TAKEN = re.compile(r"failed to listen .* port: (\d+),.* name: EADDRINUSE")
OWN_ERROR = re.compile(r"^[\w.]+(?:Error|Exception): .+$", re.MULTILINE)
"""The end of a traceback of torchrun's own."""


PR_SET_PDEATHSIG = 1
"""Of Linux: the signal that a process gets when its parent has ended."""
_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """Called in a child: kill -9 of its parent is to leave nobody who goes on in the run's folder. Linux only."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def passed_on() -> tuple[signal.Signals, ...]:
    """`STOP_SIGNALS` without what this process was started to ignore, which a handler of ours would undo.

    That is SIGHUP under `nohup`, and Ctrl-C in a script's background.
    """
    return tuple(number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)


def hangups_are_ignored() -> bool:
    """Whether `nohup` started this process: it is to outlive its terminal."""
    return signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@dataclass(frozen=True)
class Group:
    """A machine's place among those of a job."""

    nodes: int = 1
    node: int = 0
    """Its number, from 0."""
    address: str = "127.0.0.1"
    """Of machine 0."""
    port: int = 0
    """0: a free one, for a job of one machine."""


ALONE = Group()


class EndedBySignal(SystemExit):
    """Exit code 128 + number, as a shell tells it."""


def run_workers(
    nproc: int,
    arguments: Sequence[str],
    attempt: Path,
    *,
    threads: int = 0,
    grace_seconds: int = 120,
    group: Group = ALONE,
) -> None:
    """Runs ``crosstune <arguments>`` in `nproc` processes of this machine and waits for them.

    Args:
        nproc: processes to start.
        arguments: of the `crosstune` command.
        attempt: folder for the logs and faults of this attempt, such as `new_attempt` makes.
        threads: CPU threads per process; 0: the cores divided by `nproc`.
        grace_seconds: time that workers have to save and leave after a stop signal.
        group: this machine's place in a job of several.

    Raises:
        CrosstuneError: the earliest fault of a worker, with its exit code; `StoppedError` if it saved and stopped.
        WorkerLostError: a worker was killed, or ended without leaving a fault.
        KeyboardInterrupt: the user stopped the run before its first step, or at once.
        EndedBySignal: another signal did.
    """
    command = torchrun_command(nproc, arguments, attempt, group, grace_seconds)
    environment = worker_environment(os.environ, attempt, nproc, threads, alone=group.nodes == 1)
    with (attempt / "torchrun.log").open("wb") as log:
        # A session of its own: Ctrl-C reaches torchrun once, through us, and not each worker on its own.
        process = subprocess.Popen(
            command, env=environment, stderr=log, start_new_session=True, preexec_fn=end_with_parent
        )
        stop = _wait(process, grace_seconds)
    if process.returncode == EXIT_DONE:
        return
    left = earliest_error(attempt / "errors")
    if stop.number and (left is None or isinstance(left, UnexpectedError)):  # that a rank lost its peers only followed
        if not stop.forced and time.monotonic() - stop.at >= grace_seconds:
            raise _too_slow(stop, grace_seconds)
        raise KeyboardInterrupt if stop.number == signal.SIGINT else EndedBySignal(128 + stop.number)
    raise _root_cause(attempt, left)


def torchrun_command(
    nproc: int, arguments: Sequence[str], attempt: Path, group: Group, grace_seconds: int = 120
) -> list[str]:
    """The command line."""
    port = group.port or free_port()
    return [
        *(sys.executable, "-P", "-m", "torch.distributed.run"),
        *("--nnodes", str(group.nodes), "--nproc-per-node", str(nproc), "--node-rank", str(group.node)),
        *("--master-addr", group.address, "--master-port", str(port), "--max-restarts", "0"),
        *("--log-dir", str(attempt / "workers")),
        *("--shutdown-timeout", str(grace_seconds)),
        *("--signals-to-handle", ",".join(number.name for number in passed_on())),
        # torchrun takes each argument for a string.Template and fills in ${local_rank}.
        *("-m", "launchers.cli", *(word.replace("$", "$$") for word in arguments)),
    ]


def worker_environment(
    base: Mapping[str, str], attempt: Path, nproc: int, threads: int, *, alone: bool = True
) -> dict[str, str]:
    """What the workers see: our environment and a few variables of theirs. A user's own value wins.

    Args:
        base: our environment.
        attempt: folder of the attempt.
        nproc: processes on this machine.
        threads: per process; 0: the cores divided by `nproc`.
        alone: no other machine takes part.
    """
    environment = dict(base)
    environment.setdefault("OMP_NUM_THREADS", str(threads or max(1, usable_cores() // nproc)))
    if alone:  # gloo would otherwise look up the host's name, which fails on a machine without a network
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    # torchrun starts workers without -P: a file train.py in the working folder must not shadow ours.
    environment["PYTHONSAFEPATH"] = "1"
    environment[ERROR_DIR] = str((attempt / "errors").resolve())
    environment[STARTED] = str(psutil.Process().create_time())
    return environment


def join_terminal() -> None:
    """In a worker: rank 0 speaks on the terminal, every other rank into a file of its own; all end with torchrun.

    Rank 0's standard error follows its standard output, since it would else end in torchrun.log with torchrun's own
    messages. torchrun's --redirects would do for ten workers at most (torch 2.13: ranks of one digit).
    """
    if ERROR_DIR not in os.environ:
        return
    end_with_parent()
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        os.dup2(1, 2)
        return
    logs = Path(os.environ[ERROR_DIR]).parent / "workers"
    logs.mkdir(exist_ok=True)
    with (logs / f"rank{rank}.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def new_attempt(logs: Path) -> Path:
    """A fresh folder ``logs/<attempt>``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for number in range(1000):
        attempt = logs / (stamp if number == 0 else f"{stamp}-{number}")
        try:
            attempt.mkdir(parents=True)
            return attempt
        except FileExistsError:
            continue
    raise AssertionError("a thousand attempts within a second")


def free_port() -> int:
    """A TCP port that is free on the loopback address now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class _Stop:
    """What a user or a scheduler asked for while the workers ran."""

    number: int = 0
    """The first stop signal that came; 0: none did."""
    at: float = 0.0
    """When, by the monotonic clock."""
    forced: bool = False
    """A further one ended everything at once."""


def _wait(process: subprocess.Popen[bytes], grace_seconds: int) -> _Stop:
    """Waits for the end of torchrun and its workers; passes stop signals on. A second one ends everything at once."""
    stop = _Stop()
    workers: list[psutil.Process] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process.poll() is not None:
            return
        if not stop.number:
            stop.number, stop.at = number, time.monotonic()
            workers.extend(_workers_of(process.pid))
            process.send_signal(number)
        elif time.monotonic() - stop.at > REPEAT_SECONDS:
            stop.forced = True
            process.kill()
            _kill(workers)

    before = {number: signal.signal(number, pass_on) for number in passed_on()}
    try:
        process.wait()
        # Who signals torchrun again and again, or kills it, makes it leave its workers.
        _, left = psutil.wait_procs(workers, timeout=max(0.0, stop.at + grace_seconds - time.monotonic()))
        _kill(left)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stop


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _too_slow(stop: _Stop, grace_seconds: int) -> WorkerLostError:
    return WorkerLostError(
        f"guard.grace_seconds={grace_seconds}",
        f"the workers had not saved so long after {signal.Signals(stop.number).name} and were killed",
        remedy="a higher guard.grace_seconds, if the scheduler's own allows it",
    )


def _workers_of(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _root_cause(attempt: Path, left: CrosstuneError | None) -> CrosstuneError:
    """The fault to show: what a worker left, unless another one was killed and that fault only followed from it."""
    expected = left is not None and not isinstance(left, UnexpectedError)
    text = (attempt / "torchrun.log").read_text(encoding="utf-8", errors="replace")
    ended = [(int(rank), int(code)) for rank, code in ENDED.findall(text)]
    killed = [(rank, signal.Signals(-code)) for rank, code in ended if code < 0 and -code not in STOP_SIGNALS]
    remedy = f"the logs are in {attempt}"
    if killed and not expected:
        # A rank that misses its peer may abort: what came from outside is told first.
        rank, number = min(killed, key=lambda dead: dead[1] == signal.SIGABRT)
        hint = ", as the kernel does when memory runs out," if number == signal.SIGKILL else ""
        return WorkerLostError(f"rank {rank}", f"ended by signal {number.name}{hint}", remedy=remedy)
    if left is not None:
        return left
    if first := [(rank, code) for rank, code in ended if code not in CLEANED_UP] or ended:
        rank, code = first[0]
        return WorkerLostError(f"rank {rank}", f"ended with code {code} without a message", remedy=remedy)
    return _before_workers(text, remedy)


def _before_workers(text: str, remedy: str) -> CrosstuneError:
    """What torchrun itself met before any worker had started."""
    if taken := TAKEN.search(text):
        there = f"the next attempt takes the next one; who has it: ss -ltnp sport = :{taken[1]}"
        return RunFailedError(
            "master_port", f"port {taken[1]} of {socket.gethostname()} is in use", remedy=f"{there}; {remedy}"
        )
    said = OWN_ERROR.findall(text)
    return WorkerLostError("torchrun", f"ended early: {said[-1]}" if said else "ended without a message", remedy=remedy)
