"""`crosstune doctor nodes` through pods: a job of its own against the stand-in of the API server, pods as processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from launchers.doctor.nodes import command
from launchers.doctor.nodes.command import doctor_nodes
from launchers.doctor.nodes.request import report_lines
from launchers.torchrun import free_port
from tests.fake_kubelet import Kubelet
from tests.fake_kubernetes import Cluster, Fault, api_server, write_kubeconfig
from tests.net_lab import net_lab, wait_for
from tests.standin import StandinKit


@pytest.fixture
def cluster() -> Cluster:
    can = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    if not can:
        assert "CI" not in os.environ, "CI must be able to give a pod its own /etc/hosts: root and unshare are needed"
        pytest.skip("pods need an /etc/hosts of their own: root and unshare")
    return Cluster()


@pytest.fixture
def words(cluster: Cluster, tmp_path: Path) -> Iterator[list[str]]:
    """Of the command, for two pods that share the folder of the test."""
    (tmp_path / "env.sh").write_text("export HCCL_BUFFSIZE=64\n")
    with api_server(cluster) as address:
        kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", address)
        yield [
            *("launcher=volcano", f"launcher.kubeconfig={kubeconfig}", "launcher.patience_seconds=3", "nodes=2"),
            *("launcher.image=i:1", f"launcher.claims={{{tmp_path}: team}}", f"python={sys.executable}"),
            *(f"run_dir={tmp_path}", f"cluster.setup=[{tmp_path}/env.sh]", "+environment.OMP_NUM_THREADS=1"),
            *(f"master_port={free_port()}", "device=cpu", "needed_gib=0.01", "patience_seconds=5", "queue_seconds=20"),
        ]


def left(cluster: Cluster) -> list[tuple[str, str]]:
    """Objects that are on the server."""
    return [key for key in cluster.objects if key[0] != "events"]


def faults(report: dict[str, Any]) -> list[dict[str, Any]]:
    assert report["exit_code"] == (2 if any(each["level"] == "fault" for each in report["findings"]) else 0)
    return [each for each in report["findings"] if each["level"] == "fault"]


def test_pods_look_through_lost_connections_and_nothing_is_left(cluster, words, tmp_path, capsys) -> None:
    cluster.faults += [
        Fault("POST", r"/jobs\?fieldValidation=Strict$", "after"),
        Fault("GET", "watch=true", "gone"),
        Fault("GET", "watch=true", "before"),
        Fault("GET", "/log", "cut", lines=1),
    ]
    with Kubelet(cluster, tmp_path, planted={0: "sleep 2"}):  # its image comes late
        report = doctor_nodes(compose("doctor_nodes", [*words, "quick=true", "patience_seconds=1"]))
    assert not [fault for fault in cluster.faults if fault.times] and left(cluster) == []
    assert faults(report) == []
    assert [each["name"] for each in report["nodes"]] == ["worker-0", "worker-1"]
    facts = [each["report"]["facts"] for each in report["nodes"]]
    assert facts[1]["meeting"]["reached"] and facts[1]["meeting"]["back"] is None and facts[1]["meeting"]["token"]
    # The variables of a job, and its setup scripts; nothing that a controller sets for others.
    assert all(each["environment"]["HCCL_BUFFSIZE"]["value"] == "64" for each in facts)
    assert not [path.name for path in tmp_path.iterdir() if "crosstune-doctor" in path.name]
    assert "a run can start" in capsys.readouterr().out


ROOM = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/4 nodes: 4 Insufficient npu",
}
PULLS = {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling"}}}]}
PREPARED = {"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}


@pytest.mark.parametrize(
    ("stuck", "nodes", "says", "remedy"),
    [
        ([{"conditions": [ROOM]}] * 2, ["node 0", "node 1"], "4 Insufficient npu", "launcher.queue"),
        pytest.param([{}, PULLS], ["node 1"], "Back-off pulling", "launcher.pull_secrets", marks=pytest.mark.slow),
        pytest.param([{}, PREPARED], ["node 1"], "claim team not found", "launcher.claims", marks=pytest.mark.slow),
    ],
)
def test_pods_that_do_not_start_are_told_with_the_reason(stuck, nodes, says, remedy, cluster, words, tmp_path) -> None:
    event = {"type": "Warning", "reason": "FailedMount", "message": "claim team not found"}

    def complain(kubelet: Kubelet) -> None:
        while len(cluster.all("pods")) < 2 and kubelet.is_alive():
            time.sleep(0.05)
        for pod in cluster.all("pods"):
            about = {"name": pod["metadata"]["name"]}
            cluster.put("events", {"metadata": {"name": f"e-{about['name']}"}, "involvedObject": about, **event})

    with Kubelet(cluster, tmp_path, stuck={index: each for index, each in enumerate(stuck) if each}) as kubelet:
        threading.Thread(target=complain, args=(kubelet,), daemon=True).start()
        began = time.monotonic()
        report = doctor_nodes(compose("doctor_nodes", [*words, "quick=true", "queue_seconds=1", "patience_seconds=1"]))
    assert time.monotonic() - began < 15 and left(cluster) == []
    [fault] = faults(report)
    assert fault["nodes"] == nodes and fault["check"] == "answer"
    assert "has not started within 1 s" in fault["what"] and says in fault["what"] and remedy in fault["remedy"]
    assert [each["report"] is None for each in report["nodes"]] == [bool(each) for each in stuck]


@pytest.mark.slow
def test_a_full_queue_is_told_though_there_are_no_pods(cluster, words) -> None:
    """Volcano says so in a Normal event of the pod group, and makes no pods."""

    def complain() -> None:
        while not cluster.all("jobs"):
            time.sleep(0.05)
        [job] = cluster.all("jobs")
        group = {"name": f"{job['metadata']['name']}-{job['metadata']['uid']}"}
        event = {"type": "Normal", "reason": "Unschedulable", "message": "queue resource quota insufficient: npu"}
        cluster.put("events", {"metadata": {"name": "e"}, "involvedObject": group, **event})

    threading.Thread(target=complain, daemon=True).start()
    report = doctor_nodes(compose("doctor_nodes", [*words, "queue_seconds=1"]))
    [fault] = faults(report)
    assert fault["nodes"] == ["node 0", "node 1"] and "quota insufficient: npu" in fault["what"]
    assert "queue_seconds" in fault["remedy"] and left(cluster) == []


@pytest.mark.parametrize(("method", "what", "made"), [("POST", "jobs", False), ("GET", "pods", True)])
def test_a_refusal_is_told_in_the_servers_words(method, what, made, cluster, words) -> None:
    """Nothing was made, or what was made is deleted."""
    message = f"{what} is forbidden: exceeded quota"
    cluster.faults.append(Fault(method, f"/{what}", 403, message=message))
    [fault] = faults(doctor_nodes(compose("doctor_nodes", words)))
    assert message in fault["what"] and fault["nodes"] == ["node 0", "node 1"]
    assert left(cluster) == [] and cluster.count("DELETE") == made


@pytest.mark.slow
def test_a_server_that_is_lost_is_told_with_what_may_be_left(cluster, words, tmp_path, capfd) -> None:
    def lose() -> None:
        cluster.down = True

    cluster.faults.append(Fault("GET", "watch=true", "before", act=lose))
    began = time.monotonic()
    with Kubelet(cluster, tmp_path):
        report = doctor_nodes(compose("doctor_nodes", [*words, "launcher.patience_seconds=1", "quick=true"]))
    assert time.monotonic() - began < 15
    [fault] = faults(report)
    assert "no answer to GET Pod for 1 s" in fault["what"]
    [job] = cluster.all("jobs")
    assert f"kubectl -n research delete jobs.batch.volcano.sh {job['metadata']['name']}" in capfd.readouterr().err
    assert (
        job["spec"]["ttlSecondsAfterFinished"] and job["spec"]["tasks"][0]["template"]["spec"]["activeDeadlineSeconds"]
    )


@pytest.mark.parametrize(
    ("signals", "code", "runs"),
    [
        ([signal.SIGINT], 130, False),
        pytest.param([signal.SIGINT], 130, True, marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM] * 2, 143, True, marks=pytest.mark.slow),  # as `timeout` does
        pytest.param([signal.SIGHUP], 129, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_nothing_behind(signals, code, runs, cluster, words, tmp_path) -> None:
    """Whether the pods wait for room, or one of them still looks."""
    argv = [sys.executable, "-P", "-m", "launchers.cli", "doctor", "nodes", *words]
    stuck = {} if runs else dict.fromkeys(range(2), {"conditions": [ROOM]})
    with Kubelet(cluster, tmp_path, stuck=stuck, planted={1: "exec sleep 60"}) as kubelet:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: len(cluster.all("pods")) == 2, 30)
        pods = [each.process for each in kubelet.running.values()]
        time.sleep(0.3)
        cluster.faults.append(Fault("DELETE", "/jobs", 503, times=2))  # it takes its time
        for number in signals:
            process.send_signal(number)
            time.sleep(0.1)
        out, _ = process.communicate(timeout=30)
        assert process.returncode == code and "Traceback" not in out and "may be left" not in out, out
        assert left(cluster) == [] and len(pods) == (2 if runs else 0)
        assert all(pod.wait(10) is not None for pod in pods)


@pytest.mark.slow
def test_a_pod_that_dies_is_told_with_what_it_said_last(cluster, words, tmp_path) -> None:
    with Kubelet(cluster, tmp_path, planted={1: "echo no such library && exit 127"}):
        report = doctor_nodes(compose("doctor_nodes", [*words, "quick=true", "queue_seconds=2", "patience_seconds=2"]))
    [fault] = faults(report)
    assert fault["nodes"] == ["node 1"] and left(cluster) == []
    assert "on worker-1: Error, exit code 127; it said last: no such library" in fault["what"]
    assert report["nodes"][0]["report"]["facts"]["meeting"]["missing"] == [1], "its end does not end the others"


@pytest.mark.slow
def test_a_pod_that_is_evicted_while_it_looks_is_told(cluster, words, tmp_path) -> None:
    def evict(kubelet: Kubelet) -> None:
        wait_for(lambda: len(kubelet.running) == 2, 20)
        time.sleep(0.5)
        name = next(name for name in kubelet.running if name.endswith("1"))
        each = kubelet.running.pop(name)
        each.process.kill()
        each.process.wait()
        cluster.remove("pods", name)

    with Kubelet(cluster, tmp_path, planted={1: "exec sleep 60"}) as kubelet:
        threading.Thread(target=evict, args=(kubelet,), daemon=True).start()
        report = doctor_nodes(compose("doctor_nodes", [*words, "quick=true", "queue_seconds=3", "patience_seconds=2"]))
    [fault] = faults(report)
    assert fault["nodes"] == ["node 1"] and "taken away while it looked on worker-1" in fault["what"]
    assert left(cluster) == []


@pytest.mark.slow
def test_pods_on_hosts_of_their_own_are_healthy_or_have_the_fault_that_was_planted(cluster, words, tmp_path) -> None:
    """The whole look with its all-reduce, over a network; then an older torch, and no room for temporary files."""
    words += ["allreduce_mib=1", "allreduce_seconds=120", "nodes=3", "queue_seconds=60", "--json"]
    older = tmp_path / "older/torch-2.12.0.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    planted = {
        1: f"export PYTHONPATH={older.parent}:$PYTHONPATH",
        2: "mount -t tmpfs -o size=1m none /dev/shm; export TMPDIR=/dev/shm",
    }

    def told(lab: Any, planted: dict[int, str]) -> dict[str, Any]:
        argv = [sys.executable, "-P", "-m", "launchers.cli", "doctor", "nodes", *words]
        with Kubelet(cluster, tmp_path, lab=lab, planted=planted):
            done = subprocess.run(argv, capture_output=True, text=True)
        print(done.stderr)
        assert left(cluster) == []
        return dict(json.loads(done.stdout.splitlines()[-1]))

    with net_lab(tmp_path, 3) as lab:
        report = told(lab, {})
        assert report["findings"] == [] and report["exit_code"] == 0
        assert all(each["report"]["facts"]["allreduce"]["gb_per_s"] > 0 for each in report["nodes"])
        found = faults(told(lab, planted))
    assert [(each["nodes"], each["check"]) for each in found] == [(["worker-2"], "disk"), (["worker-1"], "versions")]


@pytest.mark.slow
def test_a_pod_with_too_few_devices_is_found(cluster, words, tmp_path, standin: StandinKit) -> None:
    """On the stand-in for Ascend, one pod with a device less than its processes."""

    def exported(devices: int) -> str:
        whole = standin.environment(devices=devices).items()
        changed = [f"{name}={shlex.quote(each)}" for name, each in whole if os.environ.get(name) != each]
        return f"export {' '.join(changed)}"

    asked = [*words, "device=ascend", "nproc=2", "allreduce_mib=0", "queue_seconds=60"]
    with Kubelet(cluster, tmp_path, planted={0: exported(2), 1: exported(1)}):
        report = doctor_nodes(compose("doctor_nodes", asked))
    [fault] = faults(report)
    assert (fault["nodes"], fault["check"]) == (["worker-1"], "device")
    assert fault["what"].startswith("nproc: 2 processes")
    assert left(cluster) == []


KEY = "training.kubeflow.org/replica"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "others", "labels"),
    [
        ("trainjob", ["trainingruntimes"], [{"batch.kubernetes.io/job-completion-index": str(i)} for i in range(2)]),
        ("pytorchjob", [], [{f"{KEY}-type": role, f"{KEY}-index": "0"} for role in ("master", "worker")]),
        ("ascendjob", ["services"], [{f"{KEY}-type": role, f"{KEY}-index": "0"} for role in ("master", "worker")]),
    ],
)
def test_other_kinds_of_jobs_are_heard_and_deleted(kind, others, labels, cluster, words, monkeypatch) -> None:
    """Their controllers are played here: what pods say is that they have said something."""
    jobs = f"{kind}s"
    cluster.installed |= {jobs, *others}
    seen: list[list[str]] = []

    def control() -> None:
        wait_for(lambda: cluster.all(jobs), 20)
        name = cluster.all(jobs)[0]["metadata"]["name"]
        seen.append([plural for plural, _ in cluster.objects])
        for index, each in enumerate(labels):
            pod = f"{name}-{index}"
            about = {"name": pod, "labels": {"crosstune/job": name, **each}}
            cluster.put("pods", {"metadata": about, "status": {"phase": "Pending"}})
            for line in report_lines({"node": index, "name": f"w{index}", "host": pod, "facts": {}}):
                cluster.say(pod, line)
            cluster.set_pod(pod, "Succeeded", containerStatuses=[{"state": {"terminated": {"exitCode": 0}}}])
        wait_for(lambda: not cluster.all(jobs), 20)
        for pod in cluster.all("pods"):
            cluster.remove("pods", pod["metadata"]["name"])

    monkeypatch.setattr(command, "judge", lambda request, answers: [])
    monkeypatch.setattr("launchers.doctor.nodes.page.show", lambda *found: None)
    controller = threading.Thread(target=control)
    controller.start()
    asked = [*words, f"launcher={kind}", "cluster=ascend"]
    report = doctor_nodes(compose("doctor_nodes", [word for word in asked if word != "launcher=volcano"]))
    controller.join()
    assert sorted(seen[0]) == sorted([jobs, *others]) and left(cluster) == []
    assert [each["report"]["node"] for each in report["nodes"]] == [0, 1]
