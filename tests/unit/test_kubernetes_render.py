"""Manifests: golden files, typed models, escaping, and what can be told to be wrong before anything is asked."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from configs.compose import build, compose
from configs.errors import ConfigError, RunFailedError, StoppedError
from launchers.base import Launcher
from launchers.job import Job, JobFolder, Mark
from launchers.kubernetes import entry
from launchers.kubernetes.base import KubernetesLauncher
from launchers.kubernetes.pod import NAME_LENGTH, object_name, toleration
from launchers.launch import plan
from launchers.spec import LaunchSpec
from tests.kubernetes_models import check

GOLDEN = Path(__file__).parent.parent / "golden" / "kubernetes"
KINDS = ("volcano", "trainjob", "pytorchjob", "ascendjob")
COMBINATIONS = [(k, c) for k in KINDS for c in ("ascend", "amd", "nvidia") if k != "ascendjob" or c == "ascend"]
COMBINATIONS.append(("volcano", "intel"))
SECRET = "hf_a-value-that-must-be-nowhere"
SPEC = LaunchSpec(
    name="licenses-20260102-030405",
    command="train",
    request="/shared/runs/licenses/launch/request.yaml",
    run_dir="/shared/runs/licenses",
    working_dir="/shared/work",
    nodes=3,
    nproc=8,
    threads=0,
    environment={"WITH": "its value in job.json"},
    secrets=("HF_TOKEN",),
    setup=("/usr/local/toolkit/set_env.sh",),
    python=None,
    interface=None,
    master_port=29500,
    cpus=96,
    memory_gib=512,
    devices=8,
    time_limit_minutes=720,
    restarts=3,
    grace_seconds=300,
)
WORDS = [
    "launcher.image=registry.example.com/team/crosstune:1.2",
    "launcher.namespace=research",
    "launcher.claims={/shared: team-data/folder}",
    "launcher.secret_refs={HF_TOKEN: hub/token}",
    "launcher.queue=night",
    "launcher.priority_class=batch-low",
    "launcher.service_account=trainer",
    "launcher.pull_secrets=[registry]",
    "launcher.tolerations=['team=research:NoSchedule', 'spot:NoExecute']",
    "launcher.annotations={example.com/owner: 'research; $(whoami)'}",
    "launcher.capabilities=[IPC_LOCK]",
    "launcher.shm_gib=64",
]


def launcher_of(kind: str, cluster: str, *words: str) -> KubernetesLauncher:
    options = compose("launch", [f"launcher={kind}", f"cluster={cluster}", *WORDS, *words])
    found = build(options.launcher, Launcher, options.cluster)
    assert isinstance(found, KubernetesLauncher)
    return found


@pytest.mark.parametrize(("kind", "cluster"), COMBINATIONS)
def test_manifests_are_the_golden_files_and_pass_their_models(kind: str, cluster: str, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    words = ["cluster.node_selector={accelerator-type: module-910b-8}"] if cluster == "ascend" else []
    launcher = launcher_of(kind, cluster, *words)
    assert list(launcher.faults(SPEC)) == []
    files = launcher.render(SPEC, 0)
    assert files == launcher.render(SPEC, 0)
    for name, text in files.items():
        golden = GOLDEN / f"{kind}-{cluster}" / name
        if "UPDATE_GOLDEN" in os.environ:
            golden.parent.mkdir(parents=True, exist_ok=True)
            golden.write_text(text)
        assert text == golden.read_text(), f"UPDATE_GOLDEN=1 rewrites {golden}"
        assert SECRET not in text and "its value in job.json" not in text
        check(yaml.safe_load(text))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_or_a_wrong_type_is_refused_by_the_models(kind: str) -> None:
    (*_, text) = launcher_of(kind, "ascend").render(SPEC, 0).values()
    good = yaml.safe_load(text)
    check(good)
    for change in ({"spec": {**good["spec"], "minAvailible": 2}}, {"metadata": {**good["metadata"], "nmae": "x"}}):
        with pytest.raises(ValueError):
            check({**good, **change})
    wrong = copy.deepcopy(good)
    key = {"volcano": "minAvailable", "trainjob": "trainer", "pytorchjob": "runPolicy", "ascendjob": "successPolicy"}[
        kind
    ]
    wrong["spec"][key] = "three"
    with pytest.raises(ValueError):
        check(wrong)


def pods_in(node: object) -> list[dict]:
    """Pod templates in a manifest."""
    if isinstance(node, dict):
        own = [node] if isinstance(node.get("spec"), dict) and "containers" in node["spec"] else []
        return own + [found for value in node.values() for found in pods_in(value)]
    return [found for value in node for found in pods_in(value)] if isinstance(node, list) else []


def pods_of(launcher: KubernetesLauncher, spec: LaunchSpec) -> list[dict]:
    """Pod templates of the rendered job."""
    return [pod for text in launcher.render(spec, 0).values() for pod in pods_in(yaml.safe_load(text))]


def test_restarts_and_signals_follow_the_spec() -> None:
    volcano = yaml.safe_load(launcher_of("volcano", "nvidia").render(SPEC, 0)["volcano-job.yaml"])["spec"]
    # Its controller fails a job when its count of restarts has come to maxRetry (state/restarting.go).
    assert volcano["maxRetry"] == SPEC.restarts + 1
    assert volcano["policies"][0] == {"exitCode": 2, "action": "TerminateJob"}
    never = yaml.safe_load(launcher_of("volcano", "nvidia").render(replace(SPEC, restarts=0), 0)["volcano-job.yaml"])
    assert never["spec"]["maxRetry"] == 1  # 0 would be replaced by 3
    for kind in KINDS:
        launcher = launcher_of(kind, "ascend")
        for pod in pods_of(launcher, SPEC):
            assert pod["spec"]["terminationGracePeriodSeconds"] > SPEC.grace_seconds
            assert pod["spec"]["activeDeadlineSeconds"] == 720 * 60
        for pod in pods_of(launcher, replace(SPEC, restarts=0)):
            assert entry.RETRY_CODE not in [each["name"] for each in pod["spec"]["containers"][0]["env"]]


def test_devices_assigned_by_the_scheduler_are_named_only_where_it_does() -> None:
    [pod] = pods_of(launcher_of("volcano", "ascend"), SPEC)
    variables = {each["name"]: each for each in pod["spec"]["containers"][0]["env"]}
    assert variables["XDL_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.hostIP"
    assert "ASCEND_VISIBLE_DEVICES" not in variables
    [pod] = pods_of(launcher_of("volcano", "ascend", "launcher.scheduler_assigns_devices=true"), SPEC)
    variables = {each["name"]: each for each in pod["spec"]["containers"][0]["env"]}
    field = variables["ASCEND_VISIBLE_DEVICES"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['huawei.com/Ascend910']"
    resources = pod["spec"]["containers"][0]["resources"]
    assert resources["limits"]["huawei.com/Ascend910"] == resources["requests"]["huawei.com/Ascend910"] == "8"


EVIL = ["a b", 'quo"te', "apo'strophe", "$(touch /tmp/x)", "$(HOME)", "$$(HOME)", "new\nline", "`id`", "#: - {x}", "é"]


@pytest.mark.parametrize("kind", KINDS)
def test_values_arrive_unchanged(kind: str) -> None:
    """Paths with all of it, through YAML and through Kubernetes' own replacement of $(NAME)."""
    from tests.fake_kubelet import expanded

    folder = "/shared/" + " ".join(EVIL)
    spec = replace(SPEC, run_dir=folder, setup=(f"{folder}/env.sh",), python=f"{folder}/bin/python")
    for pod in pods_of(launcher_of(kind, "ascend"), spec):
        words = [expanded(word, {"HOME": "/root"}) for word in pod["spec"]["containers"][0]["command"]]
        assert words[-1] == f"{folder}/launch/job.json"
        assert f"{folder}/env.sh" in words and f"{folder}/bin/python" in words
        assert words[:2] == ["bash", "-c"] and folder not in words[2]  # nothing of the user's is in the script


def test_names_are_fit_for_hosts() -> None:
    assert object_name(SPEC, 0) == SPEC.name
    assert object_name(SPEC, 4) == f"{SPEC.name}-4"
    long = [
        object_name(replace(SPEC, name=f"{'x' * 40}-20260102-03040{i}"), attempt) for i in (5, 6) for attempt in (0, 4)
    ]
    assert len(set(long)) == 4 and all(len(name) <= NAME_LENGTH for name in long)


def test_two_jobs_of_one_second_have_two_names(tmp_path: Path, monkeypatch) -> None:
    """In one namespace, of two users who gave no name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda *_: "20260102-030405")
    words = [*WORDS, "launcher=volcano", f"launcher.claims={{{tmp_path}: c}}"]
    cfg = compose("train", ["model.path=m", "dataset.path=d", f"run_dir={tmp_path}/r"])
    names = {plan("train", cfg, compose("launch", words)).job.spec.name for _ in range(3)}
    assert len(names) == 3 and all(re.fullmatch(r"crosstune-20260102-030405-[0-9a-f]{4}", name) for name in names)


def test_what_the_pods_lack_is_refused_by_name() -> None:
    outside = replace(SPEC, run_dir="/home/me/run", working_dir="/sharedbutnot", secrets=("HF_TOKEN", "WANDB_API_KEY"))
    faults = {fault.where: fault for fault in launcher_of("volcano", "nvidia").faults(outside)}
    assert set(faults) == {"run_dir", "the working folder", "secrets"}
    assert "/home/me/run" in faults["run_dir"].found and "/shared" in str(faults["run_dir"].allowed)
    assert "WANDB_API_KEY" in faults["secrets"].found
    [fault] = launcher_of("volcano", "nvidia", "launcher.shm_gib=512").faults(SPEC)
    assert fault.where == "launcher.shm_gib"
    assert [fault.where for fault in launcher_of("ascendjob", "nvidia").faults(SPEC)] == ["cluster"]


@pytest.mark.parametrize(
    "word",
    [
        f"launcher.secret_refs={{HF_TOKEN: {SECRET}}}",
        "launcher.claims={relative/path: claim}",
        "launcher.tolerations=['key=value:Sometimes']",
        "launcher.image_pull_policy=sometimes",
    ],
)
def test_config_is_checked_and_tells_no_secret(word: str) -> None:
    with pytest.raises(ConfigError) as error:
        launcher_of("volcano", "nvidia", word)
    assert error.value.where.startswith("launcher.") and SECRET not in str(error.value)


def test_tolerations() -> None:
    assert toleration("a=b:NoSchedule") == {"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"}
    assert toleration("example.com/gone:NoExecute")["operator"] == "Exists"
    assert toleration("a") == {"key": "a", "operator": "Exists"}


def job_in(folder: Path, **changes: object) -> tuple[Job, JobFolder]:
    found = JobFolder.of_run(folder)
    job = Job(replace(SPEC, run_dir=str(folder), secrets=()), 0.0, **changes)
    found.write(job)
    return job, found


def test_a_pod_learns_its_place_from_its_controller(tmp_path: Path) -> None:
    job, folder = job_in(tmp_path, attempt=4)
    environment = {entry.NODE_FROM: "VC_TASK_INDEX", "VC_TASK_INDEX": "2", entry.RESTARTS: "1", "CROSSTUNE_MASTER": "m"}
    misleading = {"RANK": "9", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "PET_NNODES": "7", "MASTER_PORT": "1"}
    environment |= misleading
    assert entry.settle(job, folder, environment) == 5
    assert environment["CROSSTUNE_NODE"] == "2" and environment["CROSSTUNE_ATTEMPT"] == "5"
    assert not {*misleading, entry.NODE_FROM, entry.RESTARTS} & set(environment)
    with pytest.raises(ConfigError, match="RANK"):
        entry.settle(job, folder, {entry.NODE_FROM: "RANK"})


def test_attempts_are_counted_by_marks_where_the_controller_does_not(tmp_path: Path) -> None:
    job, folder = job_in(tmp_path)

    def attempt_of(node: int) -> int:
        return entry.settle(job, folder, {"RANK": str(node), entry.NODE_FROM: "RANK", "CROSSTUNE_MASTER": "m"})

    def leave(node: int, attempt: int, code: int | None = None) -> None:
        folder.mark(Mark(node, attempt, "h", 1, 0.0, "", ended=code and 1.0, exit_code=code))

    assert attempt_of(0) == attempt_of(1) == 0
    leave(0, 0, 3)  # node 1 was never started in attempt 0
    assert attempt_of(0) == 1
    leave(0, 1)
    assert attempt_of(1) == 1
    leave(1, 1, 75)
    leave(0, 1, 75)
    assert attempt_of(0) == attempt_of(1) == 2


def test_restarts_are_bounded_whatever_the_controller_does(tmp_path: Path) -> None:
    job, folder = job_in(tmp_path)
    entry.refuse(job, folder, SPEC.restarts)
    with pytest.raises(RunFailedError, match="no restart is left"):
        entry.refuse(job, folder, SPEC.restarts + 1)
    folder.mark(Mark(1, 0, "h", 1, 0.0, "", ended=1.0, exit_code=2))
    with pytest.raises(ConfigError, match="something to mend"):
        entry.refuse(job, folder, 1)

    def code(of_run: int, attempt: int = 0) -> int:
        return entry.code_for_controller(of_run, job, folder, attempt, 138)

    assert [code(0), code(2)] == [0, 2]
    assert [code(3), code(75), code(143)] == [138, 138, 138]
    # None is left: the run's own, and none that the controller takes for "again".
    assert [code(3, 3), code(75, 3), code(143, 3)] == [3, 75, 3]
    assert entry.code_for_controller(75, job, folder, 0, 0) == 75
    folder.ask_to_cancel()
    assert code(75) == 75
    with pytest.raises(StoppedError, match="cancelled"):
        entry.refuse(job, folder, 1)


def test_nothing_of_the_client_is_imported_to_render() -> None:
    code = (
        "import sys, launchers.kubernetes.volcano, launchers.kubernetes.trainjob, launchers.kubernetes.ascendjob\n"
        "assert not {'kubernetes', 'kubeflow_trainer_api', 'torch', 'urllib3'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_signal_before_the_ranks_are_there_ends_a_pod(tmp_path: Path) -> None:
    """Process 1 of a container ignores signals that it has no handler for; here it waits for a name."""
    _, folder = job_in(tmp_path)
    environment = {**os.environ, entry.NODE_FROM: "RANK", "RANK": "1", "CROSSTUNE_MASTER": "no-such-host.invalid"}
    command = [sys.executable, "-P", "-m", "launchers.kubernetes.entry", str(folder.file)]
    process = subprocess.Popen(command, env=environment)
    caught = re.compile(r"SigCgt:\s*([0-9a-f]+)")
    while not int(caught.search(Path(f"/proc/{process.pid}/status").read_text())[1], 16) >> signal.SIGTERM - 1 & 1:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
