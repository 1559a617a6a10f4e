"""Carries the questions to the nodes: to this machine, over ssh, through an allocation of Slurm, in pods."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from configs.errors import ConfigError, CrosstuneError, first_line
from configs.schema.doctor_nodes import DoctorNodesConfig
from configs.schema.launcher_slurm import Container
from launchers.base import Launcher, with_setup
from launchers.doctor.nodes.converse import Asker, Ended, Heard
from launchers.doctor.nodes.request import HELLO, Request, existing_part
from launchers.kubernetes.ask import PROGRAM, InPods
from launchers.kubernetes.base import KubernetesLauncher
from launchers.local import LocalLauncher
from launchers.slurm import SlurmLauncher
from launchers.slurm.launcher import LABEL
from launchers.slurm.script import container_mounts
from launchers.spec import MASTER, NODE, this_python
from launchers.ssh.connection import OVERLOADED, SSH_FAILED, address_of, ssh_command, ssh_fault
from launchers.ssh.gather import LOGIN_SECONDS, PAUSE_SECONDS, TRIES
from launchers.ssh.hosts import configured_hosts
from launchers.ssh.launcher import SshLauncher

COMMAND = ("-P", "-m", "launchers.doctor.nodes.look")
"""What Python runs on a node, with the request on standard input."""
START_SECONDS = 30.0
"""For Python on this machine."""
CANNOT_RUN = (126, 127)
"""Exit codes of a shell, and of env, that has not found a command or must not run it."""
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


class AsksNodes(Protocol):
    """Runs `COMMAND` on all nodes at the same time."""

    def node_names(self, nodes: int) -> Sequence[str]:
        """What the user calls them, by number; empty where only the scheduler knows."""

    def node_addresses(self, nodes: int) -> Sequence[str]:
        """How the nodes reach each other, likewise."""

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """Asks each node, and gives what it printed as it ends, in any order; who closes it takes the question back.

        Args:
            requests: by node number.
            seconds: that a node has to answer.
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


class ThisMachine(Asker):
    """Asks this machine alone, in a process of its own."""

    first_seconds = START_SECONDS

    def node_names(self, nodes: int) -> Sequence[str]:
        """This machine needs no name."""
        return ()

    node_addresses = node_names

    def called(self, node: int) -> str:
        """See `Asker`."""
        return "this machine"

    def commands(self, nodes: int, seconds: float) -> Mapping[tuple[int, ...], Sequence[str]]:
        """See `Asker`."""
        return {(0,): [sys.executable, *COMMAND]}

    def fault(self, node: int, ended: Ended) -> CrosstuneError:
        """See `Asker`."""
        return unreported(self.called(node), ended, sys.executable)


class OverSsh(Asker):
    """Asks each host of a list by an ssh of its own, so many at a time and with such patience as the launcher."""

    def __init__(self, cfg: DoctorNodesConfig, launcher: SshLauncher) -> None:
        self.cfg, self.ssh = cfg, launcher.cfg
        hosts, faults = configured_hosts(launcher.cfg)
        for fault in faults:
            raise fault
        if len(hosts) < cfg.nodes:
            raise ConfigError("nodes", f"{cfg.nodes}, but {len(hosts)} hosts are listed", remedy="launcher.hosts=[...]")
        self.hosts = [host.name for host in hosts[: cfg.nodes]]
        self.parallel = self.ssh.parallel
        self.first_seconds = self.ssh.connect_seconds + max(LOGIN_SECONDS, cfg.patience_seconds)

    def node_names(self, nodes: int) -> Sequence[str]:
        """As the user wrote them, without the user to log in as."""
        return [host.rpartition("@")[2] for host in self.hosts]

    def node_addresses(self, nodes: int) -> Sequence[str]:
        """What ssh makes of each: it may know aliases that the nodes do not."""
        found = [address_of(self.ssh, host) for host in self.hosts]
        return [self.ssh.master or found[0], *found[1:]]

    def called(self, node: int) -> str:
        """See `Asker`."""
        return self.hosts[node]

    def commands(self, nodes: int, seconds: float) -> Mapping[tuple[int, ...], Sequence[str]]:
        """See `Asker`."""
        remote = "exec " + shlex.join(command_on_node(self.cfg))
        return {(node,): ssh_command(self.ssh, host, remote) for node, host in enumerate(self.hosts)}

    def again(self, ended: Ended) -> float | None:
        """See `Asker`: as the launcher does."""
        overloaded = ended.code == SSH_FAILED and OVERLOADED.search(ended.complaints)
        return PAUSE_SECONDS * ended.tries if overloaded and ended.tries < TRIES else None

    def fault(self, node: int, ended: Ended) -> CrosstuneError:
        """See `Asker`."""
        host = self.hosts[node]
        if ended.code == SSH_FAILED:
            return ssh_fault(host, ended.code, ended.complaints)
        return unreported(host, ended, python_of(self.cfg))


class ThroughSlurm(Asker):
    """Asks the nodes of an allocation that is made for it; which ones they are is Slurm's choice."""

    def __init__(self, cfg: DoctorNodesConfig, launcher: SlurmLauncher) -> None:
        self.cfg, self.slurm, self.cluster = cfg, launcher.cfg, launcher.cluster
        self.first_seconds = cfg.queue_seconds + max(LOGIN_SECONDS, cfg.patience_seconds)

    def node_names(self, nodes: int) -> Sequence[str]:
        """Only Slurm knows."""
        return ()

    node_addresses = node_names

    def called(self, node: int) -> str:
        """See `Asker`."""
        return f"node {node}"

    def command(self, seconds: float) -> list[str]:
        """The srun, with what a job of the launcher would ask for.

        Args:
            seconds: that a node may take to answer.
        """
        cfg, slurm = self.cfg, self.slurm
        chosen = {key: getattr(slurm, key) for key in ("partition", "account", "qos")}
        devices = self.cluster.devices_per_node or cfg.nproc
        options = {
            **chosen,
            **{key: getattr(slurm, key) for key in ("reservation", "constraint", "nodelist", "exclude")},
            "cpus-per-task": cfg.cpus or None,
            "mem": f"{cfg.memory_gib}G" if cfg.memory_gib else None,
            "gres": f"{self.cluster.gres}:{devices}" if self.cluster.gres else None,
            "time": int((self.first_seconds + seconds) / 60) + 2,
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

    def commands(self, nodes: int, seconds: float) -> Mapping[tuple[int, ...], Sequence[str]]:
        """See `Asker`. srun gives its standard input to all tasks."""
        return {tuple(range(nodes)): self.command(seconds)}

    def whose(self, nodes: Sequence[int], line: str) -> tuple[int, str] | None:
        """See `Asker`: by srun's label."""
        label = LABEL.fullmatch(line)
        return (int(label[1]), label[2]) if label else None

    def fault(self, node: int, ended: Ended) -> CrosstuneError:
        """See `Asker`."""
        complaints = ended.complaints.splitlines()
        own = [found[1] for line in complaints if (found := self.whose((), line)) and found[0] == node]
        if own or ended.out:
            inside = self.slurm.container is not Container.none
            own_end = Ended(ended.code, ended.out, "\n".join(own), ended.tries)
            return unreported(self.called(node), own_end, python_of(self.cfg, inside=inside))
        return CrosstuneError("srun", f"Slurm: {first_line(ended.complaints) or 'no message'}")


def command_on_node(cfg: DoctorNodesConfig, program: Sequence[str] = COMMAND, *, inside: bool = False) -> list[str]:
    """What a node runs, with the environment and the setup that a job would have there.

    Args:
        cfg: what is meant to run.
        program: for Python.
        inside: in a container, which has a Python of its own.
    """
    variables = [f"{name}={value}" for name, value in {**cfg.cluster.environment, **cfg.environment}.items()]
    command = [python_of(cfg, inside=inside), *program]
    return with_setup(["env", *variables, *command] if variables else command, cfg.cluster.setup)


def python_of(cfg: DoctorNodesConfig, *, inside: bool = False) -> str:
    """The interpreter on the nodes; a container has one of its own."""
    return cfg.python or ("python3" if inside else this_python())


def unreported(where: str, ended: Ended, python: str) -> CrosstuneError:
    """Why a node that was reached has given no report.

    Args:
        where: the node.
        ended: how.
        python: that it was to run.
    """
    out = [line for line in ended.out if HELLO not in line]
    # A greeting goes to standard output, too; what went wrong does not.
    said = [*out, *ended.complaints.splitlines()]
    last = next((line.strip()[:200] for line in reversed(said) if line.strip()), "nothing")
    found = f"it ended without one, with code {ended.code}; it said last: {last}"
    if ended.code in CANNOT_RUN:
        return ConfigError(where, f"'{python}' cannot be run there: {last}", remedy="python=PATH of one that is there")
    if "No module named" in last:
        return ConfigError(where, found, remedy=f"install crosstune for '{python}' there, or python=PATH of another")
    return CrosstuneError(where, found)
