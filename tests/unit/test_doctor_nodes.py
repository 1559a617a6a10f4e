"""What the reports of nodes mean: each fault told once, with its node and a remedy; nothing of a healthy cluster."""

from __future__ import annotations

import copy
import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import distributed as dist

from configs.compose import compose
from configs.errors import ConfigError, CrosstuneError, ErrorGroup
from launchers.doctor.nodes import allreduce, before, machine, network
from launchers.doctor.nodes.allreduce import Roll
from launchers.doctor.nodes.before import before_submit
from launchers.doctor.nodes.between import clock_offsets
from launchers.doctor.nodes.command import ask, doctor_nodes, requests_of
from launchers.doctor.nodes.findings import Answer, Finding
from launchers.doctor.nodes.judge import judge
from launchers.doctor.nodes.look import way_to
from launchers.doctor.nodes.page import show
from launchers.doctor.nodes.rendezvous import Guest, Host
from launchers.doctor.nodes.request import Request, report_in, report_lines
from launchers.doctor.nodes.threads import in_threads
from launchers.launch import plan
from launchers.node import NOT_SHARED
from launchers.spec import MASTER, NODE
from launchers.ssh import probe

NAMES = ("n0", "n1", "n2", "n3")
GIB = 2**30
NOW = 1_000_000.0


@cache
def request(*words: str) -> Request:
    """What four nodes are asked."""
    cfg = compose("doctor_nodes", ["nodes=4", "nproc=2", "run_dir=/shared/run", "device=cpu", *words])
    return requests_of(cfg, NAMES, NAMES)[0]


def healthy(node: int) -> dict[str, Any]:
    """The facts of a node on which nothing is wrong."""
    asked = range(4) if node == 0 else (0, node)
    eth = {"addresses": [f"10.0.0.{node}", "fe80::1"], "up": True}
    disk = {"path": "/shared/run", "folder": "/shared", "free_bytes": 500 * GIB, "total_bytes": 900 * GIB}
    facts: dict[str, Any] = {
        "names": {"own": f"n{node}", "known": {NAMES[i]: {"addresses": [f"10.0.0.{i}"]} for i in asked}},
        "network": {
            "here": {"lo": {"addresses": ["127.0.0.1"], "up": True}, "eth0": eth},
            "chosen": {},
        },
        "way": {"interface": "eth0"},
        "limits": {"memlock": None, "nofile": 65536, "nproc": None, "rdma": ["mlx5_0"]},
        "shm": {"total_bytes": 16 * GIB, "free_bytes": 16 * GIB, "free_files": 9},
        "run_dir": {**disk, "free_files": 9, "refused": None},
        "tmp": {**disk, "path": "/tmp", "folder": "/tmp", "free_files": 9, "refused": None},
        "versions": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "deepspeed": "0.19.8",
            "code": "abc",
            "kernel": f"6.{node}",
        },
        "environment": {"OMP_NUM_THREADS": {"hash": "a1", "value": "4"}},
        "device": {
            "device": "ascend",
            "answers": {"available": True, "count": 8},
            "versions": {"torch_npu": "2.13.0", "cann": "9.0", "driver": "25.1"},
            "findings": [{"level": "ok", "what": "fine", "remedy": None}],
            "exit_code": 0,
        },
        "meeting": {"reached": True, "address": "10.0.0.0", "seconds": 1e-4, "offset_seconds": 0.0, "back": None},
        "agreed": {"go": True, "missing": [], "unable": {}},
        "allreduce": {"gb_per_s": 11.0, "silent": [], "error": None},
    }
    facts["meeting"]["token"] = True
    if node == 0:
        guests = {str(i): {"name": f"n{i}", "address": f"10.0.0.{i}", "back": None} for i in (1, 2, 3)}
        facts["meeting"] = {"listens": True, "guests": guests, "missing": [], "token": True}
    return facts


def answers(change: Callable[[list[dict[str, Any]]], object] = lambda facts: None) -> list[Answer]:
    """Reports of four nodes, healthy but for a change to their facts; their clocks are off as their facts say."""
    facts = [copy.deepcopy(healthy(node)) for node in range(4)]
    change(facts)
    off = [each["meeting"].get("offset_seconds", 0.0) for each in facts]
    return [
        Answer(
            node,
            {
                **{"node": node, "name": f"n{node}", "host": f"n{node}", "machine": f"m{node}"},
                **{"began_at": NOW + 1 + off[node], "answered_at": NOW + 9 + off[node], "facts": each},
            },
            None,
            NOW,
            NOW + 10,
        )
        for node, each in enumerate(facts)
    ]


def put(node: int, path: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    """A change of one fact."""

    def change(facts: list[dict[str, Any]]) -> None:
        *parents, last = path.split("/")
        place = facts[node]
        for name in parents:
            place = place[name]
        place[last] = value

    return change


def both(*changes: Callable[[list[dict[str, Any]]], None]) -> Callable[[list[dict[str, Any]]], None]:
    """Several changes."""

    def change(facts: list[dict[str, Any]]) -> None:
        for each in changes:
            each(facts)

    return change


def test_a_healthy_cluster_has_no_findings():
    assert judge(request(), answers()) == []


SILENT = {"reached": False, "kind": "silent", "text": "no answer", "addresses": ["10.0.0.0"], "token": None}
NO_WAY = {"wrong": "cluster.interface: there are eth0, eth1", "remedy": "name one"}
NOT_HERE = {"failed": "Name or service not known"}
BACK = {"kind": "refused", "text": "x", "addresses": ["10.0.0.2"]}
GONE = {"GLOO_SOCKET_IFNAME": {"value": "ib0", "means": []}}
LOOPBACK = {"NCCL_SOCKET_IFNAME": {"value": "lo", "means": ["lo"]}}
OTHER_DEVICE = {"device": "cpu", "answers": {"available": True}, "versions": {}, "findings": [], "exit_code": 0}
MISSING = {"level": "missing", "what": "nproc: 9 processes", "remedy": "lower nproc"}


@pytest.mark.parametrize(
    ("change", "level", "check", "nodes", "says"),
    [
        (put(2, "names/known/n0", NOT_HERE), "fault", "names", (2,), "'n0' does not resolve: Name or"),
        (put(0, "names/known/n0", NOT_HERE), "fault", "names", (0,), "'n0' does not resolve"),
        (put(2, "names/known/n2", NOT_HERE), "warning", "names", (2,), "'n2' does not resolve"),
        (put(0, "names/known/n3", NOT_HERE), "warning", "names", (0,), "'n3' does not resolve"),
        (put(0, "names/known/n3/addresses", ["10.9.9.9"]), "warning", "names", (0,), "that machine has 10.0.0.3"),
        (put(2, "names/known/n0/addresses", ["10.9.9.9"]), "fault", "names", (2,), "and that machine has 10.0.0.0"),
        (put(2, "names/known/n0/addresses", ["127.0.0.1"]), "fault", "names", (2,), "this node itself"),
        (put(0, "way/interface", "lo"), "fault", "interface", (0,), "a run would take lo, which no other node reaches"),
        (put(0, "way", NO_WAY), "fault", "interface", (0,), "cluster.interface: there are eth0, eth1"),
        (put(0, "meeting", {"listens": False, "text": "in use", "holder": "python (process 7)", "token": True}),
         "fault", "rendezvous", (0,), "port 29500 is taken by python (process 7)"),
        (put(2, "meeting", SILENT), "fault", "rendezvous", (2,), "cannot reach n0:29500: no answer"),
        (put(0, "meeting/guests/2/back", BACK), "fault", "rendezvous", (2,), "is not reached from there: refused"),
        (put(2, "network/chosen", GONE), "fault", "interface", (2,), "GLOO_SOCKET_IFNAME: no interface 'ib0' here"),
        (put(2, "network/chosen", LOOPBACK), "fault", "interface", (2,), "is loopback: no other node reaches it"),
        (put(2, "limits/nofile", 100), "fault", "limits", (2,), "100 open files"),
        (put(2, "limits/memlock", 65536), "warning", "limits", (2,), "may be locked"),
        (put(2, "shm/free_bytes", 2**20), "fault", "shm", (2,), "1.0 MiB free of 16.00 GiB"),
        (put(2, "shm/free_bytes", 2**29), "warning", "shm", (2,), "only 512.0 MiB free"),
        (put(2, "run_dir/free_bytes", 2**20), "fault", "disk", (2,), "/shared has 1.0 MiB free, 1.00 GiB needed"),
        (put(2, "run_dir/refused", "Read-only file system"), "fault", "disk", (2,), "write in /shared: Read-only"),
        (put(2, "run_dir/free_files", 0), "fault", "disk", (2,), "no inode left"),
        (put(2, "run_dir", {"failed": "no answer within 20 s"}), "fault", "disk", (2,), "could not be looked at"),
        (put(2, "tmp/free_bytes", 2**29), "warning", "disk", (2,), "tmp: /tmp has only 512.0 MiB free"),
        (put(2, "meeting/token", False), "fault", "folder", (2,), "does not see what n0 writes to /shared"),
        (put(2, "meeting/token", "Stale file handle"), "fault", "folder", (2,), "cannot read what n0 writes"),
        (put(2, "meeting/offset_seconds", 90.0), "fault", "clock", (2,), "s fast against this host's"),
        (put(2, "meeting/offset_seconds", -10.0), "warning", "clock", (2,), "s slow against this host's"),
        (put(2, "versions/torch", "2.12.0"), "fault", "versions", (2,), "torch 2.12.0 (2.13.0)"),
        (put(2, "versions/code", "xyz"), "fault", "versions", (2,), "the code of crosstune xyz (abc)"),
        (put(2, "device/versions/cann", "8.5"), "fault", "versions", (2,), "cann 8.5 (9.0)"),
        (put(2, "versions/python", "3.11.2"), "warning", "versions", (2,), "python 3.11.2 (3.11.7)"),
        (put(2, "device/versions/driver", "24"), "warning", "versions", (2,), "driver 24 (25.1)"),
        (put(2, "environment/OMP_NUM_THREADS", {"hash": "b2", "value": "1"}), "warning", "environment", (2,),
         "OMP_NUM_THREADS is '1' (on the other nodes is '4')"),
        (put(2, "environment", {}), "warning", "environment", (2,), "OMP_NUM_THREADS is not set"),
        (put(2, "device/findings", [MISSING]), "fault", "device", (2,), "nproc: 9 processes"),
        (put(2, "device", OTHER_DEVICE), "fault", "device", (2,), "the device is cpu, and ascend on the other nodes"),
        (put(2, "device/answers/count", 7), "warning", "device", (2,), "7 devices, and 8 on the other nodes"),
        (put(1, "allreduce", {"gb_per_s": None, "silent": [4, 5], "error": "x"}), "fault", "allreduce", (2,),
         "ranks 4, 5 gave no sign"),
        (put(2, "allreduce/error", "the sum of 8 ones came out as 7"), "fault", "allreduce", (2,), "came out as 7"),
    ],
)  # fmt: skip
def test_one_change_is_one_finding_on_its_node(change, level, check, nodes, says):
    (finding,) = judge(request(), answers(change))
    assert (finding.level, finding.check, finding.nodes) == (level, check, nodes)
    assert says in finding.what


def test_what_only_follows_from_a_cause_is_not_told():
    taken = put(0, "meeting", {"listens": False, "text": "in use", "holder": None, "token": True})
    everyone = both(taken, *(put(node, "meeting", SILENT) for node in (1, 2, 3)))
    assert [each.nodes for each in judge(request(), answers(everyone))] == [(0,)]
    misnamed = both(put(2, "names/known/n0", NOT_HERE), put(2, "meeting", {**SILENT, "kind": "name"}))
    assert [each.check for each in judge(request(), answers(misnamed))] == ["names"]
    unwritable = both(put(0, "run_dir/refused", "No space left"), put(0, "meeting/token", "No space left"))
    assert [each.check for each in judge(request(), answers(unwritable))] == ["disk"]
    misspelt = [{"level": "missing", "what": "HCCL_CONECT_TIMEOUT: no such variable", "remedy": "did you mean"}]
    named = both(
        put(2, "device/findings", misspelt), put(2, "environment/HCCL_CONECT_TIMEOUT", {"hash": "c", "value": "1"})
    )
    assert [each.check for each in judge(request(), answers(named))] == ["device"]


def test_a_node_without_a_report_is_one_finding_and_the_others_stay_as_they_are():
    found = answers(put(0, "meeting/missing", [3]))
    found[3] = Answer(3, None, CrosstuneError("n3", "ssh: connect refused", remedy="is sshd up?"), NOW, NOW + 1)
    assert judge(request(), found) == [
        Finding("fault", "answer", (3,), "gave no report: ssh: connect refused", "is sshd up?")
    ]


def test_the_same_finding_on_several_nodes_is_one_and_faults_come_first():
    change = both(*(put(node, "shm/free_bytes", 0) for node in (1, 3)), put(0, "tmp/free_bytes", 2**29))
    assert [(each.level, each.nodes) for each in judge(request(), answers(change))] == [
        ("fault", (1, 3)),
        ("warning", (0,)),
    ]


def test_behind_a_network_that_translates_addresses_names_are_not_called_wrong():
    change = both(*(put(node, "names/known/n0/addresses", ["192.168.9.1"]) for node in range(4)))
    assert judge(request(), answers(change)) == []


def test_a_debian_host_whose_own_name_is_loopback_is_no_finding_where_a_run_finds_another_way():
    own = both(*(put(node, f"names/known/n{node}/addresses", ["127.0.1.1"]) for node in range(4)))
    assert judge(request(), answers(own)) == []


def test_several_nodes_on_one_machine_may_meet_on_its_loopback_interface():
    found = answers(both(*(put(node, "way/interface", "lo") for node in range(4))))
    for each in found:
        assert each.report is not None
        each.report["machine"] = "m"
    assert {each.what.partition(" as ")[0] for each in judge(request(), found)} == {"is the same machine"}


def test_a_node_without_a_way_is_told_once():
    change = both(
        put(2, "way", {"wrong": "machine 0: 'n0' cannot be reached", "remedy": None}), put(2, "meeting", SILENT)
    )
    assert [each.check for each in judge(request(), answers(change))] == ["interface"]


def test_little_shared_memory_breaks_runs_on_accelerators_alone():
    def levels(device: dict[str, Any]) -> list[str]:
        change = both(*(both(put(n, "shm/free_bytes", 2**20), put(n, "device", device)) for n in range(4)))
        return [each.level for each in judge(request(), answers(change)) if each.check == "shm"]

    whole = {"answers": {"available": True, "count": 1}, "versions": {}, "findings": [], "exit_code": 0}
    assert levels({"device": "cpu", **whole}) == [] and levels({"device": "ascend", **whole}) == ["fault"]
    quick: dict[str, Any] = {"findings": []}
    assert levels({"asked": "cpu", **quick}) == [] and levels({"asked": "ascend", **quick}) == ["fault"]
    assert levels({"asked": "auto", **quick}) == ["warning"]


def test_locked_memory_is_of_no_interest_without_an_adapter_that_needs_it():
    change = both(*(both(put(n, "limits/memlock", 2**23), put(n, "limits/rdma", [])) for n in range(4)))
    assert judge(request(), answers(change)) == []


def test_the_limit_of_open_files_is_the_one_that_a_run_raises_itself():
    code = (
        "import resource; _, hard = resource.getrlimit(resource.RLIMIT_NOFILE);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, 5000)));"
        "from launchers.doctor.nodes.look import limits; print(limits()['nofile'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "5000\n", done.stderr


def test_a_host_is_shown_as_it_was_written_and_reached_by_its_address():
    cfg = compose("doctor_nodes", ["nodes=4", "nproc=2", "run_dir=/shared/run", "device=cpu"])
    first = requests_of(cfg, NAMES, [f"10.0.0.{node}" for node in range(4)])[0]
    assert first.master == "10.0.0.0" and first.on_this_machine({NODE: "2"}).name == "n2"

    def by_address(facts: list[dict[str, Any]]) -> None:
        for node, each in enumerate(facts):
            each["names"]["known"] = {f"10.0.0.{i}": {"addresses": [f"10.0.0.{i}"]} for i in (0, node)}

    missing = put(2, "names/known", {"10.0.0.0": NOT_HERE})
    (finding,) = judge(first, answers(both(by_address, missing)))
    assert finding.what.startswith("'10.0.0.0' (n0) does not resolve")
    found = answers(both(by_address, put(2, "meeting", SILENT)))
    (finding,) = judge(first, found)
    assert finding.what.startswith("cannot reach n0:29500") and "(10.0.0.0)" in finding.what
    out = io.StringIO()
    show(first, found, [finding], Console(file=out, width=100))
    assert "  fault        n2: cannot reach n0:29500" in out.getvalue()


def test_not_shared_and_not_looked_at_is_no_finding():
    assert judge(request("shared=false"), answers(put(2, "meeting/token", False))) == []
    assert [e.check for e in judge(request("cluster.interface=eth1"), answers())] == ["interface"]


def test_clocks_are_bounded_by_the_times_of_all_reports():
    found = answers(put(2, "meeting/offset_seconds", 50.0))
    offsets = clock_offsets(found)
    assert offsets[0] == offsets[1] == 0.0 and 48.9 <= offsets[2] <= 51.1
    alone = answers()
    assert alone[1].report is not None
    alone[1].report.update(began_at=NOW - 30, answered_at=NOW - 22)  # it began before it was asked
    alone[1].report["facts"]["meeting"] = dict(SILENT)
    assert clock_offsets(alone)[1] == -30


def test_when_all_clocks_are_off_alike_the_asking_hosts_own_is_named():
    found = [Answer(each.node, each.report, None, NOW + 500, NOW + 510) for each in answers()]
    (finding,) = judge(request(), found)
    assert finding.level == "warning" and finding.nodes == (0, 1, 2, 3) and "its own may be wrong" in finding.what


def test_the_page_has_a_line_per_node_and_the_remedy():
    found = answers(put(2, "shm/free_bytes", 2**20))
    found[3] = Answer(3, None, CrosstuneError("n3", "ssh failed", remedy="mend it"), NOW, NOW)
    out = io.StringIO()
    show(request(), found, judge(request(), found), Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert lines[0] == "4 nodes  a run would break"
    assert lines[1].split() == [
        *("node", "host", "devices", "processes", "interface", "rendezvous", "/dev/shm", "disk", "clock", "versions"),
        "all-reduce",
    ]
    assert lines[2].split()[:7] == ["n0", "n0", "8", "ascend", "2", "eth0", "listens"]
    assert lines[2].endswith("11.00 GB/s") and "0.1 ms" in lines[3]
    assert lines[5].split() == ["n3", "no", "report", *["-"] * 9]
    assert "  fault        n2: /dev/shm has 1.0 MiB free of 16.00 GiB, too little for collectives" in lines
    assert any(line.strip() == "-> mend it" for line in lines)
    assert lines[2].split()[-3] == lines[3].split()[-3], "equal versions have one short name"


def test_a_request_travels_as_one_line_and_a_launchers_variables_say_which_node_it_is():
    first = request()
    text = first.to_json()
    assert "\n" not in text and Request.from_json(text) == first
    there = first.on_this_machine({NODE: "2", MASTER: "10.0.0.7"})
    assert (there.node, there.name, there.master) == (2, "n2", "10.0.0.7")
    assert first.on_this_machine({}) == first


def test_a_report_is_found_behind_what_a_launcher_puts_before_it():
    report = {"node": 1, "facts": [os.urandom(2000).hex()]}
    lines = list(report_lines(report))
    assert len(lines) > 3 and max(map(len, lines)) < 500
    assert report_in(["motd", *(f" 2: {line}" for line in lines), "bye"]) == report
    assert report_in(lines[:-1]) is None and report_in(["nothing"]) is None
    assert report_in([*lines[:-1], lines[-1][:-1] + "!"]) is None


class Told:
    """A launcher whose nodes say what they are told to say."""

    def __init__(self, *said: Any) -> None:
        self.said = said

    def node_names(self, nodes: int) -> list[str]:
        return [f"n{number}" for number in range(nodes)]

    node_addresses = node_names

    def run_on_each(self, requests: Any, seconds: float) -> Any:
        yield from self.said


def test_a_node_that_says_nothing_or_something_else_is_told(capsys):
    cfg = compose("doctor_nodes", ["nodes=3", "quick=true"])
    heard = ask(
        requests_of(cfg, ("n0", "n1", "n2"), ("n0", "n1", "n2")),
        Told((2, ["warning", "bash: python3: not found"]), (0, [])),
    )
    errors = [each.error.found if each.error else "" for each in heard]
    assert "it said last: nothing" in errors[0] and "nothing came within" in errors[1]
    assert "it said last: bash: python3: not found" in errors[2]
    report = doctor_nodes(cfg, Told())
    assert report["exit_code"] == 2 and len(report["findings"]) == 1
    assert report["findings"][0]["nodes"] == ["n0", "n1", "n2"] and json.dumps(report)
    assert "all 3 nodes: gave no report" in capsys.readouterr().out


def test_a_launcher_that_starts_nothing_elsewhere_says_so():
    with pytest.raises(ConfigError, match="launcher: local, whose 2 nodes cannot be asked"):
        doctor_nodes(compose("doctor_nodes", ["nodes=2"]))


def test_before_a_job_is_submitted_its_folder_and_variables_are_looked_at(tmp_path, monkeypatch):
    cfg = compose("train", ["device=ascend", "model.path=m", "dataset.path=d", f"run_dir={tmp_path}/a/b"])
    assert list(before_submit(cfg, {"HCCL_BUFFSIZE": "64", "MY_OWN": "1"})) == [] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(before, "room", lambda folder: {"free_bytes": 2**20})
    room, name = before_submit(cfg, {"HCCL_BUFSIZE": "64"})
    assert f"'{tmp_path}' has 1.0 MiB free" in room.found
    assert name.where == "environment.HCCL_BUFSIZE" and "did you mean HCCL_BUFFSIZE?" in str(name.remedy)
    options = compose("launch", ["+environment.HCCL_BUFSIZE=64"])
    with pytest.raises(ErrorGroup, match="run_dir"):
        plan("train", cfg, options)
    options.check = False
    assert plan("train", cfg, options).files is not None


def test_a_node_looks_at_itself_with_the_standard_library_and_psutil():
    """What else is broken there is a finding."""
    code = (
        "import sys, launchers.doctor.nodes.look; print({'torch', 'numpy', 'hydra', 'omegaconf'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_checks_that_raise_or_hang_do_not_stop_the_others():
    results = in_threads({"fine": lambda: 1, "raises": lambda: 1 / 0, "hangs": lambda: time.sleep(60)}, 0.3)
    assert results["fine"] == 1
    assert results["raises"] == {"failed": "ZeroDivisionError: division by zero"}
    assert results["hangs"] == {"failed": "no answer within 0.3 s"}


def test_the_environment_tells_no_secret():
    variables = {
        **{"HCCL_BUFFSIZE": "64", "MY_TOKEN": "s3cret", "TORCH_SECRET_KEY": "s3cret", "GLOO_SOCKET_IFNAME": "eth0"},
        **{"HF_TOKEN": "s3cret", "PATH": "/bin"},
    }
    found = machine.environment("session", ["MY_TOKEN"], NOT_SHARED, variables)
    assert found.keys() == {"HCCL_BUFFSIZE", "MY_TOKEN", "TORCH_SECRET_KEY"}
    assert found["HCCL_BUFFSIZE"]["value"] == "64" and "s3cret" not in json.dumps(found)
    assert (
        machine.environment("other", [], NOT_SHARED, variables)["HCCL_BUFFSIZE"]["hash"]
        != found["HCCL_BUFFSIZE"]["hash"]
    )


def test_variables_in_which_machines_of_a_run_rightly_differ_are_not_compared():
    own = ("NCCL_SOCKET_IFNAME", "HCCL_IF_IP", "KRB5CCNAME", "ASCEND_RT_VISIBLE_DEVICES", "CUDA_HOME")
    assert machine.environment("session", [], NOT_SHARED, dict.fromkeys(own, "x")) == {}


def test_the_code_has_the_name_that_the_ssh_launcher_gives_it():
    assert machine.versions()["code"] == probe.installed()["sources"] != ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def meet(*words: str) -> Request:
    """Two nodes, both this machine."""
    names = ("first", "no-such-host.invalid")  # a run asks for the first one's address only
    cfg = compose("doctor_nodes", ["nodes=2", f"master_port={free_port()}", "patience_seconds=5", *words])
    return requests_of(cfg, names, ("127.0.0.1", names[1]))[0]


def copy_for(node: int, first: Request) -> Request:
    return first.on_this_machine({NODE: str(node)})


def test_two_nodes_meet_measure_their_clocks_and_agree():
    first = meet()
    host, guest = Host(first, token=True), Guest(copy_for(1, first))
    met = in_threads({"host": host.meet, "guest": guest.meet}, 10)
    assert met["host"]["missing"] == [] and met["host"]["guests"][1]["back"] is None
    assert met["guest"]["reached"] and met["guest"]["token"] and met["guest"]["back"] is None
    assert abs(met["guest"]["offset_seconds"]) < 0.5 and 0 < met["guest"]["seconds"] < 0.5
    agreed = in_threads({"host": lambda: host.agree(None), "guest": lambda: guest.agree("no device")}, 10)
    assert agreed["host"] == {"go": False, "missing": [], "unable": {1: "no device"}}
    assert agreed["guest"] == {"go": False, "missing": [], "unable": {"1": "no device"}}
    socket.create_server(("", first.master_port)).close()  # the port is free again


def test_a_taken_port_is_told_with_its_holder_and_strangers_are_not_answered():
    first = meet("patience_seconds=1")
    with socket.create_server(("", first.master_port)):
        met = Host(first, token=False).meet()
        assert not met["listens"] and f"(process {os.getpid()})" in met["holder"]
        # It answers nothing: a guest takes it for something else, not for machine 0.
    host = Host(first, token=True)
    stranger = Guest(copy_for(1, meet("patience_seconds=1")))
    stranger.request = Request(**{**vars(stranger.request), "master_port": first.master_port})
    met = in_threads({"host": host.meet, "guest": stranger.meet}, 20)
    host.close()
    assert met["host"] == {"listens": True, "guests": {}, "missing": [1]}
    assert not met["guest"]["reached"] and met["guest"]["kind"] == "strange"


def roll_call(store: Any, ranks: Sequence[int], world: int, seconds: float) -> dict[str, Any]:
    return in_threads({str(r): lambda r=r: Roll(store, r, world).call("came", seconds) for r in ranks}, 10)


def test_ranks_that_do_not_come_are_called_by_number_for_all():
    assert roll_call(dist.HashStore(), (0, 1, 2), 3, 5.0) == {"0": [], "1": [], "2": []}
    assert roll_call(dist.HashStore(), (0, 2), 4, 0.2) == {"0": [1, 3], "2": [1, 3]}
    store = dist.HashStore()
    Roll(store, 0, 3).sign("active")
    assert Roll(store, 0, 3).absent("active") == [1, 2] and Roll(store, 1, 3).absent("active") == []


def test_a_first_rank_that_says_nothing_is_the_one_that_is_missing(monkeypatch):
    monkeypatch.setattr(allreduce, "LAST_SECONDS", 0.1)
    assert Roll(dist.HashStore(), 1, 2).call("came", 0.0) == [0]


class Counting:
    """A store that counts what it is asked."""

    def __init__(self) -> None:
        self.store, self.keys = dist.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        def called(*content: Any) -> Any:
            self.keys += len(content[0]) if isinstance(content[0], list) else 1
            return getattr(self.store, name)(*content)

        return called


def test_a_roll_of_many_ranks_asks_the_store_some_times_per_rank():
    """Each asking after each other was 2.56 million keys at 1,600 ranks, more than a store tells in the time."""
    store, world = Counting(), 200
    assert set(map(tuple, roll_call(store, range(world), world, 30.0).values())) == {()}
    assert store.keys < 30 * world


def test_interfaces_are_those_that_the_libraries_would_take():
    here = network.interfaces({"GLOO_SOCKET_IFNAME": "nope0", "NCCL_SOCKET_IFNAME": "^nope"})
    assert here["chosen"]["GLOO_SOCKET_IFNAME"]["means"] == []
    assert set(here["chosen"]["NCCL_SOCKET_IFNAME"]["means"]) == set(here["here"])


def test_the_interface_is_found_as_a_run_finds_it(monkeypatch):
    assert way_to("127.0.0.1", None) == {"interface": "lo"} and way_to("n0", "ib0") == {"interface": "ib0"}
    assert "no-such-host.invalid" in way_to("no-such-host.invalid", None)["wrong"]
    monkeypatch.setattr("launchers.node.interface_to", lambda master: f"of {master}")
    assert way_to("n0", None) == {"interface": "of n0"}


def test_a_file_of_the_first_node_is_seen_or_not(tmp_path):
    first = requests_of(compose("doctor_nodes", ["nodes=2", f"run_dir={tmp_path}/not/yet"]), (), ())[0]
    assert machine.token_file(first).parent == tmp_path
    assert not machine.sees_token(first, 0.0)
    machine.token_file(first).write_text("another session")
    assert not machine.sees_token(first, 0.0)
    machine.token_file(first).write_text(first.session)
    assert machine.sees_token(first, 0.0)


def test_a_disk_that_refuses_is_told_though_it_has_room():
    if Path("/proc").is_dir():
        assert machine.disk("/proc")["refused"]
