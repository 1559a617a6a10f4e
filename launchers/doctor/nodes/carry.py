"""Carries the questions to the nodes: to this machine, over ssh, through an allocation of Slurm, in pods."""

from __future__ import annotations

import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from configs.errors import ConfigError, CrosstuneError, first_line
from configs.schema.doctor_nodes import DoctorNodesConfig
from configs.schema.launcher_slurm import Container
from launchers.base import Launcher, with_setup
from launchers.doctor.nodes.request import Request, existing_part
from launchers.kubernetes.ask import PROGRAM, InPods
from launchers.kubernetes.base import KubernetesLauncher
from launchers.local import LocalLauncher
from launchers.slurm import SlurmLauncher
from launchers.slurm.launcher import LABEL
from launchers.slurm.script import container_mounts
from launchers.spec import MASTER, NODE, this_python
from launchers.ssh.connection import SSH_FAILED, address_of, ssh_command, ssh_fault
from launchers.ssh.hosts import configured_hosts
from launchers.ssh.launcher import SshLauncher
from launchers.torchrun import end_with_parent

COMMAND = ("-P", "-m", "launchers.doctor.nodes.look")
"""What Python runs on a node, with the request on standard input."""
IN_PLACE = f"""
if command -v scontrol >/dev/null; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    address=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p')
else # inside a container; n[01-04,07],login: n01
    first=$(sed -E 's/^([^[,]*)(\\[([0-9]+)[^]]*\\])?([^[,]*).*/\\1\\3\\4/' <<<"$SLURM_JOB_NODELIST")
fi
export {NODE}=$SLURM_PROCID {MASTER}=${{address:-$first}}
exec "$@"
"""
"""Shell: gives a task of Slurm its place, as the batch script of a job does."""

Heard = tuple[int, "Iterable[str] | CrosstuneError"]
"""A node's number, and the lines that it printed, or why it was not asked."""


class AsksNodes(Protocol):
    """Runs `COMMAND` on all nodes at the same time."""

    def node_names(self, nodes: int) -> Sequence[str]:
        """How the nodes reach each other, by number; empty where only the scheduler knows."""

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """Asks each node, and gives what it printed as it ends, in any order; who closes it takes the question back.

        Args:
            requests: by node number.
            seconds: after which nodes that have not ended are given up.
        """


def asker_of(cfg: DoctorNodesConfig, launcher: Launcher) -> AsksNodes:
    """Who asks the nodes of a launcher.

    Raises:
        ConfigError: it starts nothing on so many nodes, or nobody can ask them before a job runs there.
        ErrorGroup: its hosts are not right.
    """
    if isinstance(launcher, SshLauncher):
        return OverSsh(cfg, launcher)
    if isinstance(launcher, SlurmLauncher):
        return ThroughSlurm(cfg, launcher)
    if isinstance(launcher, KubernetesLauncher):
        return InPods(cfg, launcher, command_on_node(cfg, PROGRAM, inside=True))
    if isinstance(launcher, LocalLauncher) and cfg.nodes == 1:
        return ThisMachine()
    raise ConfigError(
        "launcher",
        f"{launcher.name}, whose {cfg.nodes} nodes cannot be asked from here",
        allowed="local with nodes=1, or one that starts machines",
        remedy="crosstune doctor nodes on each of them",
    )


class ThisMachine:
    """Asks this machine alone, in a process of its own."""

    def node_names(self, nodes: int) -> Sequence[str]:
        """This machine needs no name."""
        return ()

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """See `AsksNodes`."""
        for node, done in in_parallel({0: [sys.executable, *COMMAND]}, requests, seconds):
            yield node, done if isinstance(done, CrosstuneError) else lines_of(done)


class OverSsh:
    """Asks each host of a list by an ssh of its own."""

    def __init__(self, cfg: DoctorNodesConfig, launcher: SshLauncher) -> None:
        self.cfg, self.ssh = cfg, launcher.cfg
        hosts, faults = configured_hosts(launcher.cfg)
        for fault in faults:
            raise fault
        if len(hosts) < cfg.nodes:
            raise ConfigError("nodes", f"{cfg.nodes}, but {len(hosts)} hosts are listed", remedy="launcher.hosts=[...]")
        self.hosts = [host.name for host in hosts[: cfg.nodes]]

    def node_names(self, nodes: int) -> Sequence[str]:
        """What ssh makes of each: it may know aliases that the nodes do not."""
        names = [address_of(self.ssh, host) for host in self.hosts]
        return [self.ssh.master or names[0], *names[1:]]

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """See `AsksNodes`."""
        remote = "exec " + shlex.join(command_on_node(self.cfg))
        commands = {node: ssh_command(self.ssh, host, remote) for node, host in enumerate(self.hosts)}
        for node, done in in_parallel(commands, requests, seconds):
            if isinstance(done, CrosstuneError):
                yield node, done
            elif done.returncode == SSH_FAILED:
                yield node, ssh_fault(self.hosts[node], done.returncode, done.stderr)
            else:
                yield node, lines_of(done)


class ThroughSlurm:
    """Asks the nodes of an allocation that is made for it; which ones they are is Slurm's choice."""

    def __init__(self, cfg: DoctorNodesConfig, launcher: SlurmLauncher) -> None:
        self.cfg, self.slurm, self.cluster = cfg, launcher.cfg, launcher.cluster

    def node_names(self, nodes: int) -> Sequence[str]:
        """Only Slurm knows."""
        return ()

    def command(self, seconds: float) -> list[str]:
        """The srun, with what a job of the launcher would ask for."""
        cfg, slurm = self.cfg, self.slurm
        chosen = {key: getattr(slurm, key) for key in ("partition", "account", "qos")}
        devices = self.cluster.devices_per_node or cfg.nproc
        options = {
            **chosen,
            **{key: getattr(slurm, key) for key in ("reservation", "constraint", "nodelist", "exclude")},
            "cpus-per-task": cfg.cpus or None,
            "mem": f"{cfg.memory_gib}G" if cfg.memory_gib else None,
            "gres": f"{self.cluster.gres}:{devices}" if self.cluster.gres else None,
            "time": int(seconds / 60) + 2,
            "immediate": cfg.queue_seconds,
            "job-name": "crosstune-doctor",
        }
        shape = [f"--nodes={cfg.nodes}", f"--ntasks={cfg.nodes}", "--ntasks-per-node=1", "--label", "--wait=0"]
        asked = [f"--{key}={value}" for key, value in options.items() if value is not None]
        contained, command = self.contained(command_on_node(cfg, inside=slurm.container is not Container.none))
        asked += [*contained, *slurm.srun_extra]
        return ["srun", *shape, *asked, "--mpi=none", "bash", "-c", IN_PLACE, "crosstune", *command]

    def contained(self, command: Sequence[str]) -> tuple[list[str], list[str]]:
        """Options of srun, and a command, for the container in which a job would run."""
        slurm, folders = self.slurm, [os.getcwd()]
        if self.cfg.run_dir is not None:  # a run makes it; until then what is above it has to do
            folders.insert(0, str(existing_part(os.path.abspath(Path(self.cfg.run_dir).expanduser()))))
        mounts = ",".join(container_mounts(slurm, [each for each in dict.fromkeys(folders) if each != "/"]))
        if slurm.container is Container.pyxis:
            options = [f"--container-image={slurm.image}", f"--container-mounts={mounts}"]
            return [*options, *slurm.container_args], list(command)
        if slurm.container is Container.apptainer:
            bound = ["--bind", mounts] if mounts else []
            return [], ["apptainer", "exec", *bound, *slurm.container_args, str(slurm.image), *command]
        return [], list(command)

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """See `AsksNodes`. srun gives its standard input to all tasks."""
        [(_, done)] = in_parallel({0: self.command(seconds)}, requests, seconds + self.cfg.queue_seconds)
        if isinstance(done, CrosstuneError):
            yield from ((request.node, done) for request in requests)
            return
        said: dict[int, list[str]] = {}
        for line in done.stdout.splitlines():
            if label := LABEL.fullmatch(line):
                said.setdefault(int(label[1]), []).append(label[2])
        refusal = CrosstuneError("srun", f"Slurm: {first_line(done.stderr) or 'no message'}")
        yield from ((request.node, said.get(request.node, refusal)) for request in requests)


def command_on_node(cfg: DoctorNodesConfig, program: Sequence[str] = COMMAND, *, inside: bool = False) -> list[str]:
    """What a node runs, with the environment and the setup that a job would have there.

    Args:
        cfg: what is meant to run.
        program: for Python.
        inside: in a container, which has a Python of its own.
    """
    variables = [f"{name}={value}" for name, value in {**cfg.cluster.environment, **cfg.environment}.items()]
    command = [cfg.python or ("python3" if inside else this_python()), *program]
    return with_setup(["env", *variables, *command] if variables else command, cfg.cluster.setup)


def in_parallel(
    commands: Mapping[int, Sequence[str]], requests: Sequence[Request], seconds: float
) -> Iterator[tuple[int, subprocess.CompletedProcess[str] | CrosstuneError]]:
    """Runs commands at the same time, each with its request on standard input; gives each as it ends.

    Args:
        commands: by node.
        requests: by node number.
        seconds: after which those that are left are ended.
    """
    ended: queue.Queue[tuple[int, subprocess.CompletedProcess[str] | CrosstuneError]] = queue.Queue()

    def follow(node: int, process: subprocess.Popen[str]) -> None:
        try:
            out, err = process.communicate(requests[node].to_json(), timeout=seconds)
            ended.put((node, subprocess.CompletedProcess(process.args, process.returncode, out, err)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            ended.put((node, CrosstuneError(f"node {node}", f"nothing came within {seconds:.0f} s")))

    started = 0
    for node, command in commands.items():
        try:  # by this thread, which stays: Linux ends the child with the thread that forked it
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            found = f"'{command[0]}' cannot be run here: {error.strerror}"
            ended.put((node, ConfigError("launcher", found, remedy="doctor where the jobs are launched from")))
        else:
            threading.Thread(target=follow, args=(node, process), daemon=True).start()
        started += 1
    for _ in range(started):
        yield ended.get()


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a process said, its report last."""
    return [*done.stderr.splitlines(), *done.stdout.splitlines()]
