"""launcher=slurm: a controller that answers late, or not at all, costs neither a job nor its whereabouts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import ConfigError, RunFailedError
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_slurm import SlurmLauncherConfig
from launchers.base import UnknownOutcomeError
from launchers.job import Job, JobFolder, Mark, Word
from launchers.slurm import SlurmLauncher, commands, submission
from launchers.slurm.submission import clusters_of
from tests.unit.test_slurm_render import SPEC

SBATCH = """#!/bin/bash
echo "sbatch $*" >> "$FAKE/calls"
[ ! -e "$FAKE/takes" ] || pwd -P > "$FAKE/queue"
[ ! -e "$FAKE/then" ] || . "$FAKE/then"
cat "$FAKE/says" >&2
[ -s "$FAKE/says" ] && exit 1
echo 17
"""
OTHERS = "/somebody/else's/run"
SQUEUE = f"""#!/bin/bash
echo "squeue $*" >> "$FAKE/calls"
if [ -s "$FAKE/away" ]; then
    sed -i 1d "$FAKE/away"
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
printf '\\x1e%s %s\\x1e\\n' 16 "{OTHERS}"
[ ! -e "$FAKE/queue" ] || printf '\\x1e%s %s\\x1e\\n' 17 "$(cat "$FAKE/queue")"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >> "$FAKE/calls"
[ ! -s "$FAKE/away" ] || exit 1
cat "$FAKE/record"
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >> "$FAKE/calls"
"""
LATE = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n"
NO_ANSWER = {
    "it hangs": "exec sleep 60",
    "the controller is late": f"echo '{LATE.strip()}' >&2; exit 1",
    "it is killed": "kill -KILL $$",
    "it is killed in a script around it": "echo Terminated >&2; exit 143",
    "it fails without a word": "exit 1",
}
"""How sbatch ends, in shell, without a word of what became of the job."""
CTRL_C = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever this test was started with
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_slurm import SlurmLauncherConfig
from launchers.job import JobFolder
from launchers.slurm import SlurmLauncher
from launchers.supervise import deferred_stops
folder = JobFolder(Path(sys.argv[1]))
with deferred_stops():
    handle = SlurmLauncher(SlurmLauncherConfig("x"), ClusterConfig()).submit(folder.read(), folder)
    print(handle["job_id"], flush=True)
"""
"""A submission as that of `crosstune launch`, in a process that has a terminal's group for itself."""


class Slurm:
    """Slurm's commands, which do as the files in a folder say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
            (path / name).write_text(text)
            (path / name).chmod(0o755)
        self.says("")

    def says(self, text: str, *, takes: bool = False, then: str = "") -> None:
        """What sbatch does next; `then` in shell, once the job is taken or not."""
        (self.path / "says").write_text(text)
        (self.path / "then").write_text(then)
        (self.path / "takes").touch() if takes else (self.path / "takes").unlink(missing_ok=True)

    def away(self, questions: int) -> None:
        """So many questions find no controller."""
        (self.path / "away").write_text("away\n" * questions)

    def record(self, state: str, job: str = "JobId=17", name: str = SPEC.name) -> None:
        """Of scontrol."""
        (self.path / "record").write_text(f"{job} JobName={name} JobState={state} Reason=None Dependency=(null) \n")

    def calls(self) -> list[str]:
        return (self.path / "calls").read_text().rstrip("\n").split("\n")


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    """With waits that are short."""
    path = tmp_path / "fake"
    path.mkdir()
    monkeypatch.setenv("PATH", f"{path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(path))
    monkeypatch.setattr(commands, "ANSWER_SECONDS", 1)
    for name, seconds in (("LOOK_UP_SECONDS", 0.3), ("ABSENT_SECONDS", 0.2), ("PAUSE_SECONDS", 0.05)):
        monkeypatch.setattr(submission, name, seconds)
    return Slurm(path)


@pytest.fixture
def launcher() -> SlurmLauncher:
    return SlurmLauncher(SlurmLauncherConfig("launchers.slurm.SlurmLauncher"), ClusterConfig())


def written(path: Path, name: str = SPEC.name) -> tuple[Job, JobFolder]:
    """A job as `crosstune launch` leaves it before it is submitted."""
    folder = JobFolder.of_run(path)
    job = Job(replace(SPEC, name=name, run_dir=str(path)), 0.0)
    folder.write(job)
    return job, folder


@pytest.fixture
def job(tmp_path) -> tuple[Job, JobFolder]:
    return written(tmp_path / "run \nof mine")


def handle(folder: Path, task: str = "") -> dict[str, str]:
    return {"job_id": f"17{task}", "cluster": "", "name": SPEC.name, "output": str(folder / f"slurm-17{task}.out")}


@pytest.mark.parametrize(("how", "away"), [("it hangs", 3), *((how, 0) for how in NO_ANSWER)])
def test_a_job_that_was_taken_without_an_answer_is_adopted(slurm, launcher, job, how, away):
    slurm.says("", takes=True, then=NO_ANSWER[how])
    slurm.away(away)
    assert launcher.submit(*job) == handle(job[1].path)
    assert [call.split()[0] for call in slurm.calls()] == ["sbatch", *["squeue"] * (away + 1)]


@pytest.mark.parametrize("how", NO_ANSWER)
def test_a_job_that_was_not_taken_is_refused_once_slurm_says_so(slurm, launcher, job, how):
    slurm.says("", then=NO_ANSWER[how])
    with pytest.raises(RunFailedError, match="does not have the job") as caught:
        launcher.submit(*job)
    assert not isinstance(caught.value, UnknownOutcomeError)
    asked = [call for call in slurm.calls() if call.startswith("squeue")]
    assert len(asked) > 1, "the submission may be under way yet"


def test_a_slurm_that_says_nothing_leaves_the_outcome_open(slurm, launcher, job):
    slurm.says(LATE, takes=True)
    slurm.away(10_000)
    with pytest.raises(UnknownOutcomeError, match="crosstune status"):
        launcher.submit(*job)


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("Batch job submission failed: Unable to contact slurm controller (connect failure)", RunFailedError),
        ("Batch job submission failed: Invalid partition specified", ConfigError),
    ],
)
def test_what_never_reached_slurm_and_what_it_refused_is_told_at_once(slurm, launcher, job, says, kind):
    slurm.says(f"sbatch: error: {says}\n")
    with pytest.raises(kind) as caught:
        launcher.submit(*job)
    assert not isinstance(caught.value, UnknownOutcomeError) and len(slurm.calls()) == 1


def test_ctrl_c_in_a_terminal_does_not_reach_sbatch(slurm, job):
    """The terminal signals all processes of the command's group; that of sbatch is another one."""
    slurm.says("", then='touch "$FAKE/begun"; sleep 1')
    command = [sys.executable, "-P", "-c", CTRL_C, str(job[1].path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    while not (slurm.path / "begun").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    shown, complaints = process.communicate(timeout=60)
    assert shown == "17\n" and [call.split()[0] for call in slurm.calls()] == ["sbatch"], complaints
    assert process.returncode == -signal.SIGINT and "stops as soon as it is known" in complaints, "it was heard, too"


ASKS: list[Callable[[SlurmLauncher, Job, JobFolder], object]] = [
    lambda launcher, job, folder: launcher.report(job, folder),
    lambda launcher, job, folder: launcher.is_over(job, folder),
    lambda launcher, job, folder: launcher.cancel(job, folder, hard=False),
    lambda launcher, job, folder: launcher.cancel(job, folder, hard=True),
]


@pytest.mark.parametrize("ask", ASKS)
def test_a_slurm_that_does_not_answer_is_not_a_job_that_has_ended(slurm, launcher, job, ask):
    slurm.away(10_000)
    with pytest.raises(RunFailedError):
        ask(launcher, *job)


def test_a_job_without_a_number_is_found_by_its_name_and_its_folder(slurm, launcher, job):
    slurm.says(LATE, takes=True)
    slurm.away(10_000)
    with pytest.raises(UnknownOutcomeError):
        launcher.submit(*job)
    slurm.away(0)
    slurm.record("RUNNING")
    report = launcher.report(*job)
    assert (report.word, report.detail) == (Word.running, "job 17: RUNNING")
    assert job[1].read().handle == handle(job[1].path), "it is asked for once: Slurm forgets what has ended"
    job[1].write(job[0])
    launcher.cancel(*job, hard=True)
    assert slurm.calls()[-1] == "scancel 17"


def test_a_job_that_slurm_does_not_have_was_not_submitted(slurm, launcher, job):
    report = launcher.report(*job)
    assert (report.word, report.detail) == (Word.unknown, "it was not submitted") and launcher.is_over(*job)
    launcher.cancel(*job, hard=True)
    assert not [call for call in slurm.calls() if call.startswith("scancel")]
    job[1].mark(Mark(0, 0, "n1", 1, 0.0, "", 1.0, 0))
    assert "any more" in launcher.report(*job).detail


@pytest.fixture
def sweep(tmp_path) -> list[tuple[Job, JobFolder]]:
    return [written(tmp_path / "sweep" / f"{number:03}", name) for number, name in enumerate((SPEC.name, "second"))]


def test_an_array_that_was_taken_without_an_answer_is_adopted(slurm, launcher, sweep, tmp_path):
    slurm.says(LATE, takes=True)
    assert launcher.submit_all(sweep) == [handle(tmp_path / "sweep", f"_{task}") for task in range(2)]


def test_a_job_of_an_array_whose_outcome_was_open_is_found_by_the_arrays_name(slurm, launcher, sweep, tmp_path):
    slurm.says(LATE, takes=True)
    slurm.away(10_000)
    with pytest.raises(UnknownOutcomeError):
        launcher.submit_all(sweep)
    assert (tmp_path / "sweep" / "sweep.sbatch").is_file()
    slurm.away(0)
    slurm.record("PENDING", "JobId=18 ArrayJobId=17 ArrayTaskId=1")
    assert launcher.report(*sweep[1]).word is Word.pending
    assert slurm.calls()[-1] == "scontrol --oneliner show job 17_1"
    # Submitted by itself since: under its own name, not that of the array.
    again = replace(sweep[1][0], spec=replace(sweep[1][0].spec, name="resumed"))
    assert launcher.report(again, sweep[1][1]).word is Word.unknown


def test_an_array_that_was_refused_leaves_nothing(slurm, launcher, sweep, tmp_path):
    slurm.says(LATE)
    with pytest.raises(RunFailedError):
        launcher.submit_all(sweep)
    assert not (tmp_path / "sweep" / "sweep.sbatch").exists()


def test_a_log_that_is_followed_asks_a_controller_that_is_away_no_more_often(slurm, launcher, job):
    known = replace(job[0], handle=handle(job[1].path))
    slurm.away(10_000)
    with pytest.raises(RunFailedError):
        launcher.is_over(known, job[1])
    assert not launcher.is_over(known, job[1]) and len(slurm.calls()) == 1


def test_of_several_clusters_the_one_that_took_the_job_is_told(slurm, job):
    header = "printf 'CLUSTER: first\\n'\n"
    other = "printf 'CLUSTER: second\\n'\n[ ! -e"
    (slurm.path / "squeue").write_text(SQUEUE.replace("printf", f"{header}printf", 1).replace("[ ! -e", other, 1))
    slurm.says(LATE, takes=True)
    options = ["--clusters=first,second", "--comment=x"]
    both = SlurmLauncher(SlurmLauncherConfig("x", extra=options), ClusterConfig())
    assert both.submit(*job)["cluster"] == "second"
    assert "--clusters=first,second" in slurm.calls()[-1]
    assert clusters_of(["--cluster-constraint=x", "--comment=b"]) == ""
