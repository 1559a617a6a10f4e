"""Runs the pods of Volcano Jobs as processes of this machine: the job's controller and a kubelet in one thread.

A pod gets the command and the environment of its manifest, expanded as Kubernetes does; names of the job's network,
which is this machine, are in an /etc/hosts of its own. The rules by which jobs are restarted are those of the
controller's source (see launchers/kubernetes/volcano.py).
"""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fake_kubernetes import Cluster, Manifest, now
from tests.net_lab import NetLab

REFERENCE = re.compile(r"\$(?:(\$)|\(([-._a-zA-Z0-9]*)\))")
IMAGE_ENVIRONMENT = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "CI")
"""What the image brings along."""
OWN_HOSTS = 'mount --bind "$1" /etc/hosts && eval "$2" && shift 2 && exec "$@"'
GONE = ("Completed", "Failed", "Terminated", "Aborted")


def expanded(text: str, variables: dict[str, str]) -> str:
    """As k8s.io/kubernetes/third_party/forked/golang/expansion does; references to what is not known stay."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[1] else variables.get(match[2], match[0])

    return REFERENCE.sub(value, text)


def field_of(pod: Manifest, path: str) -> str:
    """The downward API."""
    if match := re.fullmatch(r"metadata\.(annotations|labels)\['(.+)'\]", path):
        return str(pod["metadata"].get(match[1], {}).get(match[2], ""))
    value: Any = pod
    for part in path.split("."):
        value = value.get(part, "")
    return str(value)


@dataclass
class Running:
    """A pod's process."""

    pod: Manifest
    process: subprocess.Popen[str]
    reader: threading.Thread


class Kubelet(threading.Thread):
    """See the module.

    Args:
        cluster: whose jobs are run.
        folder: for what pods have of their own.
        lab: hosts on which pods run, each on its own; None: all on this machine.
        planted: by pod, what a shell does in it before its command.
        stuck: by pod, the status in which it stays.
    """

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        *,
        lab: NetLab | None = None,
        planted: dict[int, str] | None = None,
        stuck: dict[int, Manifest] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.cluster, self.folder, self.stopped = cluster, folder, threading.Event()
        self.lab, self.planted, self.stuck = lab, planted or {}, stuck or {}
        self.running: dict[str, Running] = {}
        cluster.keeps_deleted = True

    def __enter__(self) -> Kubelet:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stopped.set()
        self.join()
        for each in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(each.process.pid, signal.SIGKILL)
            each.process.wait()

    def run(self) -> None:
        while not self.stopped.wait(0.1):
            for job in self.cluster.all("jobs"):
                self._reconcile(job)

    def evict(self, pod: str) -> None:
        """As a scheduler that needs the place."""
        self.running[pod].process.send_signal(signal.SIGTERM)
        self.cluster.objects["pods", pod]["metadata"]["deletionTimestamp"] = now()

    def _reconcile(self, job: Manifest) -> None:
        name, spec = job["metadata"]["name"], job["spec"]
        status = job.setdefault("status", {"retryCount": 0, "state": {"phase": "Pending"}})
        ended = {pod: code for pod in list(self.running) if (code := self._look(pod)) is not None}
        if job["metadata"].get("deletionTimestamp"):
            self._end_all()
            if not self.running:
                for pod in (pod for pod in self.cluster.all("pods") if pod["job"] == name):
                    self.cluster.remove("pods", pod["metadata"]["name"])
                self.cluster.remove("jobs", name)
            return
        if status["state"]["phase"] == "Pending":
            for index in range(spec["tasks"][0]["replicas"]):
                self._start(job, index)
            self._phase(job, "Running")
        elif status["state"]["phase"] == "Running" and any(ended.values()) and spec["policies"]:
            code = next(filter(None, ended.values()))
            action = next(
                policy["action"]
                for policy in spec["policies"]
                if policy.get("exitCode") == code or "PodFailed" in policy.get("events", ())
            )
            status["retryCount"] += action == "RestartJob"
            self._phase(job, "Restarting" if action == "RestartJob" else "Terminating")
            self._end_all()
        elif status["state"]["phase"] in ("Restarting", "Terminating") and len(ended) == len(self.running):
            last = status["retryCount"] >= spec["maxRetry"]
            over = "Terminated" if status["state"]["phase"] == "Terminating" else "Failed" if last else None
            if over is None:
                for pod in list(self.running):
                    self.cluster.remove("pods", pod)
            self.running.clear()
            self._phase(job, over or "Pending")
        elif status["state"]["phase"] == "Running" and ended and len(ended) == len(self.running) and not self.stuck:
            self.running.clear()
            self._phase(job, "Failed" if any(ended.values()) else "Completed")

    def _phase(self, job: Manifest, phase: str) -> None:
        job["status"]["state"] = {"phase": phase}
        self.cluster.put("jobs", job)

    def _end_all(self) -> None:
        for name, each in list(self.running.items()):
            pod = self.cluster.objects["pods", name]
            if each.process.poll() is None and "deletionTimestamp" not in pod["metadata"]:
                pod["metadata"]["deletionTimestamp"] = now()
                each.process.send_signal(signal.SIGTERM)
            elif each.process.poll() is not None and self.cluster.objects.get(("jobs", pod["job"]), {}).get(
                "metadata", {}
            ).get("deletionTimestamp"):
                self.cluster.remove("pods", name)
                del self.running[name]

    def _look(self, name: str) -> int | None:
        """Exit code of a pod that has ended; its state is kept up to date."""
        each = self.running[name]
        code = each.process.poll()
        if code is None or each.pod["status"]["phase"] != "Running":
            return each.pod["status"].get("code") if code is not None else None
        each.reader.join()
        code = 128 - code if code < 0 else code
        ended = {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}
        self.cluster.set_pod(name, "Failed" if code else "Succeeded", containerStatuses=[{"state": ended}], code=code)
        return code

    def _start(self, job: Manifest, index: int) -> None:
        name, task = f"{job['metadata']['name']}-node-{index}", job["spec"]["tasks"][0]
        pod = copy.deepcopy(task["template"])
        about = pod["metadata"]
        about["name"] = name
        about["labels"]["volcano.sh/task-index"] = str(index)
        about.setdefault("annotations", {})["volcano.sh/job-retry-count"] = str(job["status"]["retryCount"])
        pod |= {"status": {"phase": "Running", "hostIP": "127.0.0.1"}, "job": job["metadata"]["name"]}
        pod["status"]["containerStatuses"] = [{"state": {"running": {}}}]
        if index in self.stuck:
            return self.cluster.put("pods", pod | {"status": {"phase": "Pending", **self.stuck[index]}})
        pod["spec"]["nodeName"] = f"worker-{index}"
        [container] = pod["spec"]["containers"]
        variables: dict[str, str] = {}
        for each in container["env"]:
            variables[each["name"]] = self._value(pod, each, variables)
        variables["VC_TASK_INDEX"] = str(index)
        hosts = self.folder / f"hosts-{index}"
        first = self.lab.address("n0") if self.lab else "127.0.0.1"
        names = f"{first} {name.removesuffix(str(index))}0.{job['metadata']['name']}\n"
        hosts.write_text(f"127.0.0.1 localhost\n{names}")
        command = ["unshare", "-m", "sh", "-c", OWN_HOSTS, "sh", str(hosts), self.planted.get(index, "true")]
        command += [expanded(word, variables) for word in container["command"]]
        process = subprocess.Popen(
            self.lab.on(f"n{index}", command) if self.lab else command,
            env={key: os.environ[key] for key in IMAGE_ENVIRONMENT if key in os.environ} | variables,
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._read, args=(name, process), daemon=True)
        self.running[name] = Running(pod, process, reader)
        self.cluster.logs[name] = []
        self.cluster.put("pods", pod)
        reader.start()

    def _value(self, pod: Manifest, variable: Manifest, known: dict[str, str]) -> str:
        source = variable.get("valueFrom")
        if source is None:
            return expanded(variable["value"], known)
        if "fieldRef" in source:
            return field_of(pod, source["fieldRef"]["fieldPath"])
        reference = source["secretKeyRef"]
        return self.cluster.secrets[reference["name"]][reference["key"]]

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.cluster.say(name, line.rstrip("\n"))
