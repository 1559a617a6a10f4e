"""One config, every launcher: each rank gets the same arguments and the same environment.

What a launcher submits is really run here, with a stand-in for what it hands the job to: ssh, srun, a controller of
Kubernetes. Only torchrun is replaced: it writes down what each rank would get, instead of starting it.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from launchers import launch, submit
from launchers.node import NOT_SHARED
from tests.fake_kubelet import expanded, field_of
from tests.unit.test_kubernetes_render import pods_of

ROOT = Path(__file__).parents[2]
NPROC = 2
NASTY = "a b'c\"d$(touch never) $HOME `touch never` ${x}\n;$$é"
TORCHRUN = '''
"""Stands for torchrun: writes what each rank of this machine would get."""
import argparse, json, os, sys
parser = argparse.ArgumentParser()
for name in ("nnodes", "nproc-per-node", "node-rank", "master-addr", "master-port", "max-restarts", "log-dir"):
    parser.add_argument(f"--{name}")
for name in ("shutdown-timeout", "signals-to-handle", "module"):
    parser.add_argument(f"--{name}")
words = sys.argv[1:]
at = words.index("-m")
known = parser.parse_args(words[:at])
nproc, node = int(known.nproc_per_node), int(known.node_rank)
for local in range(nproc):
    rank = node * nproc + local
    told = {"argv": words[at:], "environment": dict(os.environ), "world": int(known.nnodes) * nproc,
            "port": known.master_port, "cwd": os.getcwd()}
    with open(os.path.join(os.environ["RANKS"], f"{rank}.json"), "w") as file:
        json.dump(told, file)
'''
RESOLVER = """
import socket
real = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: real("127.0.0.1", *rest, **more)
"""
SSH = """#!/bin/bash
# Runs the command that comes last on this machine, as a login shell would.
exec sh -c "${@: -1}"
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_PROCID=$node SLURM_NODEID=$node SLURMD_NODENAME=n$node "$@" || exit
done
"""
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames "*) for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do echo "n$node"; done ;;
    *"show node"*) echo "NodeName=n0 NodeAddr=127.0.0.1 NodeHostName=n0" ;;
    *"show job"*) echo "JobId=7 JobState=RUNNING " ;;
esac
"""


class Home:
    """Commands that stand for a cluster, and the environment of its machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin, self.library = folder / "bin", folder / "library"
        self.ranks = folder / "ranks of 'all'"
        for path in (self.bin, self.library / "torch" / "distributed", self.ranks):
            path.mkdir(parents=True)
        for name, text in (("ssh", SSH), ("srun", SRUN), ("scontrol", SCONTROL)):
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        for package in ("torch", "torch/distributed"):
            (self.library / package / "__init__.py").touch()
        (self.library / "torch" / "distributed" / "run.py").write_text(TORCHRUN)
        (self.library / "sitecustomize.py").write_text(RESOLVER)
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PYTHONPATH": f"{self.library}:{ROOT}",
            "TOKEN": "secret",
        }

    def run(self, words: list[str], cwd: Path | None = None, **environment: str) -> None:
        done = subprocess.run(
            words, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


def by_command(home: Home, planned: submit.Plan, words: list[str]) -> None:
    """A launcher that stays in the foreground: the real command."""
    home.run([sys.executable, "-P", "-m", "launchers.cli", *words], cwd=home.folder)


def by_slurm(home: Home, planned: submit.Plan, words: list[str]) -> None:
    nodes = str(planned.job.spec.nodes)
    home.run(
        ["bash", "job.sbatch"],
        cwd=planned.folder.path,
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="n[0-1]",
        SLURM_JOB_NUM_NODES=nodes,
    )


def by_kubernetes(home: Home, planned: submit.Plan, words: list[str]) -> None:
    """The container's own command, once for each pod, with what manifest and controller give it."""
    templates = pods_of(planned.launcher, planned.job.spec)
    for node in range(planned.job.spec.nodes):
        pod = copy.deepcopy(templates[min(node, len(templates) - 1)])
        about = pod.setdefault("metadata", {})
        about.setdefault("labels", {})["volcano.sh/task-index"] = str(node)
        about.setdefault("annotations", {})["volcano.sh/job-retry-count"] = "0"
        about["labels"]["jobset.sigs.k8s.io/restart-attempt"] = "0"
        pod["status"] = {"hostIP": "127.0.0.1"}
        given = {"VC_TASK_INDEX": str(node), "RANK": str(node), "PET_NODE_RANK": str(node), "WORLD_SIZE": "9"}
        given |= {"JOB_COMPLETION_INDEX": str(node), "PET_NNODES": "7", "MASTER_ADDR": "elsewhere"}
        [container] = pod["spec"]["containers"]
        for each in container["env"]:
            given[each["name"]] = value_of(each, pod, given)
        home.run([expanded(word, given) for word in [*container["command"], *container.get("args", [])]], **given)


def value_of(variable: dict[str, Any], pod: dict[str, Any], known: dict[str, str]) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return expanded(variable["value"], known)
    return field_of(pod, source["fieldRef"]["fieldPath"]) if "fieldRef" in source else "secret"


KUBERNETES = ["launcher.image=i", "launcher.secret_refs={TOKEN: s/k}"]
LAUNCHERS: dict[str, tuple[list[str], Callable[[Home, submit.Plan, list[str]], None]]] = {
    "local": ([], by_command),
    "ssh": (["launcher.hosts=[n0]"], by_command),
    "slurm": (["launcher.export=[PATH,HOME,PYTHONPATH]"], by_slurm),
    "volcano": (KUBERNETES, by_kubernetes),
    "trainjob": (KUBERNETES, by_kubernetes),
    "pytorchjob": (KUBERNETES, by_kubernetes),
    "ascendjob": (KUBERNETES, by_kubernetes),
}


def ranks_under(name: str, nodes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each rank gets, with the run's folder as RUN."""
    home = Home(folder)
    run = folder / "run"
    for key, value in home.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(folder)
    more, start = LAUNCHERS[name]
    more = [*more, f"launcher.claims={{{folder}: claim}}"] if more is KUBERNETES else more
    ours = [f"launcher={name}", f"nodes={nodes}", "secrets=[TOKEN]", f"python={sys.executable}", *more]
    ours += ["cluster.interface=lo", "check=false", "restarts=0", "master_port=24567"]
    theirs = [*("model.path=m", "dataset.path=d", "device.threads=3"), f"nproc={NPROC}", f"run_dir={run}"]
    variables = {"RANKS": str(home.ranks), "NASTY": NASTY}
    ours += ["cluster=ascend"] if name == "ascendjob" else []
    options = compose("launch", ours)
    options.environment = variables
    planned = launch.plan("train", compose("train", theirs), options)
    if start is by_command:
        words = ["launch", "train", *ours, *theirs, *[f"+environment.{k}={hydra(v)}" for k, v in variables.items()]]
    else:
        with submit.alone_with(planned.folder):
            submit.write(planned)
        words = []
    start(home, planned, words)
    found = [json.loads((home.ranks / f"{rank}.json").read_text()) for rank in range(nodes * NPROC)]
    return [json.loads(re.sub(re.escape(json.dumps(str(folder))[1:-1]), "FOLDER", json.dumps(each))) for each in found]


def hydra(value: str) -> str:
    """Quoted for an override."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${") + "'"


def comparable(rank: dict[str, Any]) -> dict[str, Any]:
    """Without what rightly differs between machines and schedulers: the time of the start, a lone machine's port."""
    own = {"CROSSTUNE_STARTED", "CROSSTUNE_MASTER", "BASH_FUNC_machine%%"}
    kept = {k: v for k, v in rank["environment"].items() if not NOT_SHARED.fullmatch(k) and k not in own}
    return rank | {"environment": kept, "port": rank["port"] if rank["world"] > NPROC else None}


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_rank_gets_the_same_whoever_starts_it(nodes, tmp_path, monkeypatch):
    names = [name for name in LAUNCHERS if nodes == 1 or LAUNCHERS[name][1] is not by_command]
    found = {}
    for name in names:
        with monkeypatch.context() as patch:
            found[name] = [comparable(rank) for rank in ranks_under(name, nodes, tmp_path / name, patch)]
    expected = found[names[0]]
    assert len(expected) == nodes * NPROC
    for name in names[1:]:
        assert found[name] == expected, name
    rank = expected[0]
    assert rank["argv"] == ["-m", "launchers.cli", "train", "--resolved", "FOLDER/run/launch/request.yaml"]
    assert rank["environment"]["NASTY"] == NASTY and rank["environment"]["TOKEN"] == "secret"
    assert rank["environment"]["OMP_NUM_THREADS"] == "3" and rank["cwd"] == "FOLDER"
    assert not {"RANK", "PET_NNODES", "MASTER_ADDR"} & rank["environment"].keys()
    assert not list(tmp_path.rglob("never"))
