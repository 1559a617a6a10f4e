"""An AscendJob of Huawei's MindCluster: a master and its workers; a pod that is replaced renews all of them.

Its operator's service has a cluster address with one port, which no other attempt's rendezvous would get
through: an own headless service gives the master a name instead. Sources: mind-cluster,
docs/zh/scheduling/api/ascend_job.md and component/ascend-operator/pkg/controllers/v1 (pod, job, env, labels, service).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from configs.errors import ConfigError, CrosstuneError
from launchers.job import Word
from launchers.kubernetes import Manifest
from launchers.kubernetes.api import SERVICES, Resource
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.pod import JOB_LABEL, PodTemplate, metadata, said
from launchers.kubernetes.pods import by_conditions, replica_number
from launchers.kubernetes.pytorchjob import RETRY, replicas, scheduling
from launchers.spec import LaunchSpec

DEVICE = "ascend"
MASTER_HOST = "node-0"


class AscendJobLauncher(KubernetesLauncher):
    """See the module."""

    name = "ascendjob"
    resource = Resource("mindxdl.gitee.com", "v1", "ascendjobs", "AscendJob")
    others = {"Service": SERVICES}
    container = "ascend"

    def faults(self, spec: LaunchSpec) -> Iterator[CrosstuneError]:
        """See `KubernetesLauncher.faults`."""
        yield from super().faults(spec)
        if self.cluster.device != DEVICE or not spec.devices:
            found = (
                f"device={self.cluster.device}, resource={self.cluster.resource}: an AscendJob is for {DEVICE} alone"
            )
            yield ConfigError("cluster", found, remedy="cluster=ascend, or launcher=volcano")

    def objects(self, spec: LaunchSpec, pod: PodTemplate) -> dict[str, Manifest]:
        """See `KubernetesLauncher.objects`."""
        template = pod.render(
            container=self.container,
            node_from="RANK",
            master=f"{MASTER_HOST}.{pod.name}",
            retry_code=RETRY if spec.restarts else 0,
            port_name="ascendjob-port",
            restart_policy=None,
        )
        specs = replicas(spec, template)
        named = {**template["spec"], "hostname": MASTER_HOST, "subdomain": pod.name}
        specs["Master"] = {**specs["Master"], "template": {**template, "spec": named}}
        policy = {
            "backoffLimit": spec.restarts or None,
            "schedulingPolicy": scheduling(spec, self.cfg.queue or "default", self.cfg.priority_class),
        }
        about = metadata(pod.name, spec, self.cfg, self.cluster)
        job = {
            "apiVersion": f"{self.resource.group}/{self.resource.version}",
            "kind": self.resource.kind,
            "metadata": {**about, "labels": {"framework": "pytorch", **about["labels"]}},
            "spec": said(
                {
                    "schedulerName": self.cfg.scheduler,
                    "runPolicy": said(policy),
                    "successPolicy": "AllWorkers",
                    "replicaSpecs": specs,
                }
            ),
        }
        return {"ascendjob-service.yaml": self.service(about, pod.name), "ascendjob.yaml": job}

    def service(self, about: Manifest, name: str) -> Manifest:
        """Gives the master a name, from the moment on when its pod has an address."""
        spec = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {JOB_LABEL: name}}
        return {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": spec}

    def each_for_itself(self, objects: dict[str, Manifest], left_seconds: int) -> None:
        """See `KubernetesLauncher.each_for_itself`."""
        _, job = objects.values()
        job["spec"]["runPolicy"] |= {"cleanPodPolicy": "None", "ttlSecondsAfterFinished": left_seconds}

    def word(self, job: Manifest, pods: Sequence[Manifest]) -> tuple[Word, str]:
        """See `KubernetesLauncher.word`."""
        return by_conditions(job)

    def node_of(self, pod: Manifest) -> int | None:
        """See `KubernetesLauncher.node_of`."""
        return replica_number(pod)
