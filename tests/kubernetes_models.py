"""Typed models of the manifests that are rendered: an unknown field, or one of a wrong type, is refused.

Pods and services: the official client's models. TrainJob, TrainingRuntime: those of kubeflow-trainer-api. Both drop
unknown fields silently, so what a model gives back must be what it got. The other kinds have models here, with the
fields of their definitions:

    Volcano Job   volcano-sh/volcano ed72c7c8, config/crd/volcano/bases/batch.volcano.sh_jobs.yaml
                  and its webhook, pkg/webhooks/admission/jobs/validate
    PyTorchJob    kubeflow/training-operator 186ac6c6, pkg/apis/kubeflow.org/v1/{pytorch,common}_types.go
    AscendJob     mind-cluster c7632a1a, component/ascend-operator/pkg/api/v1/ascendjob_types.go
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import kubeflow_trainer_api.models as kubeflow
from kubernetes import client
from pydantic import AfterValidator, BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr, model_validator


def same(made: Any, manifest: Any, where: str) -> None:
    """Refuses what a model did not take over."""
    if made != manifest:
        raise ValueError(f"{where}: unknown or changed: {difference(made, manifest)}")


def difference(made: Any, manifest: Any, path: str = "") -> str:
    if isinstance(made, dict) and isinstance(manifest, dict):
        for key in sorted({*made, *manifest}):
            if made.get(key) != manifest.get(key):
                return difference(made.get(key), manifest.get(key), f"{path}.{key}")
    if isinstance(made, list) and isinstance(manifest, list) and len(made) == len(manifest):
        for number, (one, other) in enumerate(zip(made, manifest, strict=True)):
            if one != other:
                return difference(one, other, f"{path}[{number}]")
    return f"{path}: {made!r} for {manifest!r}"


def official(model: Any, manifest: dict[str, Any], where: str) -> None:
    same(client.ApiClient().sanitize_for_serialization(model.from_dict(manifest)), manifest, where)


def is_template(manifest: dict[str, Any]) -> dict[str, Any]:
    official(client.V1PodTemplateSpec, manifest, "template")
    return manifest


def is_meta(manifest: dict[str, Any]) -> dict[str, Any]:
    official(client.V1ObjectMeta, manifest, "metadata")
    return manifest


Template = Annotated[dict[str, Any], AfterValidator(is_template)]
Meta = Annotated[dict[str, Any], AfterValidator(is_meta)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Event = Literal["*", "PodFailed", "PodEvicted", "PodPending", "Unknown", "TaskCompleted", "TaskFailed"]
Action = Literal["AbortJob", "RestartJob", "RestartTask", "RestartPod", "TerminateJob", "CompleteJob", "ResumeJob"]


class VolcanoPolicy(Strict):
    action: Action
    event: Event | None = None
    events: list[Event] | None = None
    exitCode: StrictInt | None = None
    timeout: StrictStr | None = None

    @model_validator(mode="after")
    def one_cause(self) -> VolcanoPolicy:
        if (self.exitCode is not None) == bool(self.event or self.events) or self.exitCode == 0:
            raise ValueError("either event and exitCode should be specified")
        return self


class VolcanoTask(Strict):
    name: StrictStr
    replicas: StrictInt
    minAvailable: StrictInt | None = None
    maxRetry: StrictInt | None = None
    policies: list[VolcanoPolicy] | None = None
    template: Template


class VolcanoSpec(Strict):
    schedulerName: StrictStr | None = None
    queue: StrictStr | None = None
    priorityClassName: StrictStr | None = None
    minAvailable: StrictInt
    minSuccess: StrictInt | None = None
    maxRetry: StrictInt
    ttlSecondsAfterFinished: StrictInt | None = None
    plugins: dict[str, list[str]]
    policies: list[VolcanoPolicy]
    tasks: list[VolcanoTask]


class VolcanoJob(Strict):
    apiVersion: Literal["batch.volcano.sh/v1alpha1"]
    kind: Literal["Job"]
    metadata: Meta
    spec: VolcanoSpec


class SchedulingPolicy(Strict):
    minAvailable: StrictInt | None = None
    queue: StrictStr | None = None
    priorityClass: StrictStr | None = None
    minResources: dict[str, str] | None = None
    scheduleTimeoutSeconds: StrictInt | None = None


class RunPolicy(Strict):
    cleanPodPolicy: Literal["All", "Running", "None"] | None = None
    backoffLimit: StrictInt | None = None
    activeDeadlineSeconds: StrictInt | None = None
    ttlSecondsAfterFinished: StrictInt | None = None
    suspend: StrictBool | None = None
    schedulingPolicy: SchedulingPolicy | None = None


class ReplicaSpec(Strict):
    replicas: StrictInt
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: Template


class Replicas(Strict):
    Master: ReplicaSpec
    Worker: ReplicaSpec | None = None


class PyTorchSpec(Strict):
    runPolicy: RunPolicy
    pytorchReplicaSpecs: Replicas
    nprocPerNode: StrictStr | None = None


class PyTorchJob(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Meta
    spec: PyTorchSpec


class AscendSpec(Strict):
    schedulerName: StrictStr | None = None
    successPolicy: Literal["", "AllWorkers"]
    runPolicy: RunPolicy
    replicaSpecs: Replicas


class AscendJob(Strict):
    apiVersion: Literal["mindxdl.gitee.com/v1"]
    kind: Literal["AscendJob"]
    metadata: Meta
    spec: AscendSpec


OWN = {"Job": VolcanoJob, "PyTorchJob": PyTorchJob, "AscendJob": AscendJob}
KUBEFLOW = {
    "TrainJob": kubeflow.TrainerV1alpha1TrainJob,
    "TrainingRuntime": kubeflow.TrainerV1alpha1TrainingRuntime,
}


def check(manifest: dict[str, Any]) -> None:
    """Refuses a manifest that is not of its kind.

    Raises:
        ValueError: with the place.
    """
    kind = manifest["kind"]
    if kind in OWN:
        OWN[kind].model_validate(manifest)
    elif kind in KUBEFLOW:
        made = KUBEFLOW[kind].from_dict(manifest)
        same(made.to_dict(), manifest, kind)
        for job in manifest["spec"].get("template", {}).get("spec", {}).get("replicatedJobs", []):
            is_template(job["template"]["spec"]["template"])
    else:
        official(getattr(client, f"V1{kind}"), manifest, kind)
