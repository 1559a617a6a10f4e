"""The options of the launcher group that hand a job to Kubernetes: one per kind of job object."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from omegaconf import MISSING

from configs.errors import ConfigError, not_empty
from configs.schema.launch import VARIABLE, LauncherConfig

EFFECTS = "NoSchedule|PreferNoSchedule|NoExecute"
TOLERATION = re.compile(rf"(?P<key>[^=:\s]+)(=(?P<value>[^=:\s]*))?(:(?P<effect>{EFFECTS}))?")
REFERENCE = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[A-Za-z0-9._-]+")
PULL_POLICIES = ("Always", "IfNotPresent", "Never")


@dataclass
class KubernetesLauncherConfig(LauncherConfig):
    """What the kinds of job have in common."""

    image: str = MISSING
    """The container's image; it has crosstune installed."""
    image_pull_policy: str | None = None
    """Always, IfNotPresent or Never. Null: the cluster's default for the image's tag."""
    pull_secrets: list[str] = field(default_factory=list)
    """Names of the secrets with which the image is fetched."""
    kubeconfig: str | None = None
    """Null: $KUBECONFIG, else ~/.kube/config, else the service account of the pod that this command runs in."""
    context: str | None = None
    """Of the kubeconfig; null: its current one."""
    namespace: str | None = None
    """Null: that of the context, else ``default``."""
    claims: dict[str, str] = field(default_factory=dict)
    """Shared folders: path -> persistent volume claim, or claim/folder in it. All machines of the job, and the one that
    launches, have them under the same path; the run's folder lies below one."""
    secret_refs: dict[str, str] = field(default_factory=dict)
    """For each name in `secrets`: where the cluster keeps its value, as secret/key."""
    scheduler: str | None = "volcano"
    """Starts all machines of a job or none. Null: the cluster's default, which starts them one by one."""
    queue: str | None = None
    priority_class: str | None = None
    service_account: str | None = None
    tolerations: list[str] = field(default_factory=list)
    """Taints of nodes that the job puts up with, as kubectl writes them: key=value:NoSchedule, key:NoExecute, key."""
    labels: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods, over the cluster's."""
    annotations: dict[str, str] = field(default_factory=dict)
    """Of the job and its pods."""
    shm_gib: int = 0
    """Bound of /dev/shm, which counts as memory of the pod. 0: as much as the pod may have."""
    own_machine: bool = True
    """No two pods of the job on one machine."""
    scheduler_assigns_devices: bool = False
    """The site's scheduler writes the devices of a pod into an annotation: see `cluster.assigned_fields`."""
    host_network: bool = False
    """The pods have the machine's network, as some fabrics ask for."""
    capabilities: list[str] = field(default_factory=list)
    """Linux capabilities of the container, such as IPC_LOCK for RDMA."""
    run_as_user: int | None = None
    """Numeric user of the container; null: the image's."""
    patience_seconds: int = 60
    """So long is an API server that cannot be reached asked again."""

    def __post_init__(self) -> None:
        for key in ("image", "kubeconfig", "context", "namespace", "scheduler", "queue"):
            not_empty(f"launcher.{key}", getattr(self, key))
        if self.image_pull_policy not in (None, *PULL_POLICIES):
            allowed = ", ".join(PULL_POLICIES)
            raise ConfigError("launcher.image_pull_policy", f"'{self.image_pull_policy}'", allowed=allowed)
        for path, claim in self.claims.items():
            if not path.startswith("/") or ".." in PurePosixPath(path).parts or ":" in path:
                raise ConfigError("launcher.claims", f"'{path}'", allowed="an absolute path without '..' or ':'")
            if not claim.strip("/"):
                raise ConfigError(f"launcher.claims.{path}", "empty", allowed="a claim, or claim/folder in it")
        for name, reference in self.secret_refs.items():
            key = f"launcher.secret_refs.{name}"
            if not VARIABLE.fullmatch(name):
                raise ConfigError(key, "not a name of a variable", allowed="letters, digits and _, not a digit first")
            if not REFERENCE.fullmatch(reference):
                # The value is not told: somebody may have put the secret itself there.
                raise ConfigError(key, "not a reference", allowed="SECRET/KEY: a secret of the namespace, a key in it")
        for text in self.tolerations:
            if not TOLERATION.fullmatch(text):
                raise ConfigError("launcher.tolerations", f"'{text}'", allowed="key=value:Effect, key:Effect or key")
        for name in ("shm_gib", "patience_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"launcher.{name}", str(getattr(self, name)), allowed="0 or more")

    def keeps_secret(self, name: str) -> bool:
        """See `LauncherConfig.keeps_secret`."""
        return name in self.secret_refs


@dataclass
class VolcanoLauncherConfig(KubernetesLauncherConfig):
    """A Volcano Job (batch.volcano.sh/v1alpha1)."""

    scheduler: str | None = "volcano"


@dataclass
class TrainJobLauncherConfig(KubernetesLauncherConfig):
    """A TrainJob of the Kubeflow Trainer (trainer.kubeflow.org/v1alpha1), with a runtime of its own."""


@dataclass
class PyTorchJobLauncherConfig(KubernetesLauncherConfig):
    """A PyTorchJob of the Kubeflow Training Operator (kubeflow.org/v1)."""


@dataclass
class AscendJobLauncherConfig(KubernetesLauncherConfig):
    """An AscendJob of MindCluster (mindxdl.gitee.com/v1)."""
