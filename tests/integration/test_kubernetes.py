"""The official client against a stand-in of the API server, over real sockets; and a job whose pods really run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from configs.compose import build, compose
from configs.errors import ConfigError, CrosstuneError
from launchers.base import Launcher, UnknownOutcomeError
from launchers.job import Job, JobFolder, Mark, State, Word, state_of
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.connection import ExistsError, LostError
from launchers.torchrun import free_port
from tests.command import crosstune, metrics_of
from tests.fake_kubelet import Kubelet
from tests.fake_kubernetes import TOKEN, Cluster, Fault, api_server, write_kubeconfig
from tests.unit.test_kubernetes_render import SPEC

JOBS, PODS = r"/jobs", r"/pods"
INSTALLED = {"pods", "services", "events", "jobs", "pytorchjobs", "trainjobs", "trainingruntimes", "ascendjobs"}


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(installed=set(INSTALLED))


@pytest.fixture
def kubeconfig(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    with api_server(cluster) as address:
        yield write_kubeconfig(tmp_path / "kubeconfig", address)


class Submitted:
    """A job of a launcher, with its folder."""

    def __init__(self, kubeconfig: Path, folder: Path, kind: str = "volcano", *words: str) -> None:
        cluster = "ascend" if kind == "ascendjob" else "nvidia"
        common = [f"launcher.kubeconfig={kubeconfig}", "launcher.image=i:1", f"launcher.claims={{{folder}: c}}"]
        options = compose(
            "launch", [f"launcher={kind}", f"cluster={cluster}", *common, "launcher.patience_seconds=3", *words]
        )
        launcher = build(options.launcher, Launcher, options.cluster)
        assert isinstance(launcher, KubernetesLauncher)
        self.launcher, self.folder = launcher, JobFolder.of_run(folder / "run")
        self.job = Job(replace(SPEC, run_dir=str(folder / "run"), secrets=()), time.time())
        self.folder.write(self.job)
        for name, text in launcher.render(self.job.spec, 0).items():
            (self.folder.path / name).write_text(text)

    def submit(self) -> Submitted:
        self.job = replace(self.job, handle=self.launcher.submit(self.job, self.folder))
        return self

    def word(self) -> tuple[Word, str]:
        report = self.launcher.report(self.job, self.folder)
        return report.word, report.detail

    def state(self, cancelled: bool = False) -> State:
        report = self.launcher.report(self.job, self.folder)
        return state_of(report, self.folder.marks(), self.job.spec.nodes, cancelled=cancelled)

    def log(self, node: int, *, follow: bool = False) -> Iterator[str]:
        return self.launcher.log(self.job, self.folder, node, follow=follow)


def set_job(cluster: Cluster, plural: str, **status: object) -> None:
    [job] = cluster.all(plural)
    job["status"] = status
    cluster.put(plural, job)


def add_pod(cluster: Cluster, job: str, index: int, name: str = "", **labels: str) -> str:
    name = name or f"{job}-node-{index}"
    labels = {"crosstune/job": job, "volcano.sh/task-index": str(index), **labels}
    cluster.put("pods", {"metadata": {"name": name, "labels": labels}, "status": {"phase": "Pending"}})
    return name


RUNNING = {"containerStatuses": [{"state": {"running": {}}}]}


def ended(code: int, reason: str = "Error") -> dict[str, object]:
    return {"containerStatuses": [{"state": {"terminated": {"exitCode": code, "reason": reason}}}]}


def test_objects_are_tried_then_made_and_owned(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path, "trainjob").submit()
    posts = [(path.rpartition("/")[2], query) for method, path, query, _ in cluster.asked if method == "POST"]
    strict, dry = {"fieldValidation": "Strict"}, {"fieldValidation": "Strict", "dryRun": "All"}
    assert posts == [("trainingruntimes", dry), ("trainingruntimes", strict), ("trainjobs", dry), ("trainjobs", strict)]
    [job], [runtime] = cluster.all("trainjobs"), cluster.all("trainingruntimes")
    assert runtime["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    uid = job["metadata"]["uid"]
    assert made.job.handle == {"kind": "TrainJob", "namespace": "research", "name": SPEC.name, "uid": uid}
    assert TOKEN not in "".join(file.read_text() for file in made.folder.path.rglob("*") if file.is_file())


@pytest.mark.parametrize("kind", ["volcano", "pytorchjob", "ascendjob"])
def test_each_kind_is_accepted(kind: str, cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path, kind).submit()
    assert made.word()[0] is Word.pending
    made.launcher.cancel(made.job, made.folder, hard=False)
    assert made.word()[0] is Word.unknown and made.state(cancelled=True) is State.cancelled


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (("replicas: 3", "replicas: three"), "refused by the server (422)"),
        (("  maxRetry: 4\n", "  maxRetry: 4\n  maxRetries: 4\n"), "unknown field"),
    ],
)
def test_a_wrong_manifest_is_refused_in_the_servers_words(
    spoil: tuple[str, str], words: str, cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    made = Submitted(kubeconfig, tmp_path)
    file = made.folder.path / "volcano-job.yaml"
    file.write_text(file.read_text().replace(*spoil))
    with pytest.raises(ConfigError) as error:
        made.submit()
    assert words in error.value.found and len(str(error.value).splitlines()) < 15
    assert not cluster.all("jobs") and cluster.count("POST") == 1


def test_refusals(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    Submitted(kubeconfig, tmp_path).submit()
    with pytest.raises(ExistsError, match="already exists\n.*it is this run's"):
        Submitted(kubeconfig, tmp_path).submit()
    with pytest.raises(ConfigError, match="cannot POST in the namespace"):
        cluster.forbidden.add("closed")
        Submitted(kubeconfig, tmp_path / "b", "volcano", "launcher.namespace=closed").submit()
    cluster.installed.remove("jobs")
    with pytest.raises(ConfigError, match="does not know Job of batch.volcano.sh/v1alpha1"):
        Submitted(kubeconfig, tmp_path / "c").submit()
    with pytest.raises(ConfigError, match="nobody"):
        Submitted(kubeconfig, tmp_path / "d", "volcano", "launcher.context=nobody").submit()


def test_a_refused_job_leaves_nothing_behind(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    cluster.faults.append(Fault("POST", "/trainjobs", 422, message="numNodes: too many"))
    with pytest.raises(ConfigError, match="numNodes: too many"):
        Submitted(kubeconfig, tmp_path, "trainjob").submit()
    assert not cluster.all("trainingruntimes") and not cluster.all("trainjobs")


def test_what_a_refused_job_may_leave_behind_is_told(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    """The job is there and runs, though its last object could not be changed, nor anything be deleted."""
    cluster.faults += [Fault("PATCH", "/trainingruntimes", 403), Fault("DELETE", "/", "before", 999)]
    made = Submitted(kubeconfig, tmp_path, "trainjob", "launcher.patience_seconds=1")
    with pytest.raises(UnknownOutcomeError, match="not allowed: as ordered; .* could not be deleted\n.*kubectl -n res"):
        made.submit()
    assert cluster.all("trainjobs")


def test_a_webhook_without_dry_run_is_no_obstacle(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    message = "admission webhook x does not support dry run"
    cluster.faults.append(Fault("POST", "dryRun=All", 400, message=message))
    Submitted(kubeconfig, tmp_path).submit()
    assert cluster.all("jobs")


@pytest.mark.parametrize("how", ["before", "after", 503])
def test_a_lost_answer_makes_no_second_job(how: int | str, cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    cluster.faults.append(Fault("POST", r"/jobs\?fieldValidation=Strict$", how))
    made = Submitted(kubeconfig, tmp_path).submit()
    assert len(cluster.all("jobs")) == 1 and made.job.handle["name"] == SPEC.name
    assert cluster.count("POST", fieldValidation="Strict") == 3  # a dry run, the lost one, the next


def test_a_job_of_which_no_answer_came_is_found_by_its_name(cluster, kubeconfig: Path, tmp_path: Path) -> None:
    post = r"/jobs\?fieldValidation=Strict$"
    cluster.faults += [
        Fault("POST", post, "after"),
        Fault("POST", post, "before", 999),
        Fault("GET", "/", "before", 999),
    ]
    made = Submitted(kubeconfig, tmp_path, "volcano", "launcher.patience_seconds=1")
    with pytest.raises(UnknownOutcomeError, match="what may be there: kubectl"):
        made.submit()
    cluster.faults.clear()
    assert not made.job.handle and made.state() is State.pending
    made.launcher.cancel(made.job, made.folder, hard=False)
    assert not cluster.all("jobs") and made.word()[0] is Word.unknown


def test_a_name_taken_by_another_is_not_taken_for_ours(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path)
    other = {"metadata": {"name": SPEC.name, "annotations": {"crosstune/run": "/another/run"}}}
    act = partial(cluster.put, "jobs", other)
    cluster.faults.append(Fault("POST", r"/jobs\?fieldValidation=Strict$", "before", act=act))
    with pytest.raises(ExistsError, match="of the run /another/run\n.*launch once more"):
        made.submit()


@pytest.mark.parametrize("known", [False, True])
def test_another_runs_job_of_the_same_name_is_left_alone(
    known: bool, cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """Whether the server's answer was lost and there is only the name, or told what has been deleted since."""
    made = Submitted(kubeconfig, tmp_path)
    if known:
        made.submit()
        cluster.remove("jobs", SPEC.name)
    annotations = {"crosstune/run": made.job.spec.run_dir if known else "/another/run"}
    cluster.put("jobs", {"metadata": {"name": SPEC.name, "annotations": annotations}})
    set_job(cluster, "jobs", state={"phase": "Running"})
    pod = add_pod(cluster, SPEC.name, 0)
    cluster.set_pod(pod, "Succeeded", **ended(0))
    cluster.say(pod, "not for everybody")
    assert made.word()[0] is Word.unknown and not [*made.log(0), *made.log(0, follow=True)]
    for hard in (False, True):
        made.launcher.cancel(made.job, made.folder, hard=hard)
    assert cluster.all("jobs") and cluster.all("pods") and not cluster.count("DELETE")


def test_a_job_that_took_the_name_meanwhile_is_left_alone(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    """The server itself looks at the uid: between a look and a deletion there is time."""
    made = Submitted(kubeconfig, tmp_path).submit()
    other = {"metadata": {"name": SPEC.name}}

    def replaced() -> None:
        cluster.remove("jobs", SPEC.name)
        cluster.put("jobs", other)

    cluster.faults.append(Fault("DELETE", "/jobs", "after", act=replaced))
    made.launcher.cancel(made.job, made.folder, hard=True)
    assert cluster.all("jobs") == [other] and cluster.count("DELETE") == 2


@pytest.mark.parametrize(
    ("how", "error"),
    [("after", None), ("before", LostError), (403, ConfigError), (409, ConfigError)],
)
def test_that_a_job_is_not_deleted_or_nobody_knows_is_told(
    how: int | str, error: type[CrosstuneError] | None, cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """Whoever takes a submission back has to know; an answer that is lost once costs nothing."""
    made = Submitted(kubeconfig, tmp_path, "volcano", "launcher.patience_seconds=1").submit()
    cluster.faults.append(Fault("DELETE", "/jobs", how, times=999 if how == "before" else 1))
    if error is None:
        made.launcher.cancel(made.job, made.folder, hard=True)
        assert not cluster.all("jobs")
    else:
        with pytest.raises(error):
            made.launcher.cancel(made.job, made.folder, hard=True)
        assert cluster.all("jobs")


def test_a_server_that_is_gone_is_told_in_time(cluster: Cluster, tmp_path: Path) -> None:
    with api_server(cluster) as address:
        kubeconfig = write_kubeconfig(tmp_path / "kubeconfig", address)
        made = Submitted(kubeconfig, tmp_path, "volcano", "launcher.patience_seconds=1").submit()
    for act in (made.word, made.submit):
        began = time.monotonic()
        with pytest.raises(LostError, match="no answer to"):
            act()
        assert time.monotonic() - began < 3


def test_a_missing_client_is_told_with_its_remedy(kubeconfig: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ConfigError, match=r"pip install 'crosstune\[k8s\]'"):
        Submitted(kubeconfig, tmp_path).submit()


def test_states_of_a_volcano_job(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path).submit()
    name = made.job.handle["name"]
    assert made.state() is State.pending
    event = {
        "involvedObject": {"name": name},
        "reason": "Unschedulable",
        "message": "0/4 nodes have npu",
        "type": "Warning",
    }
    cluster.put("events", {"metadata": {"name": "e"}, **event})
    assert made.word() == (Word.pending, "Unschedulable: 0/4 nodes have npu")
    pods = [add_pod(cluster, name, index) for index in range(3)]
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "1 node is tainted"}
    cluster.set_pod(pods[1], "Pending", conditions=[scheduled])
    pull = {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling "i:1"'}}
    cluster.set_pod(pods[2], "Pending", containerStatuses=[{"state": pull}])
    told = 'node 1: Unschedulable: 1 node is tainted; node 2: ImagePullBackOff: Back-off pulling "i:1"'
    assert made.word() == (Word.pending, told)
    for pod in pods:
        cluster.set_pod(pod, "Running", **RUNNING)
    set_job(cluster, "jobs", state={"phase": "Running"})
    assert made.word() == (Word.running, "")
    made.folder.mark(Mark(0, 0, "h", 1, 0.0, ""))
    set_job(cluster, "jobs", state={"phase": "Restarting"})
    cluster.set_pod(pods[0], "Failed", reason="Evicted", message="The node was low on resource: memory")
    assert made.word()[0] is Word.pending and "node 0: Evicted: The node was low" in made.word()[1]
    assert made.state() is State.preempted


@pytest.mark.parametrize(
    ("codes", "status", "expected"),
    [
        ([0, 0, 0], {"containerStatuses": []}, State.succeeded),
        ([75, 75, 75], ended(75), State.preempted),
        ([3, None, None], ended(3), State.failed),
        ([None, None, None], ended(137, "OOMKilled"), State.failed),
        ([None, None, None], {"reason": "NodeLost", "message": "n2"}, State.failed),
    ],
)
def test_how_a_job_ended(
    codes: list[int | None], status: dict, expected: State, cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    made = Submitted(kubeconfig, tmp_path).submit()
    for node, code in enumerate(codes):
        made.folder.mark(Mark(node, 0, "h", 1, 0.0, "", ended=None if code is None else 1.0, exit_code=code))
        cluster.set_pod(
            add_pod(cluster, made.job.handle["name"], node), "Succeeded" if code == 0 else "Failed", **status
        )
    set_job(cluster, "jobs", state={"phase": "Completed" if codes == [0, 0, 0] else "Failed"})
    assert made.state() is expected


def test_a_job_that_never_came_to_its_run_has_failed(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    """No crosstune in the image, or a setup script that is not there: nobody left a mark."""
    made = Submitted(kubeconfig, tmp_path).submit()
    assert made.state() is State.pending
    cluster.set_pod(add_pod(cluster, made.job.handle["name"], 0), "Failed", **ended(2))
    set_job(cluster, "jobs", state={"phase": "Terminated"})
    assert made.state() is State.failed and "node 0: Error, exit code 2" in made.word()[1]
    made.folder.mark(Mark(0, 0, "h", 1, 0.0, "", ended=1.0, exit_code=75))
    assert made.word()[0] is Word.ended
    made.job = replace(made.job, attempt=1)  # resumed: the mark is that of the job before
    assert made.word()[0] is Word.failed


@pytest.mark.parametrize("kind", ["trainjob", "pytorchjob", "ascendjob"])
def test_states_of_jobs_with_conditions(kind: str, cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path, kind).submit()
    plural, done = made.launcher.resource.plural, "Complete" if kind == "trainjob" else "Succeeded"
    name = made.job.handle["name"]
    if kind == "trainjob":
        labels = [{"batch.kubernetes.io/job-completion-index": str(index)} for index in range(3)]
    else:
        key = "training.kubeflow.org/replica"
        roles = [("master", "0"), ("worker", "0"), ("worker", "1")]
        labels = [{f"{key}-type": role, f"{key}-index": index} for role, index in roles]
    pods = [add_pod(cluster, name, index, **each) for index, each in enumerate(labels)]
    assert made.word()[0] is Word.pending
    for pod in pods:
        cluster.set_pod(pod, "Running", **RUNNING)
    if kind != "trainjob":
        set_job(cluster, plural, conditions=[{"type": "Running", "status": "True"}])
    assert made.word()[0] is Word.running
    cluster.set_pod(pods[2], "Failed", **ended(137, "OOMKilled"))
    assert "node 2: OOMKilled, exit code 137" in made.word()[1]
    for index, pod in enumerate(pods):
        cluster.say(pod, f"line of {index}")
    assert [list(made.log(index)) for index in range(3)] == [[f"line of {index}"] for index in range(3)]
    conditions = [{"type": "Running", "status": "False"}, {"type": "Failed", "status": "True", "message": "gave up"}]
    set_job(cluster, plural, conditions=conditions)
    assert made.word()[0] is Word.failed and "Failed: gave up" in made.word()[1]
    set_job(cluster, plural, conditions=[{"type": done, "status": "True", "message": "fine"}])
    assert made.word()[0] is Word.ended


def test_a_log_is_followed_over_lost_connections_and_restarts(
    cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """Each line once, whether the connection breaks, the watch's state is too old, or another pod takes over."""
    made = Submitted(kubeconfig, tmp_path).submit()
    job = made.job.handle["name"]
    cluster.faults += [
        Fault("GET", "watch=true", "gone"),
        Fault("GET", "watch=true", "before"),
        Fault("GET", "/log", "cut", lines=2),
        Fault("GET", "/log", "before"),
    ]
    set_job(cluster, "jobs", state={"phase": "Running"})

    def happen() -> None:
        time.sleep(0.7)
        for attempt in range(2):
            pod = add_pod(cluster, job, 1)
            time.sleep(0.2)
            cluster.set_pod(pod, "Running", **RUNNING)
            for number in range(4):
                cluster.say(pod, f"{attempt}.{number}")
                time.sleep(0.3)
            cluster.set_pod(pod, "Succeeded" if attempt else "Failed", **ended(75 * (1 - attempt)))
            if not attempt:
                time.sleep(2)
                cluster.remove("pods", pod)
                cluster.logs.clear()
        set_job(cluster, "jobs", state={"phase": "Completed"})

    thread = threading.Thread(target=happen)
    thread.start()
    lines = list(made.log(1, follow=True))
    thread.join()
    assert lines == [f"{attempt}.{number}" for attempt in range(2) for number in range(4)]
    assert not [fault for fault in cluster.faults if fault.times]


def test_without_pods_the_shared_folder_tells(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path).submit()
    made.folder.mark(Mark(2, 1, "h", 1, 0.0, ""))
    file = made.folder.output(1, 2)
    file.parent.mkdir(parents=True)
    file.write_text("kept\nin the folder\n")
    set_job(cluster, "jobs", state={"phase": "Completed"})
    assert list(made.log(2)) == list(made.log(2, follow=True)) == ["kept", "in the folder"]
    resumed = replace(made.job, attempt=2)
    assert not list(made.launcher.log(resumed, made.folder, 2, follow=False)), "that was the job before"
    cluster.forbidden.add("research")
    assert list(made.log(2)) == ["kept", "in the folder"]
    with pytest.raises(CrosstuneError, match="not allowed"):
        list(made.log(0))


def test_cancel_gives_pods_their_time_or_none(cluster: Cluster, kubeconfig: Path, tmp_path: Path) -> None:
    made = Submitted(kubeconfig, tmp_path).submit()
    cluster.keeps_deleted = True
    pod = add_pod(cluster, made.job.handle["name"], 0)
    made.launcher.cancel(made.job, made.folder, hard=False)
    [(*_, body)] = [each for each in cluster.asked if each[0] == "DELETE"]
    assert body["propagationPolicy"] == "Foreground" and "gracePeriodSeconds" not in body
    assert made.word() == (Word.running, "it is being ended") and not made.launcher.is_over(made.job, made.folder)
    made.launcher.cancel(made.job, made.folder, hard=True)
    assert ("pods", pod) not in cluster.objects
    made.launcher.cancel(made.job, made.folder, hard=True)  # what is gone is no fault


def write_records(file: Path) -> Path:
    lines = [{"prompt": f"what is {i}", "completion": f"{i} is a number and so is {i + 1}"} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.distributed
@pytest.mark.parametrize("evicted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pods_train_and_go_on_after_an_eviction(
    evicted: bool, cluster: Cluster, kubeconfig: Path, tmp_path: Path
) -> None:
    """Two pods, as processes with the manifest's own command and environment; a path with all that shells love."""
    from tests.tiny import save_tiny_model

    can = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
    if not can:
        assert "CI" not in os.environ, "CI must be able to give a pod its own /etc/hosts: root and unshare are needed"
        pytest.skip("pods need an /etc/hosts of their own: root and unshare")
    shared = tmp_path / "a b'\"$(touch evil)$$"
    shared.mkdir()
    secret = "hf_the-value-itself"
    cluster.secrets = {"hub": {"token": secret}}
    (shared / "env.sh").write_text("export FROM_SETUP=yes\n")
    run, data = shared / "run", write_records(shared / "data.jsonl")
    save_tiny_model(shared / "model")

    def quoted(path: Path) -> str:
        return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"

    words = [
        *(f"{key}={quoted(path)}" for key, path in {"run_dir": run, "dataset.path": data}.items()),
        *(f"model.path={quoted(shared / 'model')}", f"cache_dir={quoted(shared / 'cache')}"),
        *("dataset.test_fraction=0.1", "dataset.license=CC0-1.0", "device=cpu", "model.precision=fp32"),
        *("batch_tokens=400", "max_length=200", "micro_batch_tokens=400", "max_steps=24", "checkpoint.every=8"),
        *(
            "launcher=volcano",
            "nodes=2",
            "nproc=1",
            f"master_port={free_port()}",
            f"python={quoted(Path(sys.executable))}",
            "launcher.image=i:1",
        ),
        *(f"launcher.kubeconfig={quoted(kubeconfig)}", f"launcher.claims={{{tmp_path}: team}}"),
        *(
            "secrets=[HF_TOKEN]",
            "launcher.secret_refs={HF_TOKEN: hub/token}",
            f"cluster.setup=[{quoted(shared / 'env.sh')}]",
        ),
        "environment={ODD: '$(HOME) \"x\" `y`'}",
    ]
    with Kubelet(cluster, tmp_path) as kubelet:
        assert "submitted" in crosstune("launch", "train", *words, cwd=shared, HF_TOKEN="")
        [job] = cluster.all("jobs")
        follow = subprocess.Popen(
            [sys.executable, "-P", "-m", "launchers.cli", "logs", "-f", str(run)], stdout=subprocess.PIPE, text=True
        )
        last = time.monotonic() + 200
        while evicted and (not (run / "metrics.jsonl").is_file() or len(metrics_of(run)) < 3):
            assert time.monotonic() < last, cluster.logs
            time.sleep(0.1)
        if evicted:
            kubelet.evict(f"{job['metadata']['name']}-node-1")
        printed, _ = follow.communicate(timeout=200)
        assert job["status"]["state"]["phase"] == "Completed" and job["status"]["retryCount"] == evicted, cluster.logs
    told = crosstune("status", str(run))
    assert told.startswith("succeeded") and f"attempt {int(evicted)}" in told
    marks = [JobFolder.of_run(run).marks(attempt) for attempt in range(1 + evicted)]
    assert [[mark.exit_code for mark in each] for each in marks] == [*([[75, 75]] if evicted else []), [0, 0]]
    assert len({mark.environment for each in marks for mark in each}) == 1
    steps = [line["step"] for line in metrics_of(run)]
    assert steps == list(range(1, 25)), steps
    assert ("resume" in printed.lower()) is evicted and re.search(r"\b24\b", printed), printed
    assert not list(tmp_path.rglob("evil")) and not (Path("/") / "evil").exists()
    for file in (path for path in shared.rglob("*") if path.is_file()):
        assert secret.encode() not in file.read_bytes(), file
