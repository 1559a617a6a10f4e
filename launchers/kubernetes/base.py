"""What the kinds of job have in common: how a job is submitted, asked after, read and ended."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

import yaml

from configs.errors import ConfigError, CrosstuneError
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_kubernetes import KubernetesLauncherConfig
from launchers.base import Launcher, UnknownOutcomeError, tail
from launchers.job import Job, JobFolder, Report, Word
from launchers.kubernetes import Manifest
from launchers.kubernetes import pods as told
from launchers.kubernetes.api import EVENTS, PODS, Api, Resource
from launchers.kubernetes.connection import LostError
from launchers.kubernetes.lines import lines_of
from launchers.kubernetes.pod import JOB_LABEL, PodTemplate, is_of, name_of, object_name
from launchers.spec import LaunchSpec

NEXT_POD_SECONDS = 3.0
"""So long is a pod's successor watched for before the job is asked whether there will be one."""


class _Plain(yaml.SafeDumper):
    """Writes what is used twice twice: two pods' templates are read one by one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class KubernetesLauncher(Launcher):
    """A job object and its pods, one per machine.

    Args:
        cfg: settings.
        cluster: what the machines have.
    """

    resource: Resource
    """Of the job object, which `objects` gives last."""
    others: dict[str, Resource] = {}
    """Kinds of the objects that it needs beside, by name of kind."""
    container: str
    """Its name in the pods."""

    def __init__(self, cfg: KubernetesLauncherConfig, cluster: ClusterConfig) -> None:
        super().__init__(cfg, cluster)
        self.cfg: KubernetesLauncherConfig = cfg

    @abstractmethod
    def objects(self, spec: LaunchSpec, pod: PodTemplate) -> dict[str, Manifest]:
        """The objects by file name, in the order in which they are made.

        Args:
            spec: the job.
            pod: builds the template of its pods, and knows the job's name.
        """

    @abstractmethod
    def word(self, job: Manifest, pods: Sequence[Manifest]) -> tuple[Word, str]:
        """What a job object says of itself: `Word.failed` where its controller gave it up, whyever."""

    @abstractmethod
    def node_of(self, pod: Manifest) -> int | None:
        """The number of a pod."""

    @abstractmethod
    def each_for_itself(self, objects: dict[str, Manifest], left_seconds: int) -> None:
        """Changes what `objects` gave so that a pod that ends, however, ends no other one, and none starts again.

        Args:
            objects: by file name.
            left_seconds: so long after its end the cluster itself deletes the job, where its kind can say so.
        """

    def faults(self, spec: LaunchSpec) -> Iterator[CrosstuneError]:
        """Folders that the pods do not have, secrets that the cluster does not know, bounds that cannot hold."""
        paths = {"run_dir": spec.run_dir, "the request": spec.request, "the working folder": spec.working_dir}
        for what, path in paths.items():
            if path and not any(PurePosixPath(path).is_relative_to(mount) for mount in self.cfg.claims):
                mounts = ", ".join(sorted(self.cfg.claims)) or "there is none"
                remedy = "launcher.claims={/shared: CLAIM}, and launch from below it with run_dir below it"
                found = f"'{path}' is in no shared folder of the pods"
                yield ConfigError(what, found, allowed=f"below launcher.claims: {mounts}", remedy=remedy)
        for name in spec.secrets:
            if name not in self.cfg.secret_refs:
                remedy = f"launcher.secret_refs.{name}=SECRET/KEY, made by kubectl create secret generic SECRET ..."
                yield ConfigError("secrets", f"{name}: the cluster is not told where its value is", remedy=remedy)
        if 0 < spec.memory_gib <= self.cfg.shm_gib:
            found = f"{self.cfg.shm_gib}, but memory_gib={spec.memory_gib}, and /dev/shm counts as memory"
            yield ConfigError("launcher.shm_gib", found)

    def render(self, spec: LaunchSpec, attempt: int) -> dict[str, str]:
        """See `Launcher.render`: one manifest per file."""
        pod = PodTemplate(spec, self.cfg, self.cluster, object_name(spec, attempt))
        objects = self.objects(spec, pod)
        return {name: yaml.dump(each, Dumper=_Plain, sort_keys=False, width=120) for name, each in objects.items()}

    def submit(self, job: Job, folder: JobFolder) -> dict[str, Any]:
        """See `Launcher.submit`. What is in the files is made: they may have been looked over."""
        names = self.render(job.spec, job.attempt)
        return self.make([yaml.safe_load((folder.path / name).read_text(encoding="utf-8")) for name in names])

    def make(self, manifests: Sequence[Manifest]) -> dict[str, Any]:
        """Has each object checked by the server, then made; the job is the last, and owns the others.

        Returns:
            What the job is called, and its uid: `Job.handle`.

        Raises:
            CrosstuneError: one was refused, and none is left.
            LostError: the server does not answer, and none was made.
            UnknownOutcomeError: there may be some: it did not answer, or refused one and kept another.
        """
        made: list[tuple[Resource, str, str]] = []
        asked = False
        try:
            for manifest in manifests:
                kind = self.others.get(manifest["kind"], self.resource)
                self._try(kind, manifest)
                asked = True
                created = self.api.create(kind, manifest)["metadata"]
                made.append((kind, created["name"], created["uid"]))
            _, name, uid = made[-1]
            for kind, each, _ in made[:-1]:
                self.api.patch(kind, each, {"metadata": {"ownerReferences": [self._as_owner(name, uid)]}})
        except LostError as error:
            if not asked:
                raise
            remedy = f"{error.remedy}; what may be there: {self.by_hand(manifests[-1]['metadata']['name'])}"
            raise UnknownOutcomeError(error.where, error.found, remedy=remedy) from None
        except CrosstuneError as error:
            if self._unmade(made):
                raise
            found = f"{error.found}; what had been made by then could not be deleted"
            remedy = self.by_hand(manifests[-1]["metadata"]["name"])
            raise UnknownOutcomeError(error.where, found, remedy=remedy) from None
        return {"kind": self.resource.kind, "namespace": self.api.namespace, "name": name, "uid": uid}

    def _unmade(self, made: Sequence[tuple[Resource, str, str]]) -> bool:
        """Deletes objects; False: one may be left. What was refused before is told, not this."""
        gone = True
        for kind, name, uid in reversed(made):
            try:
                self.api.delete(kind, name, uid=uid)
            except CrosstuneError:
                gone = False
        return gone

    def by_hand(self, name: str) -> str:
        """The command that deletes a job."""
        kinds = ",".join(f"{each.plural}.{each.group}".rstrip(".") for each in (self.resource, *self.others.values()))
        return f"kubectl -n {self.api.namespace} delete {kinds} {name}"

    def _try(self, kind: Resource, manifest: Manifest) -> None:
        try:
            self.api.create(kind, manifest, dry_run=True)
        except ConfigError as error:
            if "does not support dry run" not in error.found:  # a webhook of the cluster: it will look in earnest
                raise

    def _as_owner(self, name: str, uid: str) -> Manifest:
        """What deletes the objects beside a job together with it."""
        return {
            "apiVersion": f"{self.resource.group}/{self.resource.version}",
            "kind": self.resource.kind,
            "name": name,
            "uid": uid,
        }

    @cached_property
    def api(self) -> Api:
        """Of the cluster, in the namespace of the config."""
        return Api(self.cfg)

    def of_job(self, job: Job) -> Api:
        """The same, in the namespace in which a job was submitted: the context may name another one by now."""
        namespace = job.handle.get("namespace")
        return self.api if namespace in (None, self.api.namespace) else Api(self.cfg, namespace)

    def found(self, api: Api, job: Job) -> Manifest | None:
        """The object of a job; None: it is gone, or was never made. Another run's of the same name is not taken for it.

        Raises:
            CrosstuneError: the server cannot be asked.
        """
        there = api.get(self.resource, name_of(job))
        return there if there is not None and is_of(there, job) else None

    def report(self, job: Job, folder: JobFolder) -> Report:
        """See `Launcher.report`: the job's own conditions, with what its pods complain of."""
        api, name = self.of_job(job), name_of(job)
        found = self.found(api, job)
        if found is None:
            where = f"in namespace {api.namespace}"
            return Report(Word.unknown, f"there is no {self.resource.kind} {name} of this run {where}")
        pods, _ = api.select(PODS, labelSelector=f"{JOB_LABEL}={name}")
        word, detail = self.word(found, pods)
        troubles = told.all_troubles([(self.node_of(pod), pod) for pod in pods])
        if found["metadata"].get("deletionTimestamp"):
            word, detail = Word.running, "it is being ended"
        elif word is Word.pending and not pods:
            troubles = self.why_no_pods(api, found)
        elif word is Word.failed and any(mark.exit_code is not None for mark in folder.marks(since=job.attempt)):
            word = Word.ended  # the run itself tells how: what its controller made of it says nothing more
        return Report(word, "; ".join(part for part in (detail, troubles) if part))

    def why_no_pods(self, api: Api, job: Manifest) -> str:
        """The last complaint about a job that has no pods yet, or about its pod group.

        The group bears the job's name, or in Volcano since 1.5 its uid behind it (pkg/controllers/job:
        generateRelatedPodGroupName).
        """
        name = job["metadata"]["name"]
        return self.complaint(api, name, f"{name}-{job['metadata']['uid']}")

    def complaint(self, api: Api, *names: str) -> str:
        """The last event that tells what is wrong with objects; empty: none does, or they may not be read.

        That a queue or the cluster is full is for Volcano nothing to warn of (pkg/scheduler/plugins:
        RecordPodGroupEvent).
        """
        found: list[Manifest] = []
        with suppress(ConfigError):  # not everybody may read events
            for name in names:
                found += api.select(EVENTS, fieldSelector=f"involvedObject.name={name}")[0]
        wrong = [each for each in found if each.get("type") == "Warning" or each.get("reason") == told.UNSCHEDULABLE]
        last = max(wrong, key=lambda event: str(event.get("lastTimestamp") or ""), default=None)
        return "" if last is None else f"{last.get('reason', '')}: {last.get('message', '')}"

    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        """See `Launcher.cancel`: the job is deleted, its pods get their time to save, or none.

        It returns where there is no such job any more as well.

        Raises:
            LostError: no answer: it is not known whether the job has been deleted.
            CrosstuneError: the server refused, or cannot be asked at all: the job is there.
        """
        api, name = self.of_job(job), name_of(job)
        found = self.found(api, job)
        if found is None:
            return
        api.delete(self.resource, name, uid=found["metadata"]["uid"], at_once=hard)
        if hard:
            for pod in api.select(PODS, labelSelector=f"{JOB_LABEL}={name}")[0]:
                api.delete(PODS, pod["metadata"]["name"], at_once=True)

    def log(self, job: Job, folder: JobFolder, node: int, *, follow: bool) -> Iterator[str]:
        """See `Launcher.log`: what the node's pod printed, and its successors'; else the run's own file."""
        read = False
        try:
            for line in self._pod_lines(self.of_job(job), job, folder, node, follow):
                read = True
                yield line
        except (LostError, ConfigError):
            if read or not self._own_file(job, folder, node).is_file():
                raise
        if not read:
            yield from tail(self._own_file(job, folder, node), lambda: False)

    def _own_file(self, job: Job, folder: JobFolder, node: int) -> Any:
        marks = folder.marks(since=job.attempt)
        return folder.output(marks[0].attempt if marks else job.attempt, node)

    def _pod_lines(self, api: Api, job: Job, folder: JobFolder, node: int, follow: bool) -> Iterator[str]:
        label, done = f"{JOB_LABEL}={name_of(job)}", set[str]()

        def fresh(pods: list[Manifest]) -> list[Manifest]:
            mine = [pod for pod in pods if self.node_of(pod) == node and told.started(pod)]
            new = [pod for pod in mine if pod["metadata"]["uid"] not in done]
            return sorted(new, key=lambda pod: str(pod["metadata"].get("creationTimestamp")))[-1:]

        while True:
            last = not follow or self.is_over(job, folder)  # asked before the look: pods that come until then are seen
            if self.found(api, job) is None:  # pods of that label are not, or not yet, this job's
                return
            pods = fresh(api.wait_for_pods(label, lambda now: bool(fresh(now)), 0 if last else NEXT_POD_SECONDS))
            for pod in pods:
                done.add(pod["metadata"]["uid"])
                yield from lines_of(api, pod, self.container, follow=follow)
            if not follow or (last and not pods):
                return
