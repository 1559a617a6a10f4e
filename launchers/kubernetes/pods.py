"""What pods and jobs tell of themselves: a pod's number, why it does not start, how it ended. Of plain values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.errors import first_line
from launchers.job import Word
from launchers.kubernetes import Manifest

USUAL_WAITS = ("ContainerCreating", "PodInitializing")
LONGEST = 300
UNSCHEDULABLE = "Unschedulable"
REPLICA_TYPE, REPLICA_INDEX = "training.kubeflow.org/replica-type", "training.kubeflow.org/replica-index"


def phase(pod: Manifest) -> str:
    """Pending, Running, Succeeded, Failed or Unknown."""
    return str(pod.get("status", {}).get("phase", "Pending"))


def started(pod: Manifest) -> bool:
    """Whether its container has run, so that there is a log."""
    states = [each.get("state", {}) for each in pod.get("status", {}).get("containerStatuses") or []]
    return any("running" in state or "terminated" in state for state in states)


def waits_for(pod: Manifest) -> str:
    """The usual wait of a pod that nothing is wrong with."""
    states = [each.get("state", {}) for each in pod.get("status", {}).get("containerStatuses") or []]
    return next((str(each["waiting"]["reason"]) for each in states if each.get("waiting")), phase(pod))


def trouble(pod: Manifest) -> str | None:
    """What keeps a pod from running, or ended it; None: nothing does."""
    return next(_troubles(pod), None)


def _troubles(pod: Manifest) -> Iterator[str]:
    status = pod.get("status", {})
    if status.get("reason"):  # Evicted, NodeLost, DeadlineExceeded, Preempting
        yield _told(status["reason"], status.get("message"))
    for each in status.get("conditions") or []:
        if each.get("type") == "DisruptionTarget" and each.get("status") == "True":
            yield _told(each.get("reason", "DisruptionTarget"), each.get("message"))
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            yield _told(each.get("reason", "not scheduled"), each.get("message"))
        if each.get("type") == "Ready" and each.get("reason") in ("NodeLost", "NodeStatusUnknown"):
            yield _told(each["reason"], f"node {pod.get('spec', {}).get('nodeName', '?')} does not answer")
    statuses = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for state in (each.get("state", {}) for each in statuses):
        waiting, ended = state.get("waiting", {}), state.get("terminated", {})
        if waiting.get("reason") and waiting["reason"] not in USUAL_WAITS:
            yield _told(waiting["reason"], waiting.get("message"))
        if ended.get("exitCode"):
            yield _told(f"{ended.get('reason', 'Error')}, exit code {ended['exitCode']}", ended.get("message"))


def all_troubles(pods: Sequence[tuple[int | None, Manifest]]) -> str:
    """One line of what is wrong with pods; of many with the same trouble one is told."""
    told: dict[str, list[str]] = {}
    for node, pod in pods:
        if text := trouble(pod):
            told.setdefault(text, []).append("?" if node is None else str(node))
    lines = [f"{_nodes(nodes)}: {text}" for text, nodes in told.items()]
    return "; ".join(lines)


def _nodes(nodes: Sequence[str]) -> str:
    shown = ", ".join(nodes[:8]) + (", ..." if len(nodes) > 8 else "")
    return f"node {shown}" if len(nodes) == 1 else f"nodes {shown}"


def _told(reason: str, message: str | None) -> str:
    text = f"{reason}: {first_line(message)}" if message else reason
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def replica_number(pod: Manifest) -> int | None:
    """Of a pod of a job with one master and its workers."""
    labels = pod["metadata"].get("labels") or {}
    index = str(labels.get(REPLICA_INDEX, labels.get("replica-index", "")))
    if not index.isdecimal():
        return None
    role = labels.get(REPLICA_TYPE, labels.get("replica-type", ""))
    return int(index) + (1 if role == "worker" else 0)


def index_number(pod: Manifest, key: str) -> int | None:
    """Of a pod whose index is in a label, or an annotation of older controllers."""
    place = {**(pod["metadata"].get("annotations") or {}), **(pod["metadata"].get("labels") or {})}
    index = str(place.get(key, ""))
    return int(index) if index.isdecimal() else None


def by_conditions(job: Manifest) -> tuple[Word, str]:
    """What the conditions of a job of Kubeflow's kinds say; they are kept, true or not, one per type."""
    words = {"Succeeded": Word.ended, "Complete": Word.ended, "Failed": Word.failed}
    words |= {"Suspended": Word.pending, "Restarting": Word.pending, "Running": Word.running}
    conditions = job.get("status", {}).get("conditions") or []
    true = {each["type"]: each for each in conditions if each.get("status") == "True"}
    for kind, word in words.items():
        if kind in true:
            each = true[kind]
            return word, "" if word is Word.running else f"{kind}: {each.get('message') or each.get('reason') or ''}"
    return Word.pending, ""
