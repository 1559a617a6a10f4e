"""The machines of one attempt, from their names to agents that wait for the word to start, and what each is told."""

from __future__ import annotations

import errno
import inspect
import os
import queue
import shlex
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, RunFailedError, StoppedError
from configs.files import write_whole
from configs.schema.launcher_ssh import SshLauncherConfig
from launchers.base import node_command, secret_values, with_setup
from launchers.job import Job, JobFolder
from launchers.spec import ATTEMPT, MASTER, NODE, this_python
from launchers.ssh import probe
from launchers.ssh.beats import Beats
from launchers.ssh.connection import Connection, Event, Unreachable, address_of, agent_command, ssh_command
from launchers.ssh.gather import Gathered, Gathering, in_one, version_faults
from launchers.supervise import StopSignals
from launchers.torchrun import EndedBySignal

KNOCK_SECONDS = 5.0
"""Between two tries to reach a machine that is away."""
FILES = "ulimit -Hn of this shell: three open files for each machine, and a hundred more"
LOOPBACK = ("localhost", "127.", "::1")


class Session:
    """Who an attempt's machines are, and what they are told.

    Args:
        cfg: of the launcher.
        job: what runs.
        folder: of the job.
        attempt: its number.
        stops: signals that this command gets.
        inbox: of the connections.
        beats: takes the connections.
        show: takes lines for the user.
    """

    def __init__(
        self,
        cfg: SshLauncherConfig,
        job: Job,
        folder: JobFolder,
        attempt: int,
        stops: StopSignals,
        inbox: queue.Queue[Event],
        beats: Beats,
        show: Callable[[str], None],
    ) -> None:
        self.cfg, self.job, self.folder, self.attempt = cfg, job, folder, attempt
        self.stops, self.inbox, self.beats, self.show = stops, inbox, beats, show
        self.python = job.spec.python or this_python()
        self.remote = agent_command([self.python, "python3"])
        self.master = "127.0.0.1"
        self.secrets = secret_values(job.spec.secrets, os.environ)

    def assemble(self, hosts: dict[int, str], spares: list[str]) -> Gathered:
        """Machines that are ready. Spares replace those that are away; without one, a later attempt waits for them.

        Args:
            hosts: by number; brought up to date.
            spares: left; brought up to date.

        Raises:
            ConfigError: a machine cannot take part.
            RunFailedError: a machine did not come back.
            StoppedError: cancelled while it was away.
        """
        later, give_up = self.attempt > self.job.attempt, time.monotonic() + self.cfg.return_seconds
        while True:
            gathered = self._gather(hosts)
            if not gathered.faults:
                self._tell_unshared(hosts, gathered)
                return gathered
            away = {node for node, faults in gathered.faults.items() if isinstance(faults[0], Unreachable)}
            if away != set(gathered.faults) or (not later and len(away) > len(spares)):
                raise in_one(gathered.faults)
            for node in sorted(away):
                if spares:
                    spare = spares.pop(0)
                    self.show(f"{gathered.faults[node][0].render()}: {spare} takes its place")
                    hosts[node] = spare
                else:
                    self._wait_for(node, hosts[node], give_up)

    def _wait_for(self, node: int, host: str, give_up: float) -> None:
        self.show(f"{host} cannot be reached: waiting up to {max(0.0, give_up - time.monotonic()):.0f} s for it")
        while True:
            faults = self._gather({node: host}, keep=False).faults.get(node, [])
            if not any(isinstance(fault, Unreachable) for fault in faults):
                return
            way_on = f"crosstune resume {shlex.quote(str(self.folder.run_dir))}"
            if self.folder.cancelled:
                raise StoppedError(str(self.folder.run_dir), f"cancelled while {host} was away", remedy=way_on)
            if time.monotonic() > give_up:
                found = f"did not come back within launcher.return_seconds={self.cfg.return_seconds}"
                raise RunFailedError(host, found, remedy=f"{way_on} once it is there")
            pause = time.monotonic() + KNOCK_SECONDS
            while time.monotonic() < pause and not self.stops.heard:
                time.sleep(0.2)

    def _gather(self, hosts: Mapping[int, str], *, keep: bool = True) -> Gathered:
        """All machines, ready and of one version; or the faults, and no connection left."""
        launch = uuid.uuid4().hex
        token = self.folder.path / f".seen-{launch}"
        if self.job.spec.nodes > 1 and 0 in hosts:
            self.master = self.cfg.master or self._master_of(hosts[0])
        write_whole(token, "")
        try:
            check = partial(self._check, launch=launch, token=str(token))
            gathered = Gathering(hosts, self._connect, check, self.inbox, self.stops, self.cfg, self.show).run()
        finally:
            token.unlink(missing_ok=True)
        gathered.faults.update(version_faults(gathered, hosts, self.python))
        if gathered.faults or self.stops.heard or not keep:
            gathered.close()
        if self.stops.heard:
            number = self.stops.heard[0]
            raise KeyboardInterrupt if number == signal.SIGINT else EndedBySignal(128 + number)
        return gathered

    def _connect(self, node: int, host: str) -> Connection:
        try:
            connection = Connection(node, host, ssh_command(self.cfg, host, self.remote), self.inbox)
        except OSError as error:
            remedy = FILES if error.errno in (errno.EMFILE, errno.ENFILE) else None
            raise ConfigError("launcher", f"no ssh to {host}: {error.strerror}", remedy=remedy) from None
        self.beats.connections.add(connection)
        return connection

    def _master_of(self, host: str) -> str:
        """The address of machine 0, as ssh understands its name."""
        address = address_of(self.cfg, host)
        if address.startswith(LOOPBACK):
            found = f"{host} is {address}, where the other machines find themselves"
            raise ConfigError("launcher.master", found, remedy="launcher.master=ADDRESS of machine 0")
        return address

    def _check(self, node: int, *, launch: str, token: str) -> dict[str, Any]:
        """See `launchers.agent.Agent.check`."""
        spec, folder = self.job.spec, self.folder
        return {
            "launch": launch,
            "node": node,
            "run_dir": str(folder.run_dir),
            "token": token,
            "mark": str(folder.mark_file(self.attempt, node)),
            "working_dir": spec.working_dir,
            "setup": list(spec.setup),
            "master": self.master,
            "python": self.python,
            "probe": with_setup([self.python, "-"], spec.setup),
            "program": inspect.getsource(probe),
            "environment": {**spec.environment, **self.secrets},
            "grace": spec.grace_seconds,
            "heartbeat": self.cfg.heartbeat_seconds,
            "silence": self.cfg.silence_seconds,
        }

    def order(self, node: int) -> dict[str, Any]:
        """See `launchers.agent.Agent.start`."""
        spec, files = self.job.spec, (str(self.folder.file), self.job.spec.request)
        return {
            "command": with_setup(node_command(self.python, str(self.folder.file)), spec.setup),
            "environment": {NODE: str(node), MASTER: self.master, ATTEMPT: str(self.attempt)},
            "files": {name: Path(name).read_text(encoding="utf-8") for name in files},
        }

    def _tell_unshared(self, hosts: Mapping[int, str], gathered: Gathered) -> None:
        apart = [hosts[node] for node, answer in gathered.answers.items() if not answer["shared"]]
        if apart and self.attempt == self.job.attempt:
            where = f"{self.folder.run_dir} is on a disk of the machine's own: what is written there stays there"
            self.show(f"{', '.join(apart)}: {where}")
