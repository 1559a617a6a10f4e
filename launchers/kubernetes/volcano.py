"""A Volcano Job: one task with a pod per machine, started together or not at all.

Its controller restarts the whole job when a pod fails or is evicted, counts that in `status.retryCount`, and writes the
count on the pods. Sources: volcano-sh/volcano, pkg/controllers/job (state/running.go, state/restarting.go,
job_controller_util.go), pkg/controllers/job/plugins/{svc,env}. Not its pytorch plugin, whose WORLD_SIZE counts pods.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import EXIT_USER_FAULT
from launchers.job import Word
from launchers.kubernetes import Manifest
from launchers.kubernetes.api import Resource
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.pod import PodTemplate, metadata, said
from launchers.kubernetes.pods import index_number
from launchers.spec import LaunchSpec

TASK = "node"
INDEX = "volcano.sh/task-index"
WORDS = {
    **dict.fromkeys(("Pending", "Restarting", ""), Word.pending),
    **dict.fromkeys(("Running", "Completing", "Terminating", "Aborting"), Word.running),
    **dict.fromkeys(("Failed", "Terminated"), Word.failed),
    "Completed": Word.ended,
    "Aborted": Word.cancelled,
}


class VolcanoLauncher(KubernetesLauncher):
    """See the module."""

    name = "volcano"
    resource = Resource("batch.volcano.sh", "v1alpha1", "jobs", "Job")
    container = "crosstune"

    def objects(self, spec: LaunchSpec, pod: PodTemplate) -> dict[str, Manifest]:
        """See `KubernetesLauncher.objects`."""
        template = pod.render(
            container=self.container,
            node_from="VC_TASK_INDEX",
            master=f"{pod.name}-{TASK}-0.{pod.name}",
            restarts_from="metadata.annotations['volcano.sh/job-retry-count']",
        )
        task = {"name": TASK, "replicas": spec.nodes, "minAvailable": spec.nodes, "template": template}
        content = {
            "schedulerName": self.cfg.scheduler,
            "queue": self.cfg.queue,
            "priorityClassName": self.cfg.priority_class,
            "minAvailable": spec.nodes,
            # The controller gives up when its count has come to this, so before the restart of that number.
            "maxRetry": spec.restarts + 1,
            "plugins": {"env": [], "svc": ["--publish-not-ready-addresses=true"]},
            "policies": [  # the first that fits
                {"exitCode": EXIT_USER_FAULT, "action": "TerminateJob"},
                {"events": ["PodFailed", "PodEvicted"], "action": "RestartJob"},
                {"event": "TaskCompleted", "action": "CompleteJob"},
            ],
            "tasks": [task],
        }
        manifest = {
            "apiVersion": f"{self.resource.group}/{self.resource.version}",
            "kind": self.resource.kind,
            "metadata": metadata(pod.name, spec, self.cfg, self.cluster),
            "spec": said(content),
        }
        return {"volcano-job.yaml": manifest}

    def each_for_itself(self, objects: dict[str, Manifest], left_seconds: int) -> None:
        """See `KubernetesLauncher.each_for_itself`: without a policy an end does nothing but count."""
        [job] = objects.values()
        job["spec"] |= {"policies": [], "ttlSecondsAfterFinished": left_seconds}

    def word(self, job: Manifest, pods: Sequence[Manifest]) -> tuple[Word, str]:
        """See `KubernetesLauncher.word`."""
        state = job.get("status", {}).get("state") or {}
        phase = state.get("phase", "")
        said_more = [phase, state.get("reason"), state.get("message")] if phase != "Running" else []
        return WORDS.get(phase, Word.unknown), ", ".join(part for part in said_more if part)

    def node_of(self, pod: Manifest) -> int | None:
        """See `KubernetesLauncher.node_of`."""
        return index_number(pod, INDEX)
