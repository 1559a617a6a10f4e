"""What every machine of a job runs: ``python -P -m launchers.node RUN/launch/job.json``.

All launchers end here, so that a rank has the same arguments and environment whoever started it. Three variables tell a
machine which one it is (see `launchers.spec`); all else is in job.json. torchrun starts the ranks, its rendezvous is
static and it restarts nothing: whoever started the machines starts all of them again, from the last checkpoint.

Exit codes: 0 done, 2 something to mend in what was asked, 3 failed, 75 saved and stopped, 128 + n ended by a signal.
"""

from __future__ import annotations

import os
import re
import resource
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from configs.errors import EXIT_DONE, EXIT_INTERRUPTED, ConfigError, CrosstuneError, StorageError, WorkerLostError
from launchers.doctor.nodes.network import is_loopback, source_address
from launchers.failure import LAUNCHED, as_json, earliest_fault, traceback_kept_in
from launchers.job import Job, JobFolder, Mark, make_folder
from launchers.spec import ATTEMPT, MASTER, NODE, LaunchSpec, environment_hash
from launchers.steps import resumable
from launchers.terminal import Terminal
from launchers.torchrun import EndedBySignal, Group, run_workers

AUTO = "auto"
"""For `ATTEMPT`, where a scheduler does not say which one it is: one more than the last that left a mark."""
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
ELSEWHERE = "192.0.2.1"
"""An address that nobody has (RFC 5737): the routing table is asked for the way there, and nothing is sent."""
OPEN_FILES = 65_536
PIECE, PIECES = 65_536, 256
"""Bytes of output read at once, and how many such pieces wait for a terminal that does not take them."""


def main(arguments: list[str]) -> int:
    """Runs this machine's part; returns the exit code."""
    try:
        [file] = arguments
    except ValueError:
        print("usage: python -P -m launchers.node RUN/launch/job.json", file=sys.stderr)
        return 2
    folder = JobFolder(Path(file).parent)
    try:
        job = folder.read()
        node, master, attempt = place(job.spec, os.environ, folder, job.attempt)
    except CrosstuneError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    return run_node(job, folder, node, master, attempt)


def place(spec: LaunchSpec, environment: Mapping[str, str], folder: JobFolder, first: int = 0) -> tuple[int, str, int]:
    """This machine's number, the address of machine 0 and the number of the attempt, which is `first` or later.

    Raises:
        ConfigError: the launcher did not say them, or says what cannot be.
    """
    values = [environment.get(name, "") for name in (NODE, MASTER, ATTEMPT)]
    for name, value in zip((NODE, MASTER, ATTEMPT), values, strict=True):
        if not value:
            raise ConfigError(name, "not set: whoever starts launchers.node must say it")
    node, master, attempt = values
    if not node.isdecimal() or int(node) >= spec.nodes:
        raise ConfigError(NODE, f"'{node}'", allowed=f"0 to {spec.nodes - 1}: the job has {spec.nodes} machines")
    if attempt == AUTO:
        return int(node), master, _next_attempt(folder, int(node), first)
    if not attempt.isdecimal():
        raise ConfigError(ATTEMPT, f"'{attempt}'", allowed=f"0 or more, or {AUTO}")
    return int(node), master, int(attempt)


def _next_attempt(folder: JobFolder, node: int, first: int) -> int:
    """One more than this machine's last. The others' last may be the one that is beginning now, or one it missed."""
    marks = [(int(file.parent.name), file.stem) for file in (folder.path / "attempts").glob("[0-9]*/node-*.json")]
    own = [attempt for attempt, machine in marks if machine == f"node-{node}"]
    return max(first, max(own, default=-1) + 1, *(attempt for attempt, _ in marks))


def run_node(job: Job, folder: JobFolder, node: int, master: str, attempt: int) -> int:
    """Runs the ranks of one machine and leaves its mark.

    Args:
        job: what was submitted.
        folder: of the job.
        node: this machine's number.
        master: address of machine 0.
        attempt: number of the attempt.
    """
    spec, logs = job.spec, folder.logs(attempt, node)
    # All that is said from here on is in a file, too, except that nothing can be written.
    try:
        make_folder(logs)
        mark = Mark(node, attempt, socket.gethostname(), os.getpid(), time.time(), "")
        with copied_to(folder.output(attempt, node)):
            try:
                prepare(spec, os.environ, master)
                mark = replace(mark, environment=environment_hash(what_ranks_see(spec, os.environ)))
                folder.mark(mark)
                code, fault = _work(spec, logs, node, master, attempt)
            except CrosstuneError as error:
                code, fault = error.exit_code, {"rank": None, "time": time.time(), **as_json(error)}
                print(error.render(), file=sys.stderr)
            folder.mark(replace(mark, ended=time.time(), exit_code=code, fault=fault))
        return code
    except CrosstuneError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code


def _work(spec: LaunchSpec, logs: Path, node: int, master: str, attempt: int) -> tuple[int, dict[str, Any] | None]:
    # Alone, any free port will do: several jobs may share a machine.
    group = Group(spec.nodes, node, master, spec.port(attempt) if spec.nodes > 1 else 0)
    try:
        with resumable(Path(spec.run_dir)), traceback_kept_in(logs):
            run_workers(
                spec.nproc,
                spec.arguments(attempt),
                logs,
                threads=spec.threads,
                grace_seconds=spec.grace_seconds,
                group=group,
            )
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED, None
    except EndedBySignal as ending:
        return int(ending.code or 1), None
    except CrosstuneError as error:
        print(error.render(), file=sys.stderr)
        told = {"rank": None, "time": time.time()}
        if not isinstance(error, WorkerLostError):
            told |= earliest_fault(logs / "errors") or {}
        elif lost := re.fullmatch(r"rank (\d+)", error.where):  # what the others left only followed
            told["rank"] = int(lost[1])
        return error.exit_code, {**told, **as_json(error)}
    return EXIT_DONE, None


def prepare(spec: LaunchSpec, environment: MutableMapping[str, str], master: str) -> None:
    """Puts into the environment, and the working folder, what the ranks find there.

    Raises:
        ConfigError: the working folder or a network interface is not there.
    """
    environment.update(spec.environment)
    environment[LAUNCHED] = "1"
    raise_file_limit()
    try:
        os.chdir(spec.working_dir)
    except OSError as error:
        raise ConfigError(
            "working folder",
            f"'{spec.working_dir}', from which the job was launched, on {socket.gethostname()}: {error.strerror}",
            remedy="launch from a folder that all machines have",
        ) from None
    if spec.nodes > 1:
        interface = spec.interface or interface_to(master)
        for name in INTERFACES:
            environment.setdefault(name, interface)


def raise_file_limit() -> None:
    """Raises the soft limit of open files as far as the hard one lets it: hundreds of ranks need a connection each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def interface_to(host: str) -> str:
    """Name of the network interface whose address this machine has towards another one.

    Raises:
        ConfigError: the other one's name has no address, or no way leads there.
    """
    try:
        own = source_address(host)
        if _is_loopback(own) and not _is_loopback(host):
            own = _address_outside() or own
    except OSError as error:
        raise ConfigError(
            "machine 0",
            f"'{host}' cannot be reached from {socket.gethostname()}: {error.strerror or error}",
            remedy="crosstune doctor nodes",
        ) from None
    interfaces = psutil.net_if_addrs().items()
    found = [name for name, infos in interfaces if any(info.address.partition("%")[0] == own for info in infos)]
    if not found:
        raise ConfigError("cluster.interface", f"none has the address {own} on this machine", remedy="name it")
    return found[0]


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or is_loopback(host)
    except ValueError:  # another name
        return False


def _address_outside() -> str | None:
    """This machine's address towards other networks, or its only one; None: it has none but the loopback's.

    Machine 0 may know its own name by an address of its loopback interface (Debian's 127.0.1.1), which the others do
    not see: they would wait for it until their time-out.

    Raises:
        ConfigError: there are several, and no route says which.
    """
    with suppress(OSError):
        return source_address(ELSEWHERE)
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {
        name: info.address
        for name, infos in psutil.net_if_addrs().items()
        for info in infos
        if name in up and info.family == socket.AF_INET and not is_loopback(info.address)
    }
    if len(found) > 1:
        raise ConfigError(
            "cluster.interface",
            f"{socket.gethostname()} knows its own name as a loopback address, and there are {', '.join(found)}",
            remedy="name the one that the other machines reach",
        )
    return next(iter(found.values()), None)


NOT_SHARED = re.compile(
    r"(SLURM|SLURMD|PBS|LSB|KUBERNETES|VC|VK|PET|CROSSTUNE|TORCHELASTIC|XDG|SSH|LESS|LC)_.*|.*_(SERVICE|PORT)(_.*)?|"
    r".*_VISIBLE_DEVICES|XDL_IP|JOB_COMPLETION_INDEX|"
    r"(GLOO|NCCL|HCCL)_SOCKET_IFNAME|HCCL_IF_IP|(DBUS|SYSTEMD|INVOCATION|JOURNAL)_.*|KRB5CCNAME|"
    r"(PWD|OLDPWD|HOME|HOSTNAME|SHLVL|_|TERM|TMPDIR|USER|LOGNAME|MAIL|SHELL|LANG|LS_COLORS|PS1)"
)
"""Variables in which machines of one job rightly differ."""


def what_ranks_see(spec: LaunchSpec, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables in which machines must not differ; of secrets only that they are there."""
    own = (NODE, MASTER, ATTEMPT)
    kept = {name: value for name, value in environment.items() if not NOT_SHARED.fullmatch(name) and name not in own}
    return kept | {name: "set" for name in spec.secrets if name in environment}


@contextmanager
def copied_to(path: Path) -> Iterator[None]:
    """What this process and its children print goes to a file as well.

    Raises:
        StorageError: the file cannot be written.
    """
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise StorageError(str(path), f"cannot be written: {error.strerror}") from None
    read, write = os.pipe()
    before = [os.dup(1), os.dup(2)]
    # Numbers of its own, which it closes: it may outlive us by a child that holds the pipe open.
    thread = threading.Thread(target=_copy, args=(read, file, os.dup(1)), name="output", daemon=True)
    thread.start()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, original in zip((1, 2), before, strict=True):
            os.dup2(original, number)
            os.close(original)
        thread.join(timeout=5)


def _copy(source: int, file: int, terminal: int) -> None:
    """Every byte to the file; to the terminal what it takes, for ranks must not wait for somebody's Ctrl-S."""
    with Terminal(partial(_write_all, terminal), _pieces_missing, PIECES) as shown:
        while data := os.read(source, PIECE):
            _write_all(file, data)
            shown.show(data)
    for number in (source, file):  # a terminal may still be in the middle of a piece
        os.close(number)


def _pieces_missing(count: int) -> bytes:
    return f"\n... up to {count * PIECE} bytes left out here; output.log has them ...\n".encode()


def _write_all(target: int, data: bytes) -> None:
    rest = memoryview(data)
    with suppress(OSError):  # whoever listened has gone, or a disk is full; the other goes on
        while rest:
            try:
                rest = rest[os.write(target, rest) :]
            except BlockingIOError:  # a terminal that another process has set so
                select.select([], [target], [])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
