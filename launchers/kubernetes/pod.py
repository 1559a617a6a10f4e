"""The pod of one machine, as plain values: the same for every kind of job, which adds the names that it asks for.

Nothing of the user's goes through a shell. What stands in a command is escaped, since Kubernetes replaces ``$(NAME)``
there. Variables of the run are in job.json and not in the manifest; of secrets it says where the cluster keeps them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.schema.launch import ClusterConfig
from configs.schema.launcher_kubernetes import TOLERATION, KubernetesLauncherConfig
from launchers.base import with_setup
from launchers.job import Job, JobFolder
from launchers.kubernetes import Manifest
from launchers.kubernetes.entry import NODE_FROM, RESTARTS, RETRY_CODE
from launchers.spec import MASTER, LaunchSpec

JOB_LABEL = "crosstune/job"
"""On every pod: the name of its job."""
RUN = "crosstune/run"
"""Annotation of a job: the run's folder, by which one that a lost answer left behind is known as ours."""
NAME_LENGTH = 48
"""Of a job. A pod's host name, which ends at 63 characters, is the job's with up to ``-worker-9999`` behind it."""
GRACE_MARGIN_SECONDS = 60
"""Between the time that ranks have to save and the time when Kubernetes kills them."""


def object_name(spec: LaunchSpec, attempt: int) -> str:
    """What Kubernetes calls a job: a job that is resumed has another name, as its former object may still be there."""
    name = f"{spec.name}-{attempt}" if attempt else spec.name
    if len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: NAME_LENGTH - 9].rstrip('-')}-{digest}"


def name_of(job: Job) -> str:
    """What the cluster calls a job, also one of which it is not known whether it was made."""
    return str(job.handle.get("name") or object_name(job.spec, job.attempt))


def is_of(found: Manifest, job: Job) -> bool:
    """Whether an object of a job's name is the job's: by the uid or, where no answer told it, by the run's folder."""
    about = found["metadata"]
    if uid := job.handle.get("uid"):
        return bool(about["uid"] == uid)
    return bool((about.get("annotations") or {}).get(RUN) == job.spec.run_dir)


def literal(text: str) -> str:
    """A text in a command or a variable's value, as it reaches the container unchanged.

    Source: "Define a Command and Arguments for a Container", kubernetes.io: ``$$`` stands for ``$``.
    """
    return text.replace("$", "$$")


def metadata(name: str, spec: LaunchSpec, cfg: KubernetesLauncherConfig, cluster: ClusterConfig) -> Manifest:
    """Of the job object."""
    found: Manifest = {"name": name}
    if cfg.namespace:
        found["namespace"] = cfg.namespace
    found["labels"] = {**cluster.labels, **cfg.labels, JOB_LABEL: name}
    found["annotations"] = {**cfg.annotations, RUN: spec.run_dir}
    return found


class PodTemplate:
    """Builds the template of a job's pods.

    Args:
        spec: the job.
        cfg: settings of the launcher.
        cluster: what the machines have.
        name: of the job object.
        command: that each runs; None: its part of the run.
    """

    def __init__(
        self,
        spec: LaunchSpec,
        cfg: KubernetesLauncherConfig,
        cluster: ClusterConfig,
        name: str,
        command: Sequence[str] | None = None,
    ) -> None:
        self.spec, self.cfg, self.cluster, self.name = spec, cfg, cluster, name
        self.command = self.part_of_run() if command is None else command

    def render(
        self,
        *,
        container: str,
        node_from: str,
        master: str,
        restarts_from: str | None = None,
        retry_code: int = 0,
        port_name: str | None = None,
        restart_policy: str | None = "Never",
    ) -> Manifest:
        """The template.

        Args:
            container: name that the kind of job asks for.
            node_from: variable in which its controller tells a pod its number.
            master: name of pod 0 on the job's network.
            restarts_from: field of the pod that counts the job's restarts; None: there is none.
            retry_code: exit code by which the controller is told to start the pod again; 0: its own rules tell it.
            port_name: of the rendezvous' port; None: it needs no declaration.
            restart_policy: of the pods; None: the kind of job sets it.
        """
        cfg, spec = self.cfg, self.spec
        variables = [_variable(NODE_FROM, node_from), _variable(MASTER, master if spec.nodes > 1 else "127.0.0.1")]
        if restarts_from:
            variables.append(_field(RESTARTS, restarts_from))
        if retry_code:
            variables.append(_variable(RETRY_CODE, str(retry_code)))
        body: Manifest = {
            "name": container,
            "image": cfg.image,
            "imagePullPolicy": cfg.image_pull_policy,
            "command": [literal(word) for word in self.command],
            "env": [*variables, *self.fields(), *self.secrets()],
            "ports": [{"name": port_name, "containerPort": spec.port(0)}] if port_name else None,
            "resources": self.resources(),
            "securityContext": self.security(),
            "volumeMounts": self.mounts(),
        }
        pod: Manifest = {
            "restartPolicy": restart_policy,
            "schedulerName": cfg.scheduler,
            "priorityClassName": cfg.priority_class,
            "serviceAccountName": cfg.service_account,
            "imagePullSecrets": [{"name": each} for each in cfg.pull_secrets],
            "terminationGracePeriodSeconds": spec.grace_seconds + GRACE_MARGIN_SECONDS,
            "activeDeadlineSeconds": spec.time_limit_minutes * 60 or None,
            "hostNetwork": cfg.host_network or None,
            "dnsPolicy": "ClusterFirstWithHostNet" if cfg.host_network else None,
            "nodeSelector": self.cluster.node_selector,
            "tolerations": [toleration(text) for text in cfg.tolerations],
            "affinity": self.affinity(),
            "containers": [said(body)],
            "volumes": self.volumes(),
        }
        labels = {**self.cluster.labels, **cfg.labels, JOB_LABEL: self.name}
        return {"metadata": said({"labels": labels, "annotations": cfg.annotations}), "spec": said(pod)}

    def part_of_run(self) -> list[str]:
        """What a machine of a run runs."""
        job_file = str(JobFolder.of_run(Path(self.spec.run_dir)).file)
        return with_setup(
            [self.spec.python or "python3", "-P", "-m", "launchers.kubernetes.entry", job_file], self.spec.setup
        )

    def fields(self) -> list[Manifest]:
        """Variables that tell a pod of itself."""
        fields = dict(self.cluster.pod_fields)
        if self.cfg.scheduler_assigns_devices:
            fields |= self.cluster.assigned_fields
        return [_field(name, path) for name, path in sorted(fields.items())]

    def secrets(self) -> list[Manifest]:
        """Variables whose values only the cluster knows."""
        found = []
        for name in self.spec.secrets:
            secret, _, key = self.cfg.secret_refs[name].partition("/")
            found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
        return found

    def resources(self) -> Manifest | None:
        """Of a machine. Devices and memory have one bound for both; more CPU than asked for may be used."""
        spec = self.spec
        limits: Manifest = {}
        if spec.memory_gib:
            limits["memory"] = f"{spec.memory_gib}Gi"
        if spec.devices and self.cluster.resource:
            limits[self.cluster.resource] = str(spec.devices)
        requests = {"cpu": str(spec.cpus), **limits} if spec.cpus else dict(limits)
        return said({"limits": limits, "requests": requests}) or None

    def security(self) -> Manifest | None:
        """Of the container."""
        context: Manifest = {"runAsUser": self.cfg.run_as_user}
        if self.cfg.capabilities:
            context["capabilities"] = {"add": list(self.cfg.capabilities)}
        return said(context) or None

    def mounts(self) -> list[Manifest]:
        """The shared folders, and /dev/shm, which is 64 MiB in a container otherwise."""
        mounts: list[Manifest] = []
        for path, claim in sorted(self.cfg.claims.items()):
            name, _, folder = claim.strip("/").partition("/")
            mount: Manifest = {"name": _volume(name), "mountPath": path}
            mounts.append({**mount, "subPath": folder} if folder else mount)
        return [*mounts, {"name": "shm", "mountPath": "/dev/shm"}]

    def volumes(self) -> list[Manifest]:
        """What `mounts` names."""
        claims = sorted({claim.strip("/").partition("/")[0] for claim in self.cfg.claims.values()})
        memory: Manifest = {"medium": "Memory"}
        if self.cfg.shm_gib:
            memory["sizeLimit"] = f"{self.cfg.shm_gib}Gi"
        shared = [{"name": _volume(name), "persistentVolumeClaim": {"claimName": name}} for name in claims]
        return [*shared, {"name": "shm", "emptyDir": memory}]

    def affinity(self) -> Manifest | None:
        """Each pod on a machine of its own."""
        if not self.cfg.own_machine or self.spec.nodes == 1:
            return None
        term = {"labelSelector": {"matchLabels": {JOB_LABEL: self.name}}, "topologyKey": "kubernetes.io/hostname"}
        return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def said(manifest: Mapping[str, Any]) -> Manifest:
    """A manifest without what was left open."""
    return {key: value for key, value in manifest.items() if value is not None and value != [] and value != {}}


def toleration(text: str) -> Manifest:
    """Of a taint as kubectl writes it."""
    match = TOLERATION.fullmatch(text)
    assert match is not None  # the config has looked
    value = match["value"]
    operator = {"operator": "Exists"} if value is None else {"operator": "Equal", "value": value}
    return said({"key": match["key"], **operator, "effect": match["effect"]})


def _volume(claim: str) -> str:
    """Name of a claim's volume: claims may have dots and be long, volumes not."""
    if len(claim) <= 50 and "." not in claim:
        return f"claim-{claim}"
    return f"claim-{hashlib.sha256(claim.encode()).hexdigest()[:12]}"


def _variable(name: str, value: str) -> Manifest:
    return {"name": name, "value": literal(value)}


def _field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
