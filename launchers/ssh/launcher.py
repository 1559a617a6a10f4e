"""Machines reached by ssh, started and watched from the foreground; see the package."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil

from configs.errors import ConfigError, CrosstuneError
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_ssh import SshLauncherConfig
from launchers import agent
from launchers.foreground import ForegroundLauncher, supervisor_here
from launchers.job import Job, JobFolder
from launchers.node import raise_file_limit
from launchers.spec import LaunchSpec
from launchers.ssh.attempt import Attempt
from launchers.ssh.beats import Beats
from launchers.ssh.connection import Event
from launchers.ssh.hosts import configured_hosts, host_faults, idle_devices, parse_hostfile, to_hostfile
from launchers.ssh.session import Session
from launchers.supervise import StopSignals, newest_step
from launchers.terminal import Terminal, lines_missing, say

HOSTS = "hosts"
"""The rendered file: the machines in order, spares last."""


class SshLauncher(ForegroundLauncher):
    """See the module."""

    name = "ssh"
    note = staticmethod(say)

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
        yield from host_faults(hosts, spec, unread=len(faults))
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
        if idle := idle_devices(hosts[: job.spec.nodes], job.spec.nproc):
            self.note(idle)
        if self._spares:
            self.note(f"machines: {', '.join(self._hosts.values())}; spares: {', '.join(self._spares)}")
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
        raise_file_limit()
        inbox: queue.Queue[Event] = queue.Queue()
        with Beats(cfg.heartbeat_seconds) as beats, Terminal(self.note, lines_missing) as terminal:
            session = Session(cfg, job, folder, attempt, stops, inbox, beats, terminal.show)
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
