"""What the container of each pod runs: ``python -P -m launchers.kubernetes.entry RUN/launch/job.json``.

Each kind of job has its own way to tell a pod which one it is, and its own rules to start it again. Here this becomes
what `launchers.node` asks for. The manifest says how, in variables:

    CROSSTUNE_MASTER       name of pod 0, which is waited for: it is known on the network only after its pod has started
    CROSSTUNE_NODE_FROM    the variable in which the job's controller tells a pod its number
    CROSSTUNE_RESTARTS     how often the controller has started the whole job again; not there, or empty: it does not
                           count, and the marks in the run's folder tell the attempt (`launchers.node.AUTO`)
    CROSSTUNE_RETRY_CODE   the exit code on which the controller starts a pod again, where it goes by codes
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from configs.errors import (
    EXIT_DONE,
    EXIT_RUN_FAILED,
    EXIT_USER_FAULT,
    ConfigError,
    CrosstuneError,
    RunFailedError,
    StoppedError,
)
from launchers.job import Job, JobFolder
from launchers.spec import ATTEMPT, MASTER, NODE

NODE_FROM, RESTARTS, RETRY_CODE = "CROSSTUNE_NODE_FROM", "CROSSTUNE_RESTARTS", "CROSSTUNE_RETRY_CODE"
OWN = (NODE_FROM, RESTARTS, RETRY_CODE)
OPERATORS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What controllers set for programs that are started by hand; torchrun sets its own. With them goes all of PET_*."""
NAME_SECONDS = 600
"""So long is the name of pod 0 waited for: its image may have to be fetched first."""
LOOK_SECONDS = 1.0


def main(arguments: list[str]) -> int:
    """Runs this pod's part; returns the exit code."""
    # Process 1 of a container gets no signal that it has no handler for. What runs the ranks has handlers of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        [file] = arguments
    except ValueError:
        print("usage: python -P -m launchers.kubernetes.entry RUN/launch/job.json", file=sys.stderr)
        return EXIT_USER_FAULT
    folder, retry_code = JobFolder(Path(file).parent), int(os.environ.get(RETRY_CODE, "0"))
    try:
        job = folder.read()
        attempt = settle(job, folder, os.environ)
        refuse(job, folder, attempt)
        wait_for_name(os.environ[MASTER])
    except CrosstuneError as error:
        print(error.render(), file=sys.stderr)
        return error.exit_code
    from launchers.node import main as run_node

    return code_for_controller(run_node(arguments), job, folder, attempt, retry_code)


def settle(job: Job, folder: JobFolder, environment: MutableMapping[str, str]) -> int:
    """Puts this machine's place into the environment, and takes out what would mislead the ranks.

    Returns:
        The number of the attempt.

    Raises:
        ConfigError: the controller has not said the pod's number.
    """
    from launchers.node import AUTO, place

    restarts = environment.get(RESTARTS, "")
    take_number(environment)
    environment[ATTEMPT] = str(job.attempt + int(restarts)) if restarts.isdecimal() else AUTO
    *_, attempt = place(job.spec, environment, folder, job.attempt)
    environment[ATTEMPT] = str(attempt)
    return attempt


def take_number(environment: MutableMapping[str, str]) -> None:
    """Puts the pod's number where all look for it, and takes out what its controller means for others.

    Raises:
        ConfigError: the controller has not said it.
    """
    source = environment.get(NODE_FROM, "")
    number = environment.get(source, "")
    if not number:
        raise ConfigError(source or NODE_FROM, "not set", remedy="it comes from the controller of the job's kind")
    environment[NODE] = number
    for name in [name for name in environment if name in (*OPERATORS, *OWN) or name.startswith("PET_")]:
        del environment[name]


def refuse(job: Job, folder: JobFolder, attempt: int) -> None:
    """Refuses an attempt beyond what was asked for: controllers count in different ways, or not across their own end.

    Raises:
        StoppedError: somebody has asked for the job's end.
        ConfigError: the one before ended with a fault of the user's, which no restart mends.
        RunFailedError: there have been enough.
    """
    if folder.cancelled:
        raise StoppedError(f"attempt {attempt}", "the job was cancelled", remedy="crosstune resume")
    if attempt > job.attempt and any(mark.exit_code == EXIT_USER_FAULT for mark in folder.marks(attempt - 1)):
        raise ConfigError(
            f"attempt {attempt}", "the one before ended with something to mend", remedy="crosstune status, then resume"
        )
    if attempt > job.attempt + job.spec.restarts:
        raise RunFailedError(f"attempt {attempt}", f"no restart is left (restarts={job.spec.restarts})")


def code_for_controller(code: int, job: Job, folder: JobFolder, attempt: int, retry_code: int) -> int:
    """The exit code of the container: the run's own, or the one that means "again" where that is wanted."""
    if not retry_code or code in (EXIT_DONE, EXIT_USER_FAULT):
        return code
    if attempt < job.attempt + job.spec.restarts and not folder.cancelled:
        return retry_code
    return code if code < 128 else EXIT_RUN_FAILED  # codes from 128 on mean "again", too


def wait_for_name(host: str, seconds: float = NAME_SECONDS) -> None:
    """Waits until a name has an address.

    Raises:
        RunFailedError: it has none for too long.
    """
    last = time.monotonic() + seconds
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > last:
                found = f"'{host}' has no address after {seconds:.0f} s: {error.strerror}"
                raise RunFailedError("machine 0", found, remedy="did its pod start? crosstune logs --node 0") from None
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
