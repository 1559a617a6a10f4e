"""The job by which the doctor looks into pods: a run's pods but for what they run, of each kind, on every cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.compose import build, compose
from configs.errors import ConfigError, ErrorGroup
from launchers.base import Launcher
from launchers.doctor.nodes.carry import asker_of
from launchers.doctor.nodes.command import requests_of
from launchers.doctor.nodes.request import Request, report_in
from launchers.kubernetes.ask import InPods
from launchers.kubernetes.entry import NODE_FROM
from launchers.kubernetes.look import MACHINE
from launchers.spec import MASTER
from tests.fake_kubelet import expanded
from tests.kubernetes_models import check
from tests.unit.test_kubernetes_render import EVIL, SPEC, WORDS, launcher_of, pods_in

CAUGHT = re.compile(r"SigCgt:\s*([0-9a-f]+)")
OF_DOCTOR = {"nodes": 3, "nproc": 8, "cpus": 96, "memory_gib": 512, "run_dir": "/shared/runs/licenses"}


def asker(kind: str, cluster: str, *words: str) -> tuple[InPods, Request]:
    """Who asks the pods, and what."""
    numbers = [f"{key}={value}" for key, value in OF_DOCTOR.items()]
    cfg = compose("doctor_nodes", [f"launcher={kind}", f"cluster={cluster}", *WORDS, *numbers, *words])
    asks = asker_of(cfg, build(cfg.launcher, Launcher, cfg.cluster))
    assert isinstance(asks, InPods)
    return asks, requests_of(cfg, asks.node_names(cfg.nodes), asks.node_addresses(cfg.nodes))[0]


KINDS = [("volcano", "ascend"), ("trainjob", "nvidia"), ("pytorchjob", "amd"), ("ascendjob", "ascend")]


@pytest.mark.parametrize(("kind", "cluster"), KINDS)
def test_pods_have_what_a_runs_pods_have_and_none_ends_another(kind: str, cluster: str) -> None:
    words = ["launcher.host_network=true", "cluster.node_selector={accelerator-type: module-910b-8}"]
    asks, request = asker(kind, cluster, *words)
    manifests = asks.manifests(request)
    for manifest in manifests:
        check(manifest)
    run = [yaml.safe_load(text) for text in launcher_of(kind, cluster, *words).render(SPEC, 0).values()]
    ours, theirs = ([pod for each in found for pod in pods_in(each)] for found in (manifests, run))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert {NODE_FROM, MASTER, MACHINE} <= {each["name"] for each in one["spec"]["containers"][0]["env"]}
        assert one["spec"]["activeDeadlineSeconds"] > request.total_seconds
        assert without_work(one, "NAME") == without_work(other, "NAME")
    for_itself(kind, manifests)


def without_work(pod: dict[str, Any], name: str) -> dict[str, Any]:
    """A pod's template but for what it runs and for how long, its job under another name."""
    pod = json.loads(json.dumps(pod).replace(pod["metadata"]["labels"]["crosstune/job"], name))
    container = pod["spec"]["containers"][0]
    del container["command"], pod["spec"]["terminationGracePeriodSeconds"], pod["spec"]["activeDeadlineSeconds"]
    container["env"] = [each for each in container["env"] if not each["name"].startswith("CROSSTUNE_")]
    return dict(pod)


def for_itself(kind: str, manifests: list[dict[str, Any]]) -> None:
    """No pod is ended by the end of another, nor started again."""
    spec = manifests[-1]["spec"]
    if kind == "volcano":
        assert spec["policies"] == [] and spec["minAvailable"] == 3 and spec["ttlSecondsAfterFinished"] > 0
    elif kind == "trainjob":
        jobs = manifests[0]["spec"]["template"]["spec"]
        inner = jobs["replicatedJobs"][0]["template"]["spec"]
        assert jobs["failurePolicy"]["maxRestarts"] == inner["backoffLimitPerIndex"] == 0
        assert not {"backoffLimit", "podFailurePolicy"} & inner.keys()
    else:
        replicas = spec["pytorchReplicaSpecs" if kind == "pytorchjob" else "replicaSpecs"]
        assert spec["runPolicy"]["cleanPodPolicy"] == "None" and spec["runPolicy"]["ttlSecondsAfterFinished"] > 0
        assert [each["restartPolicy"] for each in replicas.values()] == ["Never", "Never"]


def test_question_variables_and_setup_arrive_unchanged() -> None:
    """Through YAML and through Kubernetes' own replacement of $(NAME)."""
    odd = " ".join(EVIL)
    cfg = compose("doctor_nodes", ["launcher=volcano", "cluster=nvidia", *WORDS, "nodes=2"])
    cfg.environment, cfg.cluster.setup, cfg.run_dir = {"ODD": odd}, [f"/shared/{odd}.sh"], f"/shared/{odd}"
    asks = asker_of(cfg, build(cfg.launcher, Launcher, cfg.cluster))
    assert isinstance(asks, InPods)
    request = requests_of(cfg, (), ())[0]
    [pod] = pods_in(yaml.safe_load(yaml.safe_dump(asks.manifests(request))))
    command = [expanded(word, {"HOME": "/root"}) for word in pod["spec"]["containers"][0]["command"]]
    assert Request.from_json(command[-1]) == request and request.run_dir == f"/shared/{odd}"
    assert f"/shared/{odd}.sh" in command and f"ODD={odd}" in command
    assert command[:2] == ["bash", "-c"] and "shared" not in command[2], "nothing of the user's is in the script"


def test_what_the_pods_cannot_have_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigError, match="run_dir: '/home/me' is in no shared folder"):
        asker("volcano", "nvidia", "run_dir=/home/me")
    with pytest.raises(ErrorGroup, match="an AscendJob is for ascend alone"):
        asker("ascendjob", "nvidia", "run_dir=/home/me")


def test_a_pod_ends_by_a_signal_though_it_is_process_1() -> None:
    """The first process of a container gets no signal that it has no handler for, its own alarm included."""
    _, request = asker("volcano", "nvidia", "quick=true", "run_dir=null")
    environment = {**os.environ, NODE_FROM: "VC_TASK_INDEX", "VC_TASK_INDEX": "1", MASTER: "no-such-host.invalid"}
    command = [sys.executable, "-P", "-m", "launchers.kubernetes.look", request.to_json()]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        caught = 0
        while not all(caught >> number - 1 & 1 for number in (signal.SIGTERM, signal.SIGALRM)):
            caught = int(CAUGHT.search(Path(f"/proc/{process.pid}/status").read_text())[1], 16)
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM


def test_what_a_controller_sets_for_others_is_not_looked_at(tmp_path: Path) -> None:
    """The pod's number is taken from it; the name is the machine's, not the pod's."""
    _, request = asker("pytorchjob", "nvidia", "quick=true", "nodes=1", "run_dir=null", "compare=[RANK,PET_NNODES]")
    place = {NODE_FROM: "RANK", "RANK": "0", "PET_NNODES": "3", MASTER: "127.0.0.1", MACHINE: "worker-7"}
    command = [sys.executable, "-P", "-m", "launchers.kubernetes.look", request.to_json()]
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, cwd=tmp_path)
    report = report_in(done.stdout.splitlines())
    assert report is not None and done.returncode == 0, done.stderr
    assert (report["node"], report["name"]) == (0, "worker-7")
    assert not {"RANK", "PET_NNODES"} & report["facts"]["environment"].keys()
    del place["RANK"]
    done = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "RANK: not set" in done.stderr
