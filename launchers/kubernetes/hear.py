"""Hears the pods of a short job: each once it has ended, and of one that gives no report why."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from configs.errors import CrosstuneError
from launchers.doctor.nodes.request import report_in
from launchers.kubernetes import Manifest
from launchers.kubernetes import pods as told
from launchers.kubernetes.api import Api
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.lines import lines_of
from launchers.kubernetes.pod import JOB_LABEL

if TYPE_CHECKING:
    from launchers.doctor.nodes.converse import Heard

IMAGE = "launcher.image, launcher.pull_secrets; queue_seconds=... where it only takes long"
REMEDIES = {
    "Unschedulable": "queue_seconds=... waits longer; fewer nodes, another launcher.queue, cluster.node_selector or "
    "launcher.tolerations",
    "ErrImage": IMAGE,
    "ImagePull": IMAGE,
    "InvalidImage": IMAGE,
    "CreateContainerConfig": "launcher.secret_refs: each must be there in the namespace, with its key",
    "FailedMount": "launcher.claims: each must be there in the namespace, and mountable by several pods",
    "OOMKilled": "memory_gib=...",
}
"""By the beginning of what is wrong with a pod."""


class Hearing:
    """See the module.

    Args:
        launcher: of the job.
        api: the server.
        name: of the job.
        nodes: pods that it has.
        start_seconds: within which each must start.
        look_seconds: within which each must then end.
    """

    def __init__(
        self, launcher: KubernetesLauncher, api: Api, name: str, nodes: int, start_seconds: float, look_seconds: float
    ) -> None:
        self.launcher, self.api, self.name = launcher, api, name
        self.start_seconds, self.look_seconds = start_seconds, look_seconds
        self.waiting: set[int] = set(range(nodes))
        self.running: dict[int, Manifest] = {}
        """Pods that have started, as they then were."""

    def answers(self) -> Iterator[Heard]:
        """One per pod.

        Raises:
            LostError: the server does not answer.
        """
        start_by = time.monotonic() + self.start_seconds
        end_by = start_by + self.look_seconds
        label = f"{JOB_LABEL}={self.name}"
        while self.waiting or self.running:
            until = start_by if self.waiting else end_by
            pods = self.by_node(self.api.wait_for_pods(label, self.is_news, max(0.0, until - time.monotonic())))
            begun = {node for node in self.waiting & pods.keys() if _begun(pods[node])}
            self.waiting -= begun
            self.running |= {node: pods[node] for node in begun}
            yield from self.ended(pods)
            if time.monotonic() >= start_by:
                yield from self.not_started(pods)
            if time.monotonic() >= end_by:
                yield from self.late(pods)

    def by_node(self, pods: Sequence[Manifest]) -> dict[int, Manifest]:
        """The latest pod of each number."""
        in_order = sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))
        numbered = [(self.launcher.node_of(pod), pod) for pod in in_order]
        return {node: pod for node, pod in numbered if node is not None}

    def is_news(self, pods: list[Manifest]) -> bool:
        """Whether a pod has started or ended since the last look."""
        now = self.by_node(pods)
        return any(_begun(now[node]) for node in self.waiting & now.keys()) or any(
            _over(was, now.get(node)) for node, was in self.running.items()
        )

    def ended(self, pods: Mapping[int, Manifest]) -> Iterator[Heard]:
        """What pods have said that have ended by now."""
        for node, was in list(self.running.items()):
            if _over(was, pods.get(node)):
                del self.running[node]
                yield node, self.answer_of(was, pods.get(node))

    def answer_of(self, was: Manifest, pod: Manifest | None) -> Sequence[str] | CrosstuneError:
        """What a pod printed that has ended, or why there is nothing.

        Args:
            was: the pod when it had started.
            pod: of the same number now.
        """
        if pod is None or not _same(was, pod):
            return _fault("its pod has been taken away while it looked", was, told.trouble(was) or "deleted")
        why = told.trouble(pod) or told.phase(pod)
        if not told.started(pod):
            return _fault("its pod has ended before it began", pod, why)
        try:
            lines = list(lines_of(self.api, pod, self.launcher.container, follow=False))
        except CrosstuneError as error:
            return CrosstuneError(self.name, f"{error.where}: {error.found}", remedy=error.remedy)
        if report_in(lines) is not None:
            return lines
        said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return _fault("its pod has ended without one", pod, f"{why}; it said last: {said[:200]}")

    def not_started(self, pods: Mapping[int, Manifest]) -> Iterator[Heard]:
        """Why pods wait; where there are none, what is said of the job."""
        without = self.of_job() if self.waiting - pods.keys() else ""
        for node in sorted(self.waiting):
            pod = pods.get(node)
            why = without if pod is None else told.trouble(pod) or self.of_pod(pod)
            yield node, _fault(f"its pod has not started within {self.start_seconds:.0f} s", pod, why)
        self.waiting.clear()

    def of_pod(self, pod: Manifest) -> str:
        """What events say of a pod that does not complain itself, such as of a volume; else what it waits for."""
        return self.launcher.complaint(self.api, pod["metadata"]["name"]) or told.waits_for(pod)

    def of_job(self) -> str:
        """Why a job has made no pods."""
        job = self.api.get(self.launcher.resource, self.name)
        if job is None:
            return "its job has been deleted"
        word, detail = self.launcher.word(job, [])
        return self.launcher.why_no_pods(self.api, job) or detail or f"the job is {word.value}, without pods"

    def late(self, pods: Mapping[int, Manifest]) -> Iterator[Heard]:
        """Pods that have not ended in their time."""
        for node, was in self.running.items():
            pod = pods.get(node, was)
            why = told.trouble(pod) or told.phase(pod)
            yield node, _fault(f"its pod has said nothing within {self.look_seconds:.0f} s", pod, why)
        self.running.clear()


def _begun(pod: Manifest) -> bool:
    """Whether a pod runs or has run; a machine may refuse one that it was given, which then has failed."""
    return told.started(pod) or told.phase(pod) == "Failed"


def _over(was: Manifest, pod: Manifest | None) -> bool:
    """Whether a pod that had started has ended, or is there no more."""
    return pod is None or not _same(was, pod) or told.phase(pod) in ("Succeeded", "Failed")


def _same(one: Manifest, other: Manifest) -> bool:
    return bool(one["metadata"]["uid"] == other["metadata"]["uid"])


def _fault(what: str, pod: Manifest | None, why: str) -> CrosstuneError:
    machine = (pod or {}).get("spec", {}).get("nodeName")
    remedy = next((text for start, text in REMEDIES.items() if why.startswith(start)), None)
    return CrosstuneError("Kubernetes", f"{what}{f' on {machine}' if machine else ''}: {why}", remedy=remedy)
