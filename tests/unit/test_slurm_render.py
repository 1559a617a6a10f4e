"""launcher=slurm: the batch script as text, and as what bash makes of it; what Slurm says, read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.errors import ConfigError, CrosstuneError
from configs.schema.launch import ClusterConfig, LaunchConfig
from configs.schema.launcher_slurm import Container, SlurmLauncherConfig
from launchers.base import LAST_BYTES
from launchers.job import Job, JobFolder, Mark, State, Word, state_of
from launchers.slurm import SlurmLauncher, launcher, script
from launchers.slurm.commands import JobState, parse_accounting, parse_job, refused
from launchers.slurm.script import NAME, render_script
from launchers.spec import LaunchSpec

GOLDEN = Path(__file__).parent.parent / "golden" / "slurm"
REWRITE = "CROSSTUNE_WRITE_GOLDEN" in os.environ
TARGET = "launchers.slurm.SlurmLauncher"
SPEC = LaunchSpec(
    name="demo-20260101-120000",
    command="train",
    request="/shared/runs/demo/launch/request.yaml",
    run_dir="/shared/runs/demo",
    working_dir="/home/me",
    nodes=2,
    nproc=8,
    threads=0,
    environment={},
    secrets=("HF_TOKEN",),
    setup=(),
    python="/shared/venv/bin/python",
    interface=None,
    master_port=29500,
    cpus=96,
    memory_gib=512,
    devices=8,
    time_limit_minutes=720,
    restarts=3,
    grace_seconds=120,
)


def settings(**values: Any) -> SlurmLauncherConfig:
    return SlurmLauncherConfig(TARGET, **values)


@cache
def cluster_of(name: str) -> ClusterConfig:
    return compose("launch", [f"cluster={name}"]).cluster


CASES: dict[str, tuple[LaunchSpec, SlurmLauncherConfig, str]] = {
    "ascend": (replace(SPEC, setup=("/usr/local/Ascend/set_env.sh",)), settings(partition="npu"), "ascend"),
    "amd": (
        replace(SPEC, secrets=()),
        settings(container=Container.apptainer, image="/images/rocm 7.sif", container_args=["--rocm"]),
        "amd",
    ),
    "nvidia": (
        replace(SPEC, python=None),
        settings(
            container=Container.pyxis,
            image="registry#team/crosstune:1",
            mounts=["/data:/data:ro"],
            account="lab",
            qos="long",
            constraint="a100&ib",
            nodelist="n[1-4]",
            exclude="n3",
            reservation="tuesday",
            export=["PATH"],
            extra=["--exclusive", "--mail-type=END"],
            srun_extra=["--cpu-bind=none"],
        ),
        "nvidia",
    ),
    "cpu": (
        replace(SPEC, nodes=1, devices=0, cpus=0, memory_gib=0, time_limit_minutes=0, restarts=0, secrets=()),
        settings(),
        "none",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_script_is_the_golden_one(case):
    spec, cfg, cluster = CASES[case]
    same_as_golden(case, SlurmLauncher(cfg, cluster_of(cluster)).render(spec, attempt=0)[NAME])


def test_the_script_of_a_sweep_is_the_golden_one():
    specs = [replace(SPEC, run_dir=f"/shared/runs/sweep/{number:03}") for number in range(3)]
    text = render_script(specs, 0, settings(array_parallel=2), cluster_of("ascend"), array=True)
    same_as_golden("sweep", text)


def same_as_golden(case: str, text: str) -> None:
    file = GOLDEN / f"{case}.sbatch"
    if REWRITE:
        file.write_text(text)
    assert text == file.read_text(), f"CROSSTUNE_WRITE_GOLDEN=1 writes {file} anew"
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


# The script under bash, with commands in Slurm's place.

SRUN = """#!/bin/bash
echo "srun $*" >> "$FAKE/calls"
trap 'echo USR1 >> "$FAKE/signals"' USR1
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=$FAKE_PROCID "$@"
code=$?
if [ -e "$FAKE/hold" ]; then while [ -e "$FAKE/hold" ]; do sleep 0.05; done; fi
exit $code
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$FAKE/calls"
for kind in "show job" requeue; do
    if [[ $* == *"$kind"* && -s $FAKE/away-$kind ]]; then
        sed -i 1d "$FAKE/away-$kind"
        echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
        exit 1
    fi
done
case "$*" in
    "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
    "show hostnames "*) echo "${@: -1}" ;;
    *"show node"*) echo "NodeName=n1 Arch=x86_64 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
    *"show job"*) cat "$FAKE/record" ;;
esac
"""
PYTHON = """#!/usr/bin/env python3
import json, os, sys
from pathlib import Path
fake = Path(os.environ["FAKE"])
(fake / "seen.json").write_text(json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ)}))
sys.exit(int((fake / "code").read_text()))
"""
APPTAINER = """#!/bin/bash
printf '%s\\0' "$@" > "$FAKE/words"
while [ "$1" != image.sif ]; do shift; done
shift
"$@"
"""
RUNNING = "JobId=7 JobName=demo JobState=RUNNING Reason=None Dependency=(null) Restarts=0 \n"


class Machine:
    """Runs a rendered script."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.fake = home / "fake"
        self.fake.mkdir()
        self.run_dir = home / "run"
        # A path that a shell would act upon wherever it is not quoted.
        self.python = home / "bin of 'mine' $(touch pwned) \"x\"\n;" / "python"
        self.python.parent.mkdir()
        for path, text in ((self.fake / "srun", SRUN), (self.fake / "scontrol", SCONTROL), (self.python, PYTHON)):
            path.write_text(text)
            path.chmod(0o755)
        self.record(RUNNING)
        (self.fake / "calls").touch()

    def record(self, text: str) -> None:
        (self.fake / "record").write_text(text)

    def away(self, kind: str, questions: int) -> None:
        """So many questions, ``show job`` or ``requeue``, find no controller."""
        (self.fake / f"away-{kind}").write_text("away\n" * questions)

    def start(
        self,
        *,
        code: int = 0,
        begun: int = 0,
        cfg: SlurmLauncherConfig | None = None,
        cluster: str = "none",
        task: int | None = None,
        **env: str,
    ) -> subprocess.Popen[str]:
        (self.fake / "code").write_text(str(code))
        spec = replace(SPEC, run_dir=str(self.run_dir), python=str(self.python), nodes=1, restarts=2)
        file = self.home / NAME
        specs = [spec] if task is None else [replace(spec, run_dir="/another"), spec]
        text = render_script(specs, 4, cfg or settings(), cluster_of(cluster), array=task is not None)
        file.write_text(text)
        environment = {"PATH": f"{self.fake}:{os.environ['PATH']}", "FAKE": str(self.fake), "FAKE_PROCID": "0"}
        environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}
        environment |= {"SLURM_RESTART_COUNT": str(begun)} if begun else {}
        environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(task)} if task is not None else {}
        return subprocess.Popen(
            ["bash", str(file)],
            env=environment | env,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, **options: Any) -> tuple[int, str]:
        """Exit code and output."""
        process = self.start(**options)
        shown, _ = process.communicate(timeout=30)
        return process.returncode, shown

    def seen(self) -> dict[str, Any]:
        """What launchers.node got."""
        return json.loads((self.fake / "seen.json").read_text())

    def requeued(self) -> bool:
        return self.calls("requeue")[-1:] == ["scontrol requeue 7"]

    def calls(self, kind: str) -> list[str]:
        """Of scontrol."""
        return [call for call in (self.fake / "calls").read_text().splitlines() if kind in call]

    def mark(self, attempt: int, code: int) -> None:
        JobFolder.of_run(self.run_dir).mark(Mark(0, attempt, "n1", 1, 0.0, "", 1.0, code))


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    monkeypatch.setattr(script, "AWAY_SECONDS", 2)
    monkeypatch.setattr(script, "PAUSE_SECONDS", 0.1)
    return Machine(tmp_path)


def test_every_value_arrives_unchanged_and_runs_nothing(machine):
    machine.run_dir = machine.home / "run `touch pwned` $(touch pwned) 'a' \"b\" \\ * \n#SBATCH --hold ü"
    setup = machine.home / "set up $(touch pwned).sh"
    setup.write_text("export FROM_SETUP=yes\n")
    code, shown = machine.run()
    assert code == 0, shown
    seen = machine.seen()
    assert seen["argv"] == ["-P", "-m", "launchers.node", str(machine.run_dir / "launch" / "job.json")]
    place = {name: seen["environment"][f"CROSSTUNE_{name}"] for name in ("NODE", "MASTER", "ATTEMPT")}
    assert place == {"NODE": "0", "MASTER": "10.0.0.1", "ATTEMPT": "4"}
    assert not list(machine.home.rglob("pwned"))


def test_apptainer_gets_the_folders_and_the_command_unchanged(machine):
    (machine.fake / "apptainer").write_text(APPTAINER)
    (machine.fake / "apptainer").chmod(0o755)
    machine.run_dir = machine.home / "run $(touch pwned) 'a' \"b\" \\ * \n;"
    cfg = settings(container=Container.apptainer, image="image.sif", mounts=["/d a:/d"], container_args=["--nv"])
    code, shown = machine.run(cfg=cfg)
    assert code == 0, shown
    words = (machine.fake / "words").read_bytes().decode().split("\0")[:-1]
    mounts = f"{machine.run_dir}:{machine.run_dir},/home/me:/home/me,/d a:/d"
    job_file = str(machine.run_dir / "launch" / "job.json")
    inside = [str(machine.python), "-P", "-m", "launchers.node", job_file]
    assert words == ["exec", "--bind", mounts, "--nv", "image.sif", *inside]
    assert machine.seen()["argv"][-1] == job_file and not list(machine.home.rglob("pwned"))


RECORD = RUNNING.strip() + " JOB_GRES=npu:6   Nodes=n[1-2] CPU_IDs=3 Mem=0 GRES={} MinCPUsNode=1 \n"


@pytest.mark.parametrize(
    ("cluster", "gres", "node", "given", "expected"),
    [
        ("ascend", "npu:3(IDX:0-2)", "n2", {}, "0,1,2"),
        ("ascend", "npu:4(IDX:0,3-4,7)", "n1", {}, "0,3,4,7"),
        ("ascend", "gpu:a:2(IDX:0-1),npu:1(IDX:5)", "n1", {}, "5"),
        ("ascend", "npu:910b:2(IDX:2-3),npu:910c:1(IDX:6)", "n1", {}, "2,3,6"),
        ("ascend", "npu:8(IDX:N/A)", "n1", {}, None),
        ("ascend", "npu:8", "n1", {}, None),
        # Slurm's own word stands; of two variables that one runtime applies in turn, one is left.
        ("nvidia", "gpu:2(IDX:4-5)", "n1", {"CUDA_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "4,5"}, "0,1"),
        ("amd", "gpu:2(IDX:4-5)", "n1", {"CUDA_VISIBLE_DEVICES": "4,5", "ROCR_VISIBLE_DEVICES": "4,5"}, "4,5"),
        ("amd", "gpu:mi300:2(IDX:4-5)", "n1", {"CUDA_VISIBLE_DEVICES": "4,5"}, "4,5"),
    ],
)
def test_devices_that_slurm_assigned_become_visible(machine, cluster, gres, node, given, expected):
    machine.record(RECORD.format(gres))
    code, shown = machine.run(cluster=cluster, SLURMD_NODENAME=node, **given)
    assert code == 0, shown
    named = {name: value for name, value in machine.seen()["environment"].items() if name.endswith("VISIBLE_DEVICES")}
    assert named == ({cluster_of(cluster).visible_devices: expected} if expected else {}), shown
    assert ("Slurm does not number the devices of n1" in shown) == (expected is None)


def test_devices_that_cannot_be_asked_for_are_not_guessed(machine):
    machine.away("show job", 1000)
    code, shown = machine.run(cluster="ascend")
    assert code == 3 and "does not say which devices" in shown
    assert not (machine.fake / "seen.json").exists()


@pytest.mark.parametrize(
    ("code", "begun", "told", "left", "goes_on"),
    [
        (0, 0, 0, "succeeded", False),
        (75, 0, 75, "queue", True),
        (75, 1, 75, "queue", True),
        (75, 2, 75, "no restart is left (restarts=2)", False),
        (3, 0, 3, "queue", True),
        (3, 1, 3, "no further than the attempt before", False),
        (2, 0, 2, "something to mend", False),
        (137, 0, 137, "queue", True),
        (75, 3, 75, "no restart is left", False),
    ],
)
def test_what_goes_back_into_the_queue(machine, code, begun, told, left, goes_on):
    if begun < 3:
        machine.mark(4 + begun, code)
    ended, shown = machine.run(code=code, begun=begun)
    assert (ended, machine.requeued()) == (told, goes_on), shown
    assert left in shown or code == 0


def test_what_does_not_go_back_into_the_queue(machine):
    machine.mark(4, 75)
    machine.record(RUNNING.replace("RUNNING", "COMPLETING"))
    assert machine.run(code=75)[0] == 75 and not machine.requeued()  # scancel, or the time limit itself
    machine.record(RUNNING)
    assert machine.run(code=75, cfg=settings(requeue=False))[0] == 75 and not machine.requeued()
    JobFolder.of_run(machine.run_dir).ask_to_cancel()
    code, shown = machine.run(code=75)
    assert code == 75 and "cancelled before it began" in shown and not machine.requeued()


@pytest.mark.parametrize("kind", ["show job", "requeue"])
def test_a_controller_that_is_away_when_an_attempt_ends_is_asked_again(machine, kind):
    machine.mark(4, 3)
    machine.away(kind, 3)
    code, shown = machine.run(code=3)
    assert code == 3 and machine.requeued() and len(machine.calls(kind)) == 4, shown
    assert shown.count("scontrol failed: it is tried again for up to 2 s") == 1
    assert "back into the queue" in shown and "not started again" not in shown


@pytest.mark.parametrize(
    ("kind", "told"), [("show job", "did not say what it has of the job"), ("requeue", "did not take it back")]
)
def test_a_controller_that_stays_away_is_not_asked_for_ever(machine, kind, told):
    machine.mark(4, 3)
    machine.away(kind, 1000)
    code, shown = machine.run(code=3)
    assert code == 3 and told in shown.splitlines()[-1] and "Slurm itself ends" not in shown


def test_a_job_that_is_cancelled_while_the_controller_is_away_waits_for_it_no_more(machine, monkeypatch):
    monkeypatch.setattr(script, "AWAY_SECONDS", 300)
    machine.mark(4, 3)
    machine.away("show job", 1000)
    process = machine.start(code=3)
    until(lambda: machine.calls("show job"))
    JobFolder.of_run(machine.run_dir).ask_to_cancel()
    assert process.wait(30) == 3 and not machine.calls("requeue")


def test_a_job_of_an_array_is_named_alone(machine):
    """The number in SLURM_JOB_ID of an array's last job is that of the array: all of them would be requeued."""
    machine.record(RECORD.format("npu:1(IDX:5)"))
    machine.mark(4, 3)
    assert machine.run(code=3, cluster="ascend", task=1)[0] == 3
    assert machine.calls("requeue") == ["scontrol requeue 7_1"]
    assert {call.split()[-1] for call in machine.calls("show job")} == {"7_1"}


def test_progress_earns_another_attempt(machine):
    """As with `launchers.supervise`: only an attempt that got no further than the one before ends the job."""
    machine.mark(5, 3)
    saved = machine.run_dir / "checkpoints" / "step-00000005" / "COMPLETE"
    (machine.fake / "hold").touch()
    process = machine.start(code=3, begun=1)
    until(lambda: (machine.fake / "seen.json").exists())
    saved.parent.mkdir(parents=True)
    saved.touch()
    (machine.fake / "hold").unlink()
    assert process.wait(30) == 3 and machine.requeued()


@pytest.mark.parametrize(
    ("number", "goes_on"), [(signal.SIGUSR1, True), (signal.SIGTERM, True), (signal.SIGUSR2, False)]
)
def test_a_signal_is_passed_on_once_and_the_end_waited_for(machine, number, goes_on):
    machine.mark(4, 75)
    (machine.fake / "hold").touch()
    process = machine.start(code=75)
    until(lambda: (machine.fake / "seen.json").exists())
    for _ in range(2):
        process.send_signal(number)
        time.sleep(0.2)
    assert process.poll() is None, "the run still saves"
    (machine.fake / "hold").unlink()
    shown, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and machine.requeued() is goes_on, shown
    assert (machine.fake / "signals").read_text().split() == ["USR1"], shown


def until(happened: Any) -> None:
    give_up = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.02)


# What is refused before anything is submitted.


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"partition": "a b"}, "launcher.partition"),
        ({"nodelist": "n1 #"}, "launcher.nodelist"),
        ({"account": ""}, "launcher.account"),
        ({"extra": ["--part=x"]}, "set launcher.partition"),
        ({"extra": ["--time=5"]}, "set time_limit_minutes"),
        ({"extra": ["--gres=gpu:1"]}, "set cluster.gres"),
        ({"extra": ["--wrap=x"]}, "--wrap is set by crosstune"),
        ({"extra": ["--comment=a b"]}, "cannot be written in a line of #SBATCH"),
        ({"extra": ["--comment=a\n#SBATCH --hold"]}, "cannot be written in a line of #SBATCH"),
        ({"extra": ["-p x"]}, "--key=value or --key"),
        ({"srun_extra": ["--exp=NONE"]}, "is set by crosstune"),
        ({"export": ["A=1"]}, "launcher.export"),
        ({"signal_lead_seconds": 0}, "launcher.signal_lead_seconds"),
        ({"image": "x.sif"}, "launcher.container=pyxis or apptainer"),
        ({"container": Container.pyxis}, "launcher.image"),
        ({"container": Container.pyxis, "image": "x", "mounts": ["/a,/b"]}, "launcher.mounts"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_by_name(values, told):
    with pytest.raises(ConfigError) as caught:
        settings(**values)
    assert told in caught.value.render()


@pytest.mark.parametrize(
    ("spec", "cfg", "cluster", "told"),
    [
        (replace(SPEC, grace_seconds=180), settings(), ClusterConfig(), "181 or more"),
        (replace(SPEC, time_limit_minutes=3), settings(), ClusterConfig(), "time_limit_minutes"),
        (SPEC, settings(export=["NOT_SET_HERE"]), ClusterConfig(), "NOT_SET_HERE"),
        (SPEC, settings(), ClusterConfig(gres="gpu:8"), "cluster.gres"),
        (replace(SPEC, run_dir="/runs/100%"), settings(), ClusterConfig(), "no percent sign or backslash"),
        (replace(SPEC, run_dir="/runs/a\\b"), settings(), ClusterConfig(), "no percent sign or backslash"),
        (
            replace(SPEC, run_dir="/a:b"),
            settings(container=Container.pyxis, image="x"),
            ClusterConfig(),
            "no comma or colon",
        ),
    ],
)
def test_what_the_job_and_the_cluster_say_against_each_other(spec, cfg, cluster, told):
    [fault] = SlurmLauncher(cfg, cluster).faults(spec)
    assert told in fault.render()


def test_jobs_of_a_sweep_have_one_shape():
    with pytest.raises(ConfigError, match="devices: differs between jobs of one sweep: 4, 8"):
        launcher.check_shape([SPEC, replace(SPEC, devices=4)])


# What Slurm says.


def test_every_word_of_slurm_gives_the_state_that_it_means(tmp_path):
    saved, done = Mark(0, 0, "n1", 1, 0.0, "", 1.0, 75), Mark(0, 0, "n1", 1, 0.0, "", 1.0, 0)
    failed, half = replace(done, exit_code=3), replace(done, ended=None, exit_code=None)
    table: list[tuple[str, list[Mark], State]] = [
        ("PENDING", [], State.pending),
        ("PENDING", [saved], State.preempted),
        ("REQUEUED", [saved], State.preempted),
        ("RUNNING", [half], State.running),
        ("COMPLETING", [done], State.running),
        ("A_STATE_OF_TOMORROW", [half], State.running),
        ("COMPLETED", [done], State.succeeded),
        ("COMPLETED", [half], State.lost),
        ("FAILED", [saved], State.preempted),
        ("FAILED", [failed], State.failed),
        ("FAILED", [], State.failed),
        ("TIMEOUT", [half], State.failed),
        ("TIMEOUT", [saved], State.preempted),
        ("NODE_FAIL", [half], State.failed),
        ("OUT_OF_MEMORY", [half], State.failed),
        ("PREEMPTED", [saved], State.preempted),
        ("CANCELLED", [saved], State.cancelled),
        ("CANCELLED", [done], State.succeeded),
    ]
    for number, (name, marks, expected) in enumerate(table):
        folder = JobFolder.of_run(tmp_path / str(number))
        for mark in marks:
            folder.mark(mark)
        report = report_of(JobState(name), folder)
        assert state_of(report, folder.marks(), 1, cancelled=False) is expected, name
    assert report_of(None, folder).word is Word.unknown
    again = JobFolder.of_run(tmp_path / "again")
    again.mark(saved)
    for state, first in ((JobState("NODE_FAIL", restarts=1), 0), (JobState("NODE_FAIL"), 1)):
        assert report_of(state, again, attempt=first).word is Word.failed, "an attempt before this one had saved"
    again.mark(replace(saved, attempt=1))
    assert report_of(JobState("NODE_FAIL"), again, attempt=1).word is Word.ended
    assert state_of(report_of(None, folder), [], 1, cancelled=False) is State.lost


def test_why_a_job_that_is_over_was_not_started_again(tmp_path):
    folder, output = JobFolder.of_run(tmp_path), tmp_path / "slurm-7.out"
    noise = b"0: \xff some words of a machine: crosstune: no\n"
    output.write_bytes(b"crosstune: attempt 0 on n1\n" + noise + b"crosstune: not started again: so it is\n" + noise)
    said = "; crosstune: not started again: so it is"
    for name in ("FAILED", "TIMEOUT", "CANCELLED"):
        assert report_of(JobState(name), folder, output).detail.endswith(said), name
    assert report_of(None, folder, output).detail.endswith(said)
    for name in ("RUNNING", "PENDING", "COMPLETED"):
        assert report_of(JobState(name), folder, output).detail == f"job 7: {name}", name
    output.write_bytes(output.read_bytes() + b"x\n" * LAST_BYTES)
    assert report_of(JobState("FAILED"), folder, output).detail == "job 7: FAILED", "the end alone is read"


def report_of(state: JobState | None, folder: JobFolder, output: Path | None = None, attempt: int = 0) -> Any:
    slurm = SlurmLauncher(settings(), ClusterConfig())
    handle = {"job_id": "7", "cluster": "", "name": "demo", "output": str(output or "")}
    job = Job(replace(SPEC, nodes=1), 0.0, handle, attempt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "state_of_job", lambda *_: state)
        return slurm.report(job, folder)


ASKED = (
    "JobId=7 ArrayJobId=6 ArrayTaskId=1 JobName=demo UserId=me(1000) GroupId=me(1000) MCS_label=N/A QOS=(null) "
    "JobState=PENDING Reason=launch failed requeued held Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
    "WorkDir=/runs/a JobState=RUNNING b StdOut=/x"
)


def test_a_job_is_read_by_its_name_and_its_first_words():
    state = parse_job(ASKED, "demo")
    assert state == JobState("PENDING", "launch failed requeued held", 2)
    assert "scontrol release" in str(state) and "started again 2 time(s)" in str(state)
    assert parse_job(ASKED, "another") is None, "its number was given out anew"
    assert parse_job("", "demo") is None
    told = "other|COMPLETED|None\ndemo|NODE_FAIL|None\ndemo|CANCELLED by 1000|None\n"
    assert parse_accounting(told, "demo") == JobState("CANCELLED", "None")
    assert parse_accounting("", "demo") is None


@pytest.mark.parametrize(
    ("said", "key"),
    [
        (
            "Batch job submission failed: Requested node configuration is not available",
            "nodes, nproc, cpus, memory_gib",
        ),
        ("Batch job submission failed: Node count specification invalid", "nodes"),
        ("Invalid partition specified: x\nsbatch: error: Batch job submission failed: Invalid", "launcher.partition"),
        ("Batch job submission failed: Invalid account or account/partition combination specified", "launcher.account"),
        ("Batch job submission failed: Invalid generic resource (gres) specification", "cluster.gres"),
        ("Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)", "time_limit"),
        ("Batch job submission failed: A word of tomorrow", "launcher=slurm"),
    ],
)
def test_a_refusal_names_the_key_and_keeps_slurms_words(said, key):
    fault: CrosstuneError = refused(f"sbatch: error: {said}\n")
    assert fault.where.startswith(key) and said.rpartition("failed: ")[2] in fault.found


def test_no_secret_and_no_variable_is_in_what_is_rendered(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    for spec, cfg, cluster in CASES.values():
        assert "hunter2" not in SlurmLauncher(cfg, cluster_of(cluster)).render(spec, 0)[NAME]


def test_the_shipped_option_is_the_schema():
    cfg: LaunchConfig = compose("launch", ["launcher=slurm", "launcher.partition=p", "launcher.container=none"])
    assert cfg.launcher == settings(partition="p")
