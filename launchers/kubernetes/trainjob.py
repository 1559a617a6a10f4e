"""A TrainJob of the Kubeflow Trainer (v2), with a TrainingRuntime of its own: those of a site know nothing of us.

The trainer makes a JobSet of it, which starts all pods again when one fails, counts that on the pods, and by its rules
gives up at once on a fault of the user's. Sources: kubeflow/trainer, pkg/runtime/framework/plugins/{torch,volcano};
kubernetes-sigs/jobset, api/jobset/v1alpha2 and pkg/constants; models of kubeflow-trainer-api.
"""

from __future__ import annotations

from collections.abc import Sequence

from configs.errors import EXIT_USER_FAULT
from launchers.job import Word
from launchers.kubernetes import Manifest
from launchers.kubernetes.api import Resource
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.pod import PodTemplate, metadata, said
from launchers.kubernetes.pods import by_conditions, index_number, phase
from launchers.spec import LaunchSpec

NODE = "node"
"""The trainer knows its replicated job and the container in it by this name."""
INDEX = "batch.kubernetes.io/job-completion-index"
QUEUE = "scheduling.volcano.sh/queue-name"
VOLCANO = "volcano"


class TrainJobLauncher(KubernetesLauncher):
    """See the module."""

    name = "trainjob"
    resource = Resource("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob")
    others = {"TrainingRuntime": Resource("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "TrainingRuntime")}
    container = NODE

    def objects(self, spec: LaunchSpec, pod: PodTemplate) -> dict[str, Manifest]:
        """See `KubernetesLauncher.objects`."""
        version = f"{self.resource.group}/{self.resource.version}"
        about = metadata(pod.name, spec, self.cfg, self.cluster)
        if self.cfg.queue:
            about["annotations"] |= {QUEUE: self.cfg.queue}
        gang: Manifest | None = {"volcano": {}} if self.cfg.scheduler == VOLCANO else None
        runtime = {
            "apiVersion": version,
            "kind": "TrainingRuntime",
            "metadata": {**about, "labels": {**about["labels"], "trainer.kubeflow.org/framework": "torch"}},
            "spec": said(
                {
                    "mlPolicy": {"numNodes": spec.nodes, "torch": {}},
                    "podGroupPolicy": gang,
                    "template": {"metadata": {"annotations": about["annotations"]}, "spec": self.job_set(spec, pod)},
                }
            ),
        }
        job = {
            "apiVersion": version,
            "kind": self.resource.kind,
            "metadata": about,
            "spec": {
                "runtimeRef": {"apiGroup": self.resource.group, "kind": "TrainingRuntime", "name": pod.name},
                # "auto" would count CPUs wherever the name of the device's resource has no "gpu" in it.
                "trainer": {"numNodes": spec.nodes, "numProcPerNode": spec.nproc},
            },
        }
        return {"trainjob-runtime.yaml": runtime, "trainjob.yaml": job}

    def job_set(self, spec: LaunchSpec, pod: PodTemplate) -> Manifest:
        """One indexed Job with a pod per machine."""
        template = pod.render(
            container=self.container,
            node_from="JOB_COMPLETION_INDEX",
            master=f"{pod.name}-{NODE}-0-0.{pod.name}",
            restarts_from="metadata.annotations['jobset.sigs.k8s.io/restart-attempt']",
        )
        user_fault = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [EXIT_USER_FAULT]}}
        jobs = {
            "name": NODE,
            "replicas": 1,
            "template": {
                "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
                "spec": {
                    "parallelism": spec.nodes,
                    "completions": spec.nodes,
                    "completionMode": "Indexed",
                    "backoffLimit": 0,
                    "podFailurePolicy": {"rules": [user_fault]},
                    "template": template,
                },
            },
        }
        give_up = {"name": "user-fault", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
        return {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": spec.restarts, "rules": [give_up]},
            "replicatedJobs": [jobs],
        }

    def each_for_itself(self, objects: dict[str, Manifest], left_seconds: int) -> None:
        """See `KubernetesLauncher.each_for_itself`. Kubernetes has it from 1.29 on; a TrainJob stays until deleted."""
        runtime, _ = objects.values()
        spec = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
        del spec["backoffLimit"], spec["podFailurePolicy"]
        spec["backoffLimitPerIndex"] = 0

    def word(self, job: Manifest, pods: Sequence[Manifest]) -> tuple[Word, str]:
        """See `KubernetesLauncher.word`."""
        word, detail = by_conditions(job)
        if (word, detail) == (Word.pending, "") and any(phase(pod) == "Running" for pod in pods):
            word = Word.running  # there is no condition for that
        return word, detail

    def node_of(self, pod: Manifest) -> int | None:
        """See `KubernetesLauncher.node_of`."""
        return index_number(pod, INDEX)
