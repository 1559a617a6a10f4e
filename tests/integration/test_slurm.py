"""launcher=slurm on a real cluster of two nodes: starts, logs, cancel, preemption, requeue, sweeps, limits, lost nodes.

Whatever befell a run, its weights are those of a run in peace, bit by bit. No time is asserted: when Slurm signals,
preempts or starts again is its own affair.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from launchers.job import JobFolder
from tests.command import crosstune, final_weights, metrics_of, write_uneven_records
from tests.slurm_cluster import SlurmCluster
from tests.tiny import save_tiny_model
from train.checkpoint.layout import checkpoints
from train.run_folder import RunFolder

pytestmark = pytest.mark.distributed
ROOT = str(Path(__file__).parents[2])
STEPS = 100
ENDLESS = 100_000
SLOWLY = "eval_every=1"
"""Leaves the weights as they are, and the time to do something to the run."""
SECRET = "hunter2, 'quoted' \"twice\" $(touch pwned)\nand a second line"


class Site:
    """A user of a cluster: the commands that they type, and where their runs lie."""

    def __init__(self, slurm: SlurmCluster, home: Path) -> None:
        self.slurm, self.home = slurm, home
        # Its "nodes" share one network with all else that runs here; ports above are given out to anybody.
        self.ports = iter(range(24000, 29000, 20))

    @property
    def variables(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.slurm.config), "PYTHONPATH": ROOT, "TOKEN": SECRET, "OWN": "stays here"}

    def crosstune(self, *words: str, code: int = 0, **env: str) -> str:
        return crosstune(*words, code=code, cwd=self.home, **{**self.variables, **env})

    def words(self, *more: str) -> list[str]:
        """Of a run of two ranks."""
        paths = [f"model.path={self.home / 'model'}", f"dataset.path={self.home / 'data.jsonl'}"]
        sizes = ["batch_tokens=256", "micro_batch_tokens=128", "max_length=128", f"max_steps={STEPS}"]
        data = ["dataset.validation_fraction=0.1", f"cache_dir={self.home / 'cache'}", "checkpoint.every=0"]
        return [*paths, *sizes, *data, "device=cpu", "model.precision=fp32", "device.threads=1", *more]

    def launch_words(self, *more: str, multirun: bool = False) -> list[str]:
        """Of the command that launches it on two nodes."""
        slurm = ["launcher=slurm", "launcher.export=[PYTHONPATH]", "launcher.poll_seconds=1", "cluster.gres=npu"]
        times = ["guard.grace_seconds=30", "launcher.signal_lead_seconds=40", f"master_port={next(self.ports)}"]
        shape = ["nodes=2", "nproc=1", "cluster.visible_devices=ASCEND_RT_VISIBLE_DEVICES"]
        option = ["--multirun"] if multirun else []
        return ["launch", "train", *option, *slurm, *times, *shape, *self.words(*more)]

    def launched(self, *more: str, code: int = 0, multirun: bool = False) -> str:
        """Output of that command."""
        return self.crosstune(*self.launch_words(*more, multirun=multirun), code=code)

    def status(self, run: Path) -> dict[str, object]:
        return dict(json.loads(self.crosstune("status", "--json", str(run)).splitlines()[-1]))

    def ended(self, run: Path) -> dict[str, object]:
        """Its status once Slurm has it no more in its queue."""
        job = self.job_id(run)
        until(lambda: not self.slurm.run("squeue", "-h", "-j", job).strip(), lambda: self.all_words(run))
        return self.status(run)

    def own_words(self, run: Path) -> str:
        """What the batch script said."""
        return "\n".join(file.read_text() for file in (run / "launch").glob("slurm-*.out"))

    def all_words(self, run: Path) -> str:
        return f"{self.own_words(run)}\n{self.slurm.logs()}"

    def job_id(self, run: Path) -> str:
        return str(JobFolder.of_run(run).read().handle["job_id"])

    def forget(self, run: Path) -> str:
        """Leaves a job as a launch does that got no answer; its number."""
        number, folder = self.job_id(run), JobFolder.of_run(run)
        folder.write(replace(folder.read(), handle={}))
        return number

    def wait_for_steps(self, run: Path, count: int = 2) -> None:
        """Returns while it runs."""
        job = self.job_id(run)
        until(
            lambda: steps_of(run)[count - 1 :] or self.slurm.field(job, "JobState") not in ("PENDING", "RUNNING"),
            lambda: self.all_words(run),
        )
        assert self.slurm.field(job, "JobState") == "RUNNING", self.all_words(run)

    def wait_for_requeue(self, run: Path, count: int = 1) -> None:
        """Until it waits for its nodes once more."""
        job = self.job_id(run)
        until(lambda: self.slurm.field(job, "Restarts") == str(count), lambda: self.all_words(run))

    def take_the_nodes(self) -> None:
        """Another user's job, of a higher partition."""
        urgent = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
        assert "Submitted" in self.slurm.run("sbatch", *urgent)


def until(happened: Callable[[], object], why_not: Callable[[], str], seconds: float = 400) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, why_not()
        time.sleep(0.3)


def steps_of(run: Path) -> list[int]:
    return [int(line["step"]) for line in metrics_of(run)] if RunFolder(run).metrics.exists() else []


def saved_steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(RunFolder(run).checkpoints)]


@pytest.fixture(scope="module")
def site(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return made_site(slurm, tmp_path_factory.mktemp("home"))


def made_site(slurm: SlurmCluster, home: Path) -> Site:
    save_tiny_model(home / "model")
    write_uneven_records(home / "data.jsonl")
    site = Site(slurm, home)
    site.crosstune(
        "prep", *(word for word in site.words() if word.startswith(("model.path", "data", "cache", "max_l")))
    )
    return site


@pytest.fixture(scope="module")
def in_peace(site: Site) -> dict[str, torch.Tensor]:
    """Weights of a run that no scheduler knows of."""
    run = site.home / "in-peace"
    site.crosstune("train", *site.words(f"run_dir={run}", "nproc=2"))
    return final_weights(run)


@pytest.fixture(scope="module")
def preempted(site: Site) -> Path:
    """A run that has made way for another job, and waits in the queue for its nodes."""
    run = site.home / "preempted"
    site.launched(f"run_dir={run}", SLOWLY)
    site.wait_for_steps(run)
    site.take_the_nodes()
    site.wait_for_requeue(run)
    return run


def same(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_preempted_run_saves_and_waits_in_the_queue(site, preempted):
    [step] = saved_steps(preempted)
    assert steps_of(preempted) == list(range(1, step + 1)) and step < STEPS
    assert site.status(preempted)["state"] == "preempted"
    assert "crosstune: told to stop: the run saves" in site.own_words(preempted)
    assert [mark.exit_code for mark in JobFolder.of_run(preempted).marks(0)] == [75, 75]


def test_two_machines_whatever_the_paths_and_the_environment_hold(site, in_peace):
    run = site.home / "run of 'mine' \"x\" $(touch pwned); `touch pwned` #\nx"
    look = site.home / "what is $(touch pwned) here.sh"
    look.write_text('env -0 > "$(dirname "${BASH_SOURCE[0]}")/seen-$SLURM_PROCID"\n')
    quoted = str(run).replace("'", "\\'")
    site.launched(
        f"run_dir='{quoted}'",
        f"cluster.setup=['{look}']",
        "secrets=[TOKEN]",
        "cluster.devices_per_node=3",
    )
    number = site.forget(run)
    assert site.status(run)["state"] in ("pending", "running") and site.job_id(run) == number
    shown = site.crosstune("logs", "-f", str(run))
    assert f"step {STEPS}/{STEPS}" in shown and "Traceback" not in shown, shown
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)
    assert "differ" not in site.crosstune("status", str(run))
    assert same(final_weights(run), in_peace)
    for number in range(2):
        words = (site.home / f"seen-{number}").read_bytes().decode().split("\0")
        seen = dict(word.split("=", 1) for word in words if word)
        devices = {int(device) for device in seen["ASCEND_RT_VISIBLE_DEVICES"].split(",")}  # another run may have some
        assert len(devices) == 3 and devices <= set(range(8)) and seen["TOKEN"] == SECRET
        assert seen["SLURMD_NODENAME"] == f"n{number + 1}" and "OWN" not in seen
    assert not list(site.home.rglob("pwned"))
    written = [file for file in run.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]
    assert not written


@pytest.mark.slow
def test_cancel_saves_and_the_job_ends_for_good(site):
    run = site.home / "cancelled"
    site.launched(f"run_dir={run}", f"max_steps={ENDLESS}")
    site.wait_for_steps(run)
    site.crosstune("cancel", str(run))
    assert site.ended(run)["state"] == "cancelled", site.all_words(run)
    [step] = saved_steps(run)
    assert steps_of(run) == list(range(1, step + 1))
    assert site.slurm.field(site.job_id(run), "Restarts") == "0"
    assert "the job has ended already" in site.crosstune("cancel", str(run))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cluster.devices_per_node=9"], "nodes, nproc, cpus, memory_gib: Slurm refuses the job: "),
        (["nodes=3"], "nodes.*: Slurm refuses the job: "),
        (["launcher.partition=nowhere"], "launcher.partition: Slurm refuses the job: "),
        (["cluster.gres=fpga"], "cluster.gres: Slurm refuses the job: "),
        (["time_limit_minutes=61"], "time_limit_minutes: Slurm refuses the job: "),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_and_nothing_is_left(site, words, told):
    run = site.home / "refused"
    shown = site.launched(f"run_dir={run}", *words, code=2)
    assert re.search(f"^{told}", shown, re.MULTILINE) and "remedy:" in shown, shown
    assert not run.exists()


def test_what_never_started_is_told_in_slurms_own_words(site):
    run = site.home / "no-python"
    site.launched(f"run_dir={run}", "nodes=1", "python=/no/such/python", "restarts=0")
    failed = site.ended(run)
    assert failed["state"] == "failed" and "FAILED (NonZeroExitCode)" in str(failed["detail"])
    assert str(failed["detail"]).endswith("; crosstune: no restart is left (restarts=0)")
    assert "/no/such/python: No such file or directory" in site.crosstune("logs", str(run))


@pytest.mark.slow
def test_a_sweep_is_one_array_of_jobs_with_folders_of_their_own(site, in_peace):
    sweep = site.home / "sweep of $(touch pwned) two"
    more = [f"run_dir='{sweep}'", f"max_steps=3,{STEPS}", "launcher.array_parallel=2"]
    site.launched(*more, multirun=True)
    runs = [sweep / "000", sweep / "001"]
    numbers = [site.job_id(run) for run in runs]
    assert [number.partition("_")[2] for number in numbers] == ["0", "1"]
    assert len({number.partition("_")[0] for number in numbers}) == 1
    assert [site.forget(run) for run in runs] == numbers
    assert all(site.status(run)["state"] in ("pending", "running") for run in runs)
    assert [site.job_id(run) for run in runs] == numbers
    for run in runs:
        assert site.ended(run)["state"] == "succeeded", site.all_words(sweep)
    assert steps_of(runs[0]) == [1, 2, 3] and same(final_weights(runs[1]), in_peace)


def test_the_preempted_run_goes_on_and_ends_like_one_in_peace(site, preempted, in_peace):
    """Last of the quick ones: Slurm lets a job that was requeued wait for half a minute."""
    done = site.ended(preempted)
    assert done["state"] == "succeeded" and done["attempt"] == 1
    assert steps_of(preempted) == list(range(1, STEPS + 1))
    assert same(final_weights(preempted), in_peace)


@pytest.mark.slow
def test_a_run_that_meets_its_time_limit_saves_before_and_goes_on(site):
    """Slurm looks at limits every half minute, and counts them in minutes: the limit is drawn near once it runs."""
    run, peaceful, long = site.home / "limited", site.home / "in-peace-for-long", "max_steps=600"
    site.launched(f"run_dir={run}", SLOWLY, long, "time_limit_minutes=30")
    site.wait_for_steps(run)
    site.slurm.run("scontrol", "update", f"JobId={site.job_id(run)}", "EndTime=now+75seconds")
    site.wait_for_requeue(run)
    assert [mark.exit_code for mark in JobFolder.of_run(run).marks(0)] == [75, 75], site.all_words(run)
    assert site.status(run)["state"] in ("preempted", "running")
    site.crosstune("train", *site.words(f"run_dir={peaceful}", "nproc=2", long))
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)
    assert steps_of(run) == list(range(1, 601)) and same(final_weights(run), final_weights(peaceful))


@pytest.mark.slow
def test_a_cancelled_run_is_resumed_as_a_job_of_its_own(site, in_peace):
    run = site.home / "resumed"
    site.launched(f"run_dir={run}", SLOWLY, "checkpoint.every=1", "checkpoint.mode=synchronous")
    site.wait_for_steps(run)
    site.crosstune("cancel", str(run))
    assert site.ended(run)["state"] == "cancelled", site.all_words(run)
    first = site.job_id(run)
    site.crosstune("resume", str(run))
    assert site.job_id(run) != first
    done = site.ended(run)
    assert (done["state"], done["attempt"]) == ("succeeded", 1), site.all_words(run)
    assert same(final_weights(run), in_peace)


@pytest.mark.slow
def test_a_node_that_dies_costs_what_was_not_saved(site, in_peace):
    run = site.home / "lost-node"
    site.launched(f"run_dir={run}", SLOWLY, "checkpoint.every=5")
    site.wait_for_steps(run, 6)
    site.slurm.kill_node("n2")
    try:
        site.wait_for_requeue(run)
    finally:
        site.slurm.start_node("n2")
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)
    assert site.status(run)["attempt"] == 1 and same(final_weights(run), in_peace)


@pytest.mark.slow
def test_a_killed_rank_fails_the_attempt_on_all_machines_and_the_next_goes_on(site, in_peace):
    run = site.home / "killed-rank"
    site.launched(f"run_dir={run}", SLOWLY, "checkpoint.every=5")
    site.wait_for_steps(run, 6)
    [rank] = (one for one in site.slurm.processes_of("n2") if "RANK" in one.environ())
    rank.kill()
    site.wait_for_requeue(run)
    told = site.crosstune("status", str(run))
    assert "rank 1" in told or "SIGKILL" in told, told
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)
    assert same(final_weights(run), in_peace)


@pytest.mark.slow
def test_a_job_that_slurm_takes_without_an_answer_is_adopted(site):
    run = site.home / "answered late"
    with ThreadPoolExecutor(1) as beside:
        with site.slurm.silent_controller():
            launch = beside.submit(site.launched, f"run_dir='{run}'", "max_steps=2")
            until((run / "launch" / "job.json").exists, launch.result)
            time.sleep(15)  # sbatch waits for 10 s, Slurm's MessageTimeout
        shown = launch.result()
    assert "Slurm is asked whether it has the job" in shown and "submitted" in shown, shown
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)


@pytest.mark.slow
def test_ctrl_c_while_slurm_takes_a_job_costs_neither_the_job_nor_its_folder(site):
    """As in a terminal: all processes of the command's group are signalled, and sbatch would end at once."""
    run = site.home / "interrupted"
    command = [sys.executable, "-P", "-m", "launchers.cli", *site.launch_words(f"run_dir='{run}'", "max_steps=2")]
    with site.slurm.silent_controller():
        launch = psutil.Popen(
            command,
            cwd=site.home,
            env=os.environ | site.variables,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        until(lambda: "sbatch" in [child.name() for child in launch.children()], lambda: "no sbatch")
        time.sleep(1)  # until it has sent what it has
        os.killpg(launch.pid, signal.SIGINT)
        time.sleep(1)
    shown, _ = launch.communicate(timeout=100)
    assert launch.returncode == 130 and "stops as soon as it is known" in shown and "submitted" in shown, shown
    assert "Slurm is asked" not in shown, "sbatch had the answer itself"
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)


@pytest.mark.slow
def test_a_controller_that_is_away_when_an_attempt_fails_does_not_end_the_job(site, in_peace):
    run = site.home / "controller-away"
    site.launched(f"run_dir={run}", SLOWLY, "checkpoint.every=5")
    site.wait_for_steps(run, 6)
    site.slurm.stop_controller()
    try:
        [rank] = (one for one in site.slurm.processes_of("n2") if "RANK" in one.environ())
        rank.kill()
        until(lambda: "scontrol failed: it is tried again" in site.own_words(run), lambda: site.all_words(run))
    finally:
        site.slurm.start_controller()
    site.wait_for_requeue(run)
    assert site.ended(run)["state"] == "succeeded", site.all_words(run)
    assert same(final_weights(run), in_peace)


@pytest.mark.slow
def test_a_job_of_an_array_is_started_again_alone_and_has_its_own_devices(site, in_peace):
    """The last one's SLURM_JOB_ID is the number of the whole array."""
    sweep, look = site.home / "sweep of which one fails", site.home / "devices.sh"
    look.write_text('echo "$ASCEND_RT_VISIBLE_DEVICES" >> "${BASH_SOURCE[0]}.$SLURM_ARRAY_TASK_ID.$SLURM_PROCID"\n')
    more = [f"run_dir='{sweep}'", f"cluster.setup=['{look}']", SLOWLY, "checkpoint.every=5"]
    site.launched(*more, f"max_steps={STEPS},{STEPS + 1}", multirun=True)
    runs = [sweep / "000", sweep / "001"]
    site.wait_for_steps(runs[1], 6)
    ranks = [one for one in site.slurm.processes_of("n1") if "RANK" in one.environ()]
    [last] = (one for one in ranks if one.environ()["SLURM_ARRAY_TASK_ID"] == "1")
    last.kill()
    site.wait_for_requeue(runs[1])
    for run in runs:
        assert site.ended(run)["state"] == "succeeded", site.all_words(sweep)
    assert [site.status(run)["attempt"] for run in runs] == [0, 1] and same(final_weights(runs[0]), in_peace)
    seen = [(site.home / f"devices.sh.{task}.0").read_text().split() for task in range(2)]
    first = [devices[0] for devices in seen]  # while both ran
    assert sorted(first) == ["0", "1"] and [len(devices) for devices in seen] == [1, 2], seen


@pytest.mark.slow
@pytest.mark.parametrize("by", ["crosstune cancel --hard", "scancel"])
def test_a_job_that_is_ended_at_once_leaves_nobody_and_stays_ended(site, by):
    run = site.home / by.replace(" ", "-")
    site.launched(f"run_dir={run}", f"max_steps={ENDLESS}")
    site.wait_for_steps(run)
    if by == "scancel":
        site.slurm.run("scancel", site.job_id(run))
    else:
        site.crosstune("cancel", "--hard", str(run))
    assert site.ended(run)["state"] == "cancelled", site.all_words(run)
    assert site.slurm.field(site.job_id(run), "Restarts") == "0"
    until(lambda: not site.slurm.processes_of("n1") + site.slurm.processes_of("n2"), lambda: "somebody is left")


@pytest.mark.slow
def test_a_cluster_that_sends_no_signal_of_the_users_at_a_preemption(tmp_path):
    """Slurm's default: SIGTERM to every process of the tasks, none to the batch script."""
    cluster = SlurmCluster(tmp_path / "slurm")
    try:
        cluster.start(controller="idle_on_node_suspend")
        site = made_site(cluster, tmp_path / "home")
        run = site.home / "preempted"
        site.launched(f"run_dir={run}", SLOWLY)
        site.wait_for_steps(run)
        site.take_the_nodes()
        site.wait_for_requeue(run)
        assert [mark.exit_code for mark in JobFolder.of_run(run).marks(0)] == [75, 75]
        [step] = saved_steps(run)
        assert site.ended(run)["state"] == "succeeded", site.all_words(run)
        assert steps_of(run) == list(range(1, STEPS + 1)) and step < STEPS
    finally:
        cluster.stop()
