"""A real Slurm cluster of two nodes on this machine: slurmctld and one slurmd per node, without systemd.

Every test of a file shares one. Its configuration, state, key and logs lie in one folder, its daemons listen on free
ports of the loopback interface, and nothing of the machine's own Slurm, if it has one, is touched.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

NODES = ("n1", "n2")
DEVICES = 8
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONFIG = """\
ClusterName=crosstune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire={cred_expire}
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SlurmctldParameters={controller}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
EnforcePartLimits=ALL
SlurmdTimeout=15
KillWait=5
GresTypes=gpu,npu
{nodes}
PartitionName=low Nodes={names} Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes={names} MaxTime=60 PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres={gres}"
GRES = f"npu:{DEVICES},gpu:ascend910b:{DEVICES}"


class SlurmCluster:
    """See the module.

    Args:
        root: a folder of its own.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "slurm.conf"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *, controller: str = "preempt_send_user_signal", cred_expire: int = 30) -> None:
        """Brings it up; returns when all nodes are idle."""
        (self.root / "state").mkdir(parents=True, exist_ok=True)
        self._write_config(controller, cred_expire)
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        options = [f"--{option}={self.root}/munge.{name}" for option, name in files.items()]
        self._start("munged", "--foreground", "--force", *options)
        self._until((self.root / "munge.socket").exists, "munged")
        self.start_controller("-c")
        for name in NODES:
            self.start_node(name)

    def start_controller(self, *options: str) -> None:
        """Starts slurmctld with the jobs that it had; with ``-c`` it forgets them."""
        self._start("slurmctld", "-D", *options, "-f", str(self.config))

    def stop_controller(self) -> None:
        """As an administrator does who starts it anew."""
        daemon = self._processes.pop("slurmctld")
        daemon.terminate()
        daemon.wait(60)

    @contextmanager
    def silent_controller(self) -> Iterator[None]:
        """Takes what it is sent, and answers once it goes on."""
        daemon = self._processes["slurmctld"]
        daemon.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            daemon.send_signal(signal.SIGCONT)

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd, and waits until the controller has it: idle, or with a job that waited for it."""
        self._start(f"slurmd {name}", "-D", "-N", name, "-f", str(self.config))
        there = ("idle", "mix", "alloc")
        self._until(lambda: self.run("sinfo", "-h", "-n", name, "-o", "%t", "-p", "low").strip() in there, name)

    def kill_node(self, name: str) -> None:
        """As if its power were cut: slurmd and all that Slurm started there."""
        daemon = self._processes.pop(f"slurmd {name}")
        daemon.kill()
        daemon.wait()
        for process in self.processes_of(name):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def processes_of(self, name: str) -> list[psutil.Process]:
        """Of jobs, on a node: what Slurm started there, and its own part of them."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                variables = process.environ()
                ours = variables.get("SLURM_CONF") == str(self.config)
                steps = process.name() == "slurmstepd" and name in " ".join(process.cmdline())
                if ours and (variables.get("SLURMD_NODENAME") == name or steps):
                    found.append(process)
        return found

    def stop(self) -> None:
        """Ends every job, then the daemons."""
        self.run("scancel", "--user=root", "--quiet")
        self._until(lambda: not self.run("squeue", "-h").strip(), "jobs' end", must=False)
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def environment(self) -> dict[str, str]:
        """Of commands that talk to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.config)}

    def run(self, *command: str) -> str:
        """Output of one of Slurm's commands; empty where it failed."""
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return done.stdout.decode()

    def field(self, job: str, name: str) -> str:
        """Of ``scontrol show job``, such as JobState or Restarts; empty where there is none."""
        found = re.search(rf"\b{name}=(\S*)", self.run("scontrol", "-o", "show", "job", job))
        return found.group(1) if found else ""

    def logs(self) -> str:
        """The last lines of every daemon, for a test that failed."""
        files = sorted(self.root.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def _write_config(self, controller: str, cred_expire: int) -> None:
        host = socket.gethostname().split(".")[0]
        port, *ports = _free_ports(1 + len(NODES))
        lines = [
            NODE.format(name=name, host=host, port=port, gres=GRES) for name, port in zip(NODES, ports, strict=True)
        ]
        names = ",".join(NODES)
        text = CONFIG.format(
            host=host,
            port=port,
            root=self.root,
            nodes="\n".join(lines),
            names=names,
            controller=controller,
            cred_expire=cred_expire,
        )
        self.config.write_text(text)
        # Any file will do for a device that nothing constrains.
        for number in range(DEVICES):
            (self.root / f"device{number}").touch()
        files = f"File={self.root}/device[0-{DEVICES - 1}]"
        kinds = ("Name=npu", "Name=gpu Type=ascend910b")
        (self.root / "gres.conf").write_text("".join(f"NodeName={names} {kind} {files}\n" for kind in kinds))
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _start(self, name: str, *options: str) -> None:
        program = name.split()[0]
        path = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert path is not None
        with (self.root / f"{name.replace(' ', '-')}.out.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [path, *options], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _until(self, happened: Callable[[], bool], what: str, *, seconds: float = 60, must: bool = True) -> None:
        give_up = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > give_up:
                assert not must, f"Slurm: {what} did not come up\n{self.logs()}"
                return
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster that is up; a failure in CI where it cannot be, a skip elsewhere."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    lack = f"not installed: {', '.join(missing)}" if missing else "needs root" if os.geteuid() else None
    if lack:
        assert "CI" not in os.environ, f"CI must have Slurm: {lack}"
        pytest.skip(f"no Slurm: {lack} (Debian: apt install slurm-wlm munge)")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
