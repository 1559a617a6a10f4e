"""`crosstune doctor nodes` on hosts in namespaces of this machine, each with a fault that was planted for real."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.errors import CrosstuneError
from launchers.doctor.nodes.carry import COMMAND, unreported
from launchers.doctor.nodes.command import doctor_nodes
from launchers.doctor.nodes.converse import Asker, Ended
from tests.command import crosstune
from tests.net_lab import SSHD, NetLab, net_lab, wait_for
from tests.slurm_cluster import SlurmCluster
from tests.standin import StandinKit

pytest_plugins = ["tests.slurm_cluster"]

FAST_CLOCK = """
import importlib.machinery, importlib.util, os, sys, time
true = time.time
time.time = lambda: true() + 90.0
rest = [path for path in sys.path if path != os.path.dirname(__file__)]
if spec := importlib.machinery.PathFinder.find_spec("sitecustomize", rest):  # the stand-in begins by one, too
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


@dataclass
class Plant:
    """One fault: what is done to a machine, and how the doctor names it."""

    check: str
    says: str
    before: str = "true"
    """The shell's, in the host's network and in mounts of the command's own."""
    environment: dict[str, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    hosts: dict[str, str] = field(default_factory=dict)
    """Lines of its /etc/hosts that are wrong."""
    on_first: str = ""
    """A command on the first host instead."""


def plants(folder: Path, run_dir: Path, blocked: str) -> dict[str, Plant]:
    """All faults but too few devices, by name.

    Args:
        folder: for what they need.
        run_dir: of the run that is meant.
        blocked: the address of the host whose way to the port is blocked.
    """
    older = folder / "older/torch-2.12.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    clock = folder / "clock"
    clock.mkdir()
    (clock / "sitecustomize.py").write_text(FAST_CLOCK)
    # What the first host's port answers is dropped, as by a firewall on the way.
    rule = f"ip rule add pref 100 to {blocked} ipproto tcp sport 29500 blackhole"
    tmpfs = "mount -t tmpfs -o size=1m none"
    return {
        "wrong host name": Plant("names", "'n0' is 10.77.0.99 here", hosts={"n0": "10.77.0.99"}),
        "blocked port": Plant("rendezvous", "cannot reach n0:29500: no answer", on_first=rule),
        "full disk": Plant("disk", "needed", before=f"{tmpfs} /mnt", environment={"TMPDIR": "/mnt"}),
        "version mismatch": Plant("versions", "torch 2.12.0 (2.13.0", environment={"PYTHONPATH": str(older.parent)}),
        "tiny shm": Plant("shm", "/dev/shm has 1.0 MiB free", before=f"{tmpfs} /dev/shm"),
        "clock skew": Plant("clock", "s fast against this host's", environment={"PYTHONPATH": str(clock)}),
        "no shared folder": Plant("folder", "does not see what n0 writes", before=f"mount -t tmpfs none {run_dir}"),
        "misspelt HCCL variable": Plant(
            "device", "HCCL_CONECT_TIMEOUT: no such variable", environment={"HCCL_CONECT_TIMEOUT": "600"}
        ),
        "CANN not sourced": Plant("device", "CANN's environment is not set", unset=("ASCEND_HOME_PATH",)),
    }


class Lab(Asker):
    """A launcher over a lab: asks all hosts at once, with a fault planted on some."""

    first_seconds = 60.0

    def __init__(self, lab: NetLab, planted: dict[str, Plant], environment: dict[str, str]) -> None:
        self.lab, self.planted, self.environment = lab, planted, environment
        for plant in planted.values():
            if plant.on_first:
                assert lab.run_on("n0", *plant.on_first.split()).returncode == 0

    def node_names(self, nodes: int) -> Sequence[str]:
        return self.lab.names[:nodes]

    node_addresses = node_names

    def called(self, node: int) -> str:
        return self.lab.names[node]

    def fault(self, node: int, ended: Ended) -> CrosstuneError:
        return unreported(self.called(node), ended, sys.executable)

    def commands(self, nodes: int, seconds: float) -> Mapping[tuple[int, ...], Sequence[str]]:
        return {(node,): self._command(name) for node, name in enumerate(self.lab.names[:nodes])}

    def _command(self, name: str) -> list[str]:
        plant = self.planted.get(name, Plant("", ""))
        environment = {"OMP_NUM_THREADS": "1"} | self.environment | plant.environment
        path = [*(each.get("PYTHONPATH", "") for each in (plant.environment, self.environment)), *sys.path]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        changed = [*(f"--unset={each}" for each in plant.unset)]
        changed += [f"{key}={value}" for key, value in environment.items() if key not in plant.unset]
        hosts = self.lab.folder / f"hosts-{name}"
        addresses = {each: self.lab.address(each) for each in self.lab.names} | plant.hosts
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{each} {host}\n" for host, each in addresses.items()))
        script = f'mount --bind {hosts} /etc/hosts && {plant.before} && exec "$@"'
        words = ["unshare", "--mount", "sh", "-c", script, "sh", "env", *changed, sys.executable, *COMMAND]
        return self.lab.on(name, words)


def diagnosis(lab: NetLab, planted: dict[str, Plant], environment: dict[str, str], *words: str) -> dict[str, Any]:
    """The doctor's report on a lab with these faults."""
    cfg = compose("doctor_nodes", [f"nodes={len(lab.names)}", *words])
    return doctor_nodes(cfg, Lab(lab, planted, environment))


def faults_by_node(report: dict[str, Any], level: str = "") -> dict[str, list[tuple[str, str]]]:
    """Check and text of each finding (of a level), by node."""
    found: dict[str, list[tuple[str, str]]] = {node["name"]: [] for node in report["nodes"]}
    for finding in (each for each in report["findings"] if each["level"].startswith(level)):
        for name in finding["nodes"]:
            found[name].append((finding["check"], finding["what"]))
            assert finding["remedy"], f"no remedy: {finding}"
    return found


@pytest.fixture
def cann(tmp_path: Path) -> dict[str, str]:
    """The environment in which CANN is sourced, as far as can be told without loading anything."""
    (tmp_path / "cann/lib64").mkdir(parents=True)
    return {"ASCEND_HOME_PATH": str(tmp_path / "cann")}


def test_planted_faults_on_one_cluster_are_each_found_on_their_node_and_nothing_else(tmp_path, cann, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    each = plants(tmp_path, run_dir, "10.77.0.14") | {
        "way back blocked": Plant(
            "rendezvous",
            "reaches n0:29500, but is not reached from there: no answer",
            before="ip rule add pref 90 ipproto tcp dport 29500 lookup main"
            " && ip rule add pref 100 to 10.77.0.11 ipproto tcp blackhole",
        ),
        "dead node": Plant("answer", "it said last: n12 burns", before="echo n12 burns && exit 3"),
    }
    with net_lab(tmp_path, len(each) + 2) as lab:
        planted = dict(zip(lab.names[2:], each.values(), strict=True))
        words = [f"run_dir={run_dir}", "device=ascend", "quick=true", "patience_seconds=10", "needed_gib=0.01"]
        report = diagnosis(lab, planted, cann, *words)
    print(capsys.readouterr().out)
    found = faults_by_node(report)
    assert report["exit_code"] == 2
    assert found["n0"] == found["n1"] == []
    for name, plant in planted.items():
        assert [check for check, _ in found[name]] == [plant.check], f"{name}: {found[name]}"
        assert plant.says in found[name][0][1]
    assert [path.name for path in run_dir.iterdir()] == [], "the doctor leaves nothing behind"


def test_too_few_devices_are_found_on_the_standin(standin: StandinKit, tmp_path):
    words = ["doctor", "nodes", "device=ascend", "nproc=2", f"run_dir={tmp_path}", "--json"]
    report = json.loads(standin.crosstune(*words, "allreduce_mib=0", code=2, devices=1).splitlines()[-1])
    (fault,) = (each for each in report["findings"] if each["level"] == "fault")
    assert fault["check"] == "device" and fault["what"].startswith("nproc: 2 processes") and fault["remedy"]
    assert report["nodes"][0]["report"]["facts"]["device"]["device"] == "ascend"


@pytest.mark.slow  # the planted faults are found beside healthy machines
def test_a_healthy_pair_runs_an_all_reduce(tmp_path, capsys):
    """Each gloo listens on the address of its own machine: neither has the other's loopback."""
    with net_lab(tmp_path, 2) as lab:
        words = ["device=cpu", f"run_dir={tmp_path}", "allreduce_mib=1", "allreduce_seconds=120", "needed_gib=0.01"]
        report = diagnosis(lab, {}, {}, *words)
    print(out := capsys.readouterr().out)
    assert report["findings"] == [] and report["exit_code"] == 0
    assert all(node["report"]["facts"]["allreduce"]["gb_per_s"] > 0 for node in report["nodes"])
    assert out.startswith("2 nodes  a run can start\n") and out.count("GB/s") == 2 and "listens" in out


FAULTS = (
    *("wrong host name", "blocked port", "full disk", "version mismatch", "too few devices", "tiny shm"),
    *("clock skew", "no shared folder", "misspelt HCCL variable", "CANN not sourced"),
)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_each_of_ten_faults_alone_on_three_hosts_with_the_standin(standin: StandinKit, tmp_path, capsys, fault):
    """The whole look but for the all-reduce: the stand-in's ranks meet on one host only."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    known = plants(tmp_path, run_dir, "10.77.0.13")
    known["too few devices"] = Plant("device", "nproc: 2 processes", environment={"ASCEND_RT_VISIBLE_DEVICES": "0"})
    with net_lab(tmp_path, 3) as lab:
        words = ["device=ascend", "nproc=2", "allreduce_mib=0", f"run_dir={run_dir}", "needed_gib=0.01"]
        report = diagnosis(lab, {"n2": known[fault]}, standin.environment(devices=2), *words, "patience_seconds=30")
    print(capsys.readouterr().out)
    found = {name: each for name, each in faults_by_node(report, level="fault").items() if each}
    assert found.keys() == {"n2"} and report["exit_code"] == 2
    assert {check for check, _ in found["n2"]} == {known[fault].check}
    assert known[fault].says in "\n".join(what for _, what in found["n2"])


@pytest.mark.slow
def test_the_all_reduce_of_the_device_itself(standin: StandinKit, tmp_path):
    report = json.loads(standin.crosstune("doctor", "nodes", "device=ascend", "nproc=2", "--json").splitlines()[-1])
    assert report["exit_code"] == 0 and report["nodes"][0]["report"]["facts"]["allreduce"]["gb_per_s"] > 0


STOPS = """
import os, signal
if os.environ.get("RANK") == "1":
    from torch import distributed
    distributed.init_process_group = lambda *a, **k: os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
def test_an_all_reduce_that_hangs_names_the_rank_and_ends(tmp_path, capsys):
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang/sitecustomize.py").write_text(STOPS)
    with net_lab(tmp_path, 3) as lab:
        planted = {"n1": Plant("allreduce", "rank 1 gave no sign", environment={"PYTHONPATH": str(tmp_path / "hang")})}
        began = time.monotonic()
        words = ["device=cpu", f"run_dir={tmp_path}", "allreduce_mib=1", "allreduce_seconds=80", "needed_gib=0.01"]
        report = diagnosis(lab, planted, {}, *words)
        assert time.monotonic() - began < 200
    print(capsys.readouterr().out)
    assert [(each["check"], each["nodes"]) for each in report["findings"]] == [("allreduce", ["n1"])]
    assert "rank 1 gave no sign" in report["findings"][0]["what"]


def test_a_full_run_dir_and_a_taken_port_are_of_all_nodes_and_of_the_first(tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with net_lab(tmp_path, 2) as lab:
        full = Plant("disk", "needed", before=f"mount -t tmpfs -o size=1m none {run_dir}")
        holder = lab.on("n0", [sys.executable, "-c", HOLD])
        with subprocess.Popen(holder, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            words = ["device=cpu", "quick=true", f"run_dir={run_dir}", "patience_seconds=3"]
            report = diagnosis(lab, dict.fromkeys(lab.names, full), {}, *words)
            process.terminate()
    print(capsys.readouterr().out)
    found = faults_by_node(report)
    assert [check for check, _ in found["n0"]] == ["disk", "rendezvous"] and "is taken by python" in found["n0"][1][1]
    assert [check for check, _ in found["n1"]] == ["disk"], "that it does not get through is the first node's fault"


HOLD = """
import socket
server = socket.create_server(("", 29500))
print("holds", flush=True)
server.accept()[0].recv(1)
server.accept()[0].recv(1)
"""


def test_real_ssh_carries_the_questions_and_a_host_that_is_off_is_named(tmp_path):
    with net_lab(tmp_path, 3) as lab:
        lab.switch_off("n2")
        words = [
            *("doctor", "nodes", "launcher=ssh", "nodes=3", "launcher.hosts=[n0,root@n1,n2]", "quick=true", "--json"),
            *(f"launcher.config={lab.ssh_config}", "launcher.connect_seconds=2", "patience_seconds=3", "device=cpu"),
            *(f"environment.PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", "needed_gib=0.01"),
            f"run_dir={tmp_path}",
        ]
        out = crosstune(*words, code=2, prefix=lab.from_client([]))
    report = json.loads(out.splitlines()[-1])
    assert [each["name"] for each in report["nodes"]] == ["n0", "n1", "n2"]
    assert report["nodes"][1]["report"]["facts"]["meeting"]["reached"] and report["nodes"][2]["report"] is None
    (fault,) = report["findings"]
    assert fault["nodes"] == ["n2"] and "cannot be reached" in fault["what"]


def ssh_words(lab: NetLab, *words: str) -> list[str]:
    """Of a doctor over ssh."""
    return [
        *("doctor", "nodes", "launcher=ssh", "quick=true", "--json", "device=cpu", "needed_gib=0.01"),
        *(f"launcher.config={lab.ssh_config}", f"environment.PYTHONPATH={os.pathsep.join(filter(None, sys.path))}"),
        *words,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_doctor_that_is_ended_leaves_no_port_and_no_file_on_the_hosts(number, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with net_lab(tmp_path, 3) as lab:
        lab.switch_off("n2")
        words = ssh_words(lab, "nodes=3", "launcher.hosts=[n0,n1,n2]", f"run_dir={run_dir}")
        words.append("launcher.connect_seconds=1")
        command = lab.from_client([sys.executable, "-P", "-m", "launchers.cli", *words, "patience_seconds=60"])
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            wait_for(lambda: any(run_dir.iterdir()), 60)
            process.send_signal(number)
            process.communicate(timeout=20)
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        wait_for(lambda: not any("doctor.nodes.look" in each for each in lab.processes("n0").values()), 3)
        assert list(run_dir.iterdir()) == []
        out = crosstune(*words, "nodes=2", prefix=lab.from_client([]))
    assert json.loads(out.splitlines()[-1])["findings"] == []


@pytest.mark.slow
def test_names_that_only_the_login_host_knows_and_a_debian_host_name_are_no_fault(tmp_path, monkeypatch):
    """Hosts are shown as they were written; no more logins at a time than the jump host takes."""
    with net_lab(tmp_path, 7) as lab:
        aliases = "".join(f"Host node-{name}\n  HostName {lab.address(name)}\n" for name in lab.names[:6])
        aliases += "Host node-n*\n  ProxyJump n6\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        lab.ssh_config.write_text(aliases + lab.ssh_config.read_text())
        lab.switch_off("n6")
        monkeypatch.setattr("tests.net_lab.SSHD", SSHD.replace("MaxStartups 100", "MaxStartups 2:100:2"))
        lab.switch_on("n6")
        own = tmp_path / "debian"
        own.write_text(f"127.0.0.1 localhost\n127.0.1.1 n0\n{lab.address('n0')} first\n")
        assert lab.run_on("n0", "mount", "--bind", str(own), "/etc/hosts").returncode == 0
        hosts = ",".join(f"node-{name}" for name in lab.names[:6])
        words = ssh_words(lab, "nodes=6", f"launcher.hosts=[{hosts}]", f"run_dir={tmp_path}")
        out = crosstune(*words, prefix=lab.from_client([]))
        found = json.loads(out.splitlines()[-1])
        assert [each["name"] for each in found["nodes"]] == [f"node-{name}" for name in lab.names[:6]]
        assert found["findings"] == [], out
        assert {each["report"]["facts"]["way"]["interface"] for each in found["nodes"]} == {"eth0"}
        # By the name that is its loopback interface's on itself: a run takes the only other interface that there is.
        crosstune(*words, "launcher.master=n0", "launcher.parallel=2", prefix=lab.from_client([]))
        links = ("link add d0 type veth peer name d1", "link set d0 up", "link set d1 up")
        for command in (*links, "addr add 10.99.0.1/24 dev d0"):
            assert lab.run_on("n0", "ip", *command.split()).returncode == 0
        out = crosstune(*words, "launcher.master=n0", "launcher.parallel=2", code=2, prefix=lab.from_client([]))
    [fault] = json.loads(out.splitlines()[-1])["findings"]
    assert fault["nodes"] == ["node-n0"] and fault["check"] == "interface" and "eth0, d0" in fault["what"]


@pytest.mark.slow
def test_slurm_carries_the_questions_to_the_nodes_that_it_gives(slurm: SlurmCluster):
    """Its two nodes are this machine, which the doctor says."""
    words = ["doctor", "nodes", "launcher=slurm", "nodes=2", "quick=true", "device=cpu", "needed_gib=0.01", "--json"]
    words += [f"environment.PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", "master_port=29611"]
    report = json.loads(crosstune(*words, **slurm.environment).splitlines()[-1])
    assert report["nodes"][1]["report"]["facts"]["meeting"]["reached"]
    assert any("is the same machine as node 0" in finding["what"] for finding in report["findings"])
    refused = crosstune(*words, "launcher.partition=nowhere", code=2, **slurm.environment)
    (fault,) = json.loads(refused.splitlines()[-1])["findings"]
    assert "invalid partition" in fault["what"].lower() and len(fault["nodes"]) == 2


@pytest.mark.slow
def test_an_ended_doctor_leaves_no_job_of_slurm(slurm: SlurmCluster, tmp_path):
    """Its tasks wait for each other, as the first one's port is another's."""
    words = ["doctor", "nodes", "launcher=slurm", "nodes=2", "device=cpu", "needed_gib=0.01", "patience_seconds=60"]
    words += [f"environment.PYTHONPATH={os.pathsep.join(filter(None, sys.path))}", f"run_dir={tmp_path}"]
    with socket.create_server(("", 0)) as taken:
        command = [sys.executable, "-P", "-m", "launchers.cli", *words, f"master_port={taken.getsockname()[1]}"]
        with subprocess.Popen(command, env={**os.environ, **slurm.environment}, stdout=subprocess.DEVNULL) as process:
            wait_for(lambda: any(tmp_path.iterdir()), 60)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
    wait_for(lambda: "crosstune-doctor" not in slurm.run("squeue", "-h", "-o", "%j"), 20)
    assert list(tmp_path.iterdir()) == []
    refused = crosstune(*words, "python=/no/such/python", "--json", code=2, **slurm.environment)
    (fault,) = json.loads(refused.splitlines()[-1])["findings"]
    assert "'/no/such/python' cannot be run there" in fault["what"] and len(fault["nodes"]) == 2
