"""A PyTorchJob: a master and its workers, each pod restarted by itself.

That all machines start again together follows from the run: when one ends, the others lose it and end too. The operator
goes by exit codes (from 128 on: again) and has no bound of its own that counts them, so `entry` gives both. Sources:
kubeflow/training-operator, pkg/controller.v1/{common,pytorch}, pkg/core/job.go, pkg/apis/kubeflow.org/v1.
"""

from __future__ import annotations

from collections.abc import Sequence

from launchers.job import Word
from launchers.kubernetes import Manifest
from launchers.kubernetes.api import Resource
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.pod import PodTemplate, metadata, said
from launchers.kubernetes.pods import by_conditions, replica_number
from launchers.spec import LaunchSpec

RETRY = 138
"""128 + SIGUSR1: the one code that all versions of the operator take for a wish to be started again."""


class PyTorchJobLauncher(KubernetesLauncher):
    """See the module."""

    name = "pytorchjob"
    resource = Resource("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob")
    container = "pytorch"

    def objects(self, spec: LaunchSpec, pod: PodTemplate) -> dict[str, Manifest]:
        """See `KubernetesLauncher.objects`."""
        template = pod.render(
            container=self.container,
            node_from="RANK",
            master=f"{pod.name}-master-0",
            retry_code=RETRY if spec.restarts else 0,
            port_name="pytorchjob-port",
            restart_policy=None,
        )
        policy = {
            "cleanPodPolicy": "Running",
            "schedulingPolicy": scheduling(spec, self.cfg.queue, self.cfg.priority_class),
        }
        manifest = {
            "apiVersion": f"{self.resource.group}/{self.resource.version}",
            "kind": self.resource.kind,
            "metadata": metadata(pod.name, spec, self.cfg, self.cluster),
            "spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas(spec, template)},
        }
        return {"pytorchjob.yaml": manifest}

    def each_for_itself(self, objects: dict[str, Manifest], left_seconds: int) -> None:
        """See `KubernetesLauncher.each_for_itself`: by default the end of the master ends its workers."""
        [job] = objects.values()
        job["spec"]["runPolicy"] |= {"cleanPodPolicy": "None", "ttlSecondsAfterFinished": left_seconds}

    def word(self, job: Manifest, pods: Sequence[Manifest]) -> tuple[Word, str]:
        """See `KubernetesLauncher.word`."""
        return by_conditions(job)

    def node_of(self, pod: Manifest) -> int | None:
        """See `KubernetesLauncher.node_of`."""
        return replica_number(pod)


def replicas(spec: LaunchSpec, template: Manifest) -> Manifest:
    """A master and its workers, all alike."""
    policy = "ExitCode" if spec.restarts else "Never"
    counts = {"Master": 1, "Worker": spec.nodes - 1}
    return {
        role: {"replicas": count, "restartPolicy": policy, "template": template}
        for role, count in counts.items()
        if count
    }


def scheduling(spec: LaunchSpec, queue: str | None, priority_class: str | None) -> Manifest:
    """All machines or none, where the operator was set up to ask a scheduler for that."""
    return said({"minAvailable": spec.nodes, "queue": queue, "priorityClass": priority_class})
