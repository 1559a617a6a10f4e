"""Asks the machines of a cluster before a run: a short job of its own whose pods look, each at its machine.

It is a job of the launcher's own kind with the launcher's own pod template. So its pods get what a run's would: image,
devices, selectors, mounts, shared memory, account, secrets; and the same controller, queue and quota decide about them.
Reports come by the pods' logs. Whatever happens, the job is deleted. Where this process is killed, the pods end by
themselves, and the cluster deletes the job later if its kind can say so.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import ConfigError, CrosstuneError, raise_all
from configs.schema.doctor_nodes import DoctorNodesConfig
from launchers.doctor.nodes.request import Request
from launchers.kubernetes import Manifest
from launchers.kubernetes.api import PODS, Api
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.hear import Hearing
from launchers.kubernetes.look import MACHINE
from launchers.kubernetes.pod import JOB_LABEL, PodTemplate
from launchers.kubernetes.signals import EndsBySignal
from launchers.spec import LaunchSpec

if TYPE_CHECKING:
    from launchers.doctor.nodes.converse import Heard

PROGRAM = ("-P", "-m", "launchers.kubernetes.look")
"""What Python runs in a pod, with the request as its argument."""
NAME = "crosstune-doctor"
LEFT_SECONDS = 600
"""After its end, of a job that nobody deleted."""
GONE_SECONDS = 30.0
"""For the pods to go: a run that is started next would miss the devices that are still theirs."""
LOOK_SECONDS = 0.3


class InPods:
    """Asks through pods: see the module, and `launchers.doctor.nodes.carry.AsksNodes`.

    Args:
        cfg: what is meant to run.
        launcher: of the run.
        command: that a pod runs, but for its last argument, the request.

    Raises:
        CrosstuneError: the pods could not have what is meant.
    """

    def __init__(self, cfg: DoctorNodesConfig, launcher: KubernetesLauncher, command: Sequence[str]) -> None:
        self.cfg, self.launcher, self.command = cfg, launcher, command
        self.name, self.made = f"{NAME}-{secrets.token_hex(5)}", False
        raise_all(list(launcher.faults(self.spec(0))))

    def node_names(self, nodes: int) -> Sequence[str]:
        """Only the scheduler knows the machines; pods find the first one by a name of the job's network."""
        return ()

    node_addresses = node_names

    def spec(self, seconds: float) -> LaunchSpec:
        """A job like a run's, as far as its pods have to do with it; it is not started again.

        Args:
            seconds: after which the cluster ends the pods.
        """
        cfg, cluster = self.cfg, self.launcher.cluster
        return LaunchSpec(
            name=self.name,
            command="doctor",
            request="",
            run_dir="" if cfg.run_dir is None else os.path.abspath(Path(cfg.run_dir).expanduser()),
            working_dir="",
            nodes=cfg.nodes,
            nproc=cfg.nproc,
            threads=0,
            environment={},
            # Whichever of them a run takes: one that is not there keeps its pods from starting.
            secrets=tuple(sorted(self.launcher.cfg.secret_refs)),
            setup=(),
            python=cfg.python,
            interface=cluster.interface,
            master_port=cfg.master_port,
            cpus=cfg.cpus,
            memory_gib=cfg.memory_gib,
            devices=(cluster.devices_per_node or cfg.nproc) if cluster.resource else 0,
            time_limit_minutes=int(seconds / 60) + 1,
            restarts=0,
            grace_seconds=0,
        )

    def manifests(self, request: Request) -> list[Manifest]:
        """The objects that are made, the job last."""
        launcher, spec = self.launcher, self.spec(self.cfg.queue_seconds + request.total_seconds)
        fields = {**launcher.cluster.pod_fields, MACHINE: "spec.nodeName"}
        cluster = replace(launcher.cluster, pod_fields=fields)
        pod = PodTemplate(spec, launcher.cfg, cluster, self.name, [*self.command, request.to_json()])
        objects = launcher.objects(spec, pod)
        launcher.each_for_itself(objects, LEFT_SECONDS)
        return list(objects.values())

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """See `AsksNodes`; `seconds` are those of a pod that waits for nobody.

        Pods wait for each other as long as a scheduler may take: images are fetched at different speeds.
        """
        patience = max(requests[0].patience_seconds, float(self.cfg.queue_seconds))
        request = replace(requests[0], patience_seconds=patience)
        api, heard = self.launcher.api, set[int]()
        refusal: CrosstuneError | None = None
        with EndsBySignal() as signals:
            self.say(f"asks in namespace {api.namespace}; it has {self.cfg.queue_seconds} s to start")
            try:
                try:
                    self.make(request)
                    limits = self.cfg.queue_seconds, request.total_seconds
                    for node, answer in Hearing(self.launcher, api, self.name, self.cfg.nodes, *limits).answers():
                        heard.add(node)
                        yield node, answer
                finally:
                    signals.clearing()
            except CrosstuneError as error:
                refusal = CrosstuneError("Kubernetes", f"{error.where}: {error.found}", remedy=error.remedy)
            finally:
                if self.made:
                    self.clear(api)
        if refusal is not None:
            yield from ((each.node, refusal) for each in requests if each.node not in heard)

    def make(self, request: Request) -> None:
        """Makes the job.

        Raises:
            CrosstuneError: see `KubernetesLauncher.make`.
        """
        self.made = True  # for all that is known: an answer may be lost, or a signal come before it
        try:
            self.launcher.make(self.manifests(request))
        except ConfigError:
            self.made = False  # it was refused
            raise

    def clear(self, api: Api) -> None:
        """Deletes what was made and waits until it has gone; says what may be left."""
        try:
            for kind in (self.launcher.resource, *self.launcher.others.values()):
                api.delete(kind, self.name)
            last = time.monotonic() + GONE_SECONDS
            while self.is_there(api):
                if time.monotonic() > last:
                    return self.say("its pods take their time to go; it has been deleted")
                time.sleep(LOOK_SECONDS)
        except CrosstuneError as error:
            self.say(f"could not be deleted: {error.found}; {self.launcher.by_hand(self.name)}")
        except BaseException:
            self.say(f"may be left: {self.launcher.by_hand(self.name)}")
            raise

    def is_there(self, api: Api) -> bool:
        """Whether the server knows the job, or a pod of it."""
        pods, _ = api.select(PODS, labelSelector=f"{JOB_LABEL}={self.name}")
        return bool(pods or api.get(self.launcher.resource, self.name))

    def say(self, text: str) -> None:
        """A line for the user, beside the report."""
        print(f"{self.launcher.resource.kind} {self.name}: {text}", file=sys.stderr, flush=True)
