"""Machines reached by ssh, started and watched from the foreground; see the package."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import psutil

from configs.errors import ConfigError, CrosstuneError, RunFailedError
from configs.files import write_whole
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_ssh import SshLauncherConfig
from launchers import agent
from launchers.base import node_command, secret_values, with_setup
from launchers.foreground import ForegroundLauncher, supervisor_here
from launchers.job import Job, JobFolder
from launchers.spec import ATTEMPT, MASTER, NODE, LaunchSpec, this_python
from launchers.ssh.attempt import Attempt
from launchers.ssh.connection import (
    Beats,
    Connection,
    Event,
    Unreachable,
    address_of,
    agent_command,
    ssh_command,
)
from launchers.ssh.gather import Gathered, Gathering, in_one, version_faults
from launchers.ssh.hosts import configured_hosts, host_faults, parse_hostfile, to_hostfile
from launchers.ssh.terminal import Terminal
from launchers.supervise import StopSignals, newest_step
from launchers.torchrun import EndedBySignal

HOSTS = "hosts"
"""The rendered file: the machines in order, spares last."""
KNOCK_SECONDS = 5.0
"""Between two tries to reach a machine that is away."""
LOOPBACK = ("localhost", "127.", "::1")


class SshLauncher(ForegroundLauncher):
    """See the module."""

    name = "ssh"

    def __init__(self, cfg: SshLauncherConfig, cluster: ClusterConfig) -> None:
        super().__init__(cfg, cluster)
        self.cfg: SshLauncherConfig = cfg
        self._hosts: dict[int, str] = {}
        self._spares: list[str] = []
        self._step = -1
        """The newest checkpoint that a machine told of: their folders may not be ours."""

    def faults(self, spec: LaunchSpec) -> Iterator[CrosstuneError]:
        """Too few machines, one named twice, too few slots."""
        hosts, faults = configured_hosts(self.cfg)
        yield from faults
        if not faults:
            yield from host_faults(hosts, spec)
        if shutil.which("ssh") is None:
            yield ConfigError("launcher", "there is no ssh on this machine", remedy="install the OpenSSH client")

    def render(self, spec: LaunchSpec, attempt: int) -> dict[str, str]:
        """The machines with their numbers."""
        return {HOSTS: to_hostfile(configured_hosts(self.cfg)[0], spec.nodes)}

    def submit(self, job: Job, folder: JobFolder) -> dict[str, Any]:
        """See `Launcher.submit`."""
        hosts, _ = parse_hostfile((folder.path / HOSTS).read_text(encoding="utf-8"), HOSTS)
        names = [host.name for host in hosts]
        self._hosts, self._spares = dict(enumerate(names[: job.spec.nodes])), names[job.spec.nodes :]
        return super().submit(job, folder)

    def newest_step(self, folder: JobFolder) -> int:
        """See `ForegroundLauncher.newest_step`; of the machines' own folders, too."""
        return max(newest_step(folder), self._step)

    def start(self, job: Job, folder: JobFolder, attempt: int, stops: StopSignals) -> int:
        """See `ForegroundLauncher.start`.

        Raises:
            ConfigError: a machine cannot take part; nothing was started anywhere.
            RunFailedError: of a later attempt, a machine did not come back.
        """
        cfg = self.cfg
        inbox: queue.Queue[Event] = queue.Queue()
        with Beats(cfg.heartbeat_seconds) as beats, Terminal(self.note) as terminal:
            session = _Session(self, job, folder, attempt, stops, inbox, beats, terminal)
            gathered = session.assemble(self._hosts, self._spares)
            try:
                running = Attempt(
                    attempt,
                    folder,
                    gathered.connections,
                    gathered.answers,
                    inbox,
                    stops,
                    silence_seconds=cfg.silence_seconds,
                    grace_seconds=job.spec.grace_seconds,
                    show=terminal.show,
                )
                code = running.run(session.order)
                self._step = max(self._step, running.step)
                return code
            finally:
                gathered.close()

    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        """Softly, nothing more is needed: the supervisor sees ``RUN/launch/cancelled``, and tells the machines.

        Raises:
            CheckpointError: hard, and the supervisor is on another machine.
        """
        if not hard:
            return
        supervisor = supervisor_here(job, folder)
        with suppress(psutil.NoSuchProcess):
            if supervisor is not None:
                supervisor.terminate()
                time.sleep(agent.REPEAT_SECONDS)
                supervisor.terminate()


class _Session:
    """What one attempt's machines are told, and who they are."""

    def __init__(
        self,
        launcher: SshLauncher,
        job: Job,
        folder: JobFolder,
        attempt: int,
        stops: StopSignals,
        inbox: queue.Queue[Event],
        beats: Beats,
        terminal: Terminal,
    ) -> None:
        self.cfg, self.job, self.folder, self.attempt = launcher.cfg, job, folder, attempt
        self.stops, self.inbox, self.beats, self.show = stops, inbox, beats, terminal.show
        self.python = job.spec.python or this_python()
        self.remote = agent_command([self.python, "python3"])
        self.master = ""
        self.secrets = secret_values(job.spec.secrets, os.environ)

    def assemble(self, hosts: dict[int, str], spares: list[str]) -> Gathered:
        """Machines that are ready. Spares replace those that are away; without one, a later attempt waits for them.

        Args:
            hosts: by number; brought up to date.
            spares: left; brought up to date.
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
            if time.monotonic() > give_up:
                found = f"did not come back within launcher.return_seconds={self.cfg.return_seconds}"
                remedy = f"crosstune resume {self.folder.run_dir} once it is there, or with a spare in launcher.hosts"
                raise RunFailedError(host, found, remedy=remedy)
            pause = time.monotonic() + KNOCK_SECONDS
            while time.monotonic() < pause and not self.stops.heard:
                time.sleep(0.2)

    def _gather(self, hosts: Mapping[int, str], *, keep: bool = True) -> Gathered:
        """All machines, ready and of one version; or the faults, and no connection left."""
        launch = uuid.uuid4().hex
        token = self.folder.path / f".seen-{launch}"
        self.master = self.job.spec.nodes > 1 and self._master_of(hosts.get(0)) or self.master or "127.0.0.1"
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
        connection = Connection(node, host, ssh_command(self.cfg, host, self.remote), self.inbox)
        self.beats.connections.append(connection)
        return connection

    def _master_of(self, host: str | None) -> str:
        """The address of machine 0, as ssh understands its name."""
        if self.cfg.master or host is None:
            return self.cfg.master or ""
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
            "mark": str(folder.path / "attempts" / f"{self.attempt:03}" / f"node-{node}.json"),
            "working_dir": spec.working_dir,
            "setup": list(spec.setup),
            "master": self.master,
            "python": self.python,
            "probe": with_setup([self.python, "-", "probe"], spec.setup),
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
            "files": {name: _text(name) for name in files},
        }

    def _tell_unshared(self, hosts: Mapping[int, str], gathered: Gathered) -> None:
        apart = [hosts[node] for node, answer in gathered.answers.items() if not answer["shared"]]
        if apart and self.attempt == self.job.attempt:
            where = f"{self.folder.run_dir} is on a disk of the machine's own: what is written there stays there"
            self.show(f"{', '.join(apart)}: {where}")


def _text(name: str) -> str:
    with open(name, encoding="utf-8") as file:
        return file.read()
