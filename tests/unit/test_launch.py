"""What all launchers share: words, the spec, the job's folder and state, the supervisor, a machine's part."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs.compose import compose, load_resolved
from configs.errors import CheckpointError, ConfigError, ErrorGroup, RunFailedError, StorageError
from configs.schema.launch import LaunchConfig
from launchers import launch, launch_words, node, status, submit
from launchers.base import Launcher, UnknownOutcomeError, tail, with_setup
from launchers.command_line import parse
from launchers.failure import from_json
from launchers.job import Job, JobFolder, Mark, Report, State, Word, root_cause, state_of
from launchers.node import AUTO, copied_to, place, what_ranks_see
from launchers.spec import ATTEMPT, MASTER, NODE, LaunchSpec, drawn_port, environment_hash, make_spec
from launchers.supervise import StopSignals, supervise
from launchers.sweep import configs_of, with_own_port
from train.checkpoint.together import LostContactError

NASTY = "a b'c\"d$(touch /tmp/never)`x`\n\\e;&é"


def options(*words: str) -> LaunchConfig:
    found: LaunchConfig = compose("launch", list(words))
    return found


def spec(run_dir: Path = Path("/runs/r"), **changes: Any) -> LaunchSpec:
    cfg = compose("train", ["model.path=m", "dataset.path=d", f"run_dir={run_dir}", "nproc=2", "name='My Job: 1'"])
    made = make_spec("train", cfg, options("nodes=2"), run_dir / "launch" / "request.yaml", "20260101-000000")
    return replace(made, **changes)


def mark(at: int, code: int | None = None, *, fault: Mapping[str, Any] | None = None, attempt: int = 0) -> Mark:
    ended = None if code is None else 20.0
    return Mark(at, attempt, f"n{at}", 1, 10.0, "e", ended, code, dict(fault) if fault else None)


def fault(kind: str, time: float, rank: int | None = 0) -> dict[str, Any]:
    error = {"kind": kind, "where": "w", "found": f"{kind} of rank {rank}", "allowed": None, "remedy": None}
    return {"exit_code": 3, "errors": [error], "time": time, "rank": rank}


def test_words_of_the_launch_are_told_from_those_of_the_step() -> None:
    words = ["nodes=2", "launcher.x=1", "cluster=ascend", "model.path=m", "+environment.A=1", "nproc=8", "~secrets"]
    assert launch_words.split_words(words) == (
        ["nodes=2", "launcher.x=1", "cluster=ascend", "+environment.A=1", "~secrets"],
        ["model.path=m", "nproc=8"],
    )


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["nodes=0"], "nodes"),
        (["environment.RANK=1"], "environment.RANK"),
        (["environment.PET_NNODES=1"], "environment.PET_NNODES"),
        (["secrets=[TOKEN=abc]"], "secrets"),
        (["master_port=80"], "master_port"),
        (["+cluster.environment={1A: x}"], "cluster.environment"),
    ],
)
def test_what_a_launch_cannot_have_is_named(words: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options(*words)
    assert caught.value.where == where


def test_options_of_one_command_are_refused_by_others() -> None:
    assert parse(["logs", "-f", "--node", "3", "RUN"]).node == 3
    for words in (
        ["status", "--hard", "RUN"],
        ["train", "--dry-run"],
        ["cancel", "-f", "RUN"],
        ["logs", "--node", "x"],
    ):
        with pytest.raises(ConfigError):
            parse(words)


def test_a_job_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = JobFolder.of_run(tmp_path / NASTY.replace("/", "_"))
    job = Job(spec(environment={"A": NASTY}, setup=(NASTY,), secrets=("T",)), 1.0, {"id": "7"}, attempt=3)
    folder.write(job)
    assert folder.read() == job and job.spec.name == "my-job-1-20260101-000000"
    assert job.spec.arguments(0)[-1] != "--resume" == job.spec.arguments(1)[-1]
    content = json.loads(folder.file.read_text())
    for broken in ("", "{", "[]", json.dumps({**content, "format": 9}), json.dumps({**content, "more": 1})):
        folder.file.write_text(broken)
        with pytest.raises(CheckpointError, match=r"job\.json"):
            folder.read()
    with pytest.raises(CheckpointError, match="was not launched"):
        JobFolder.of_run(tmp_path).read()


@pytest.mark.parametrize(
    ("word", "codes", "cancelled", "expected"),
    [
        (Word.pending, [], False, State.pending),
        (Word.pending, [75, 75], False, State.preempted),
        (Word.running, [0, None], False, State.running),
        (Word.ended, [0, 0], False, State.succeeded),
        (Word.unknown, [0, 0], True, State.succeeded),
        (Word.ended, [0], False, State.lost),
        (Word.ended, [0, None], False, State.lost),
        (Word.ended, [3, None], False, State.failed),
        (Word.failed, [0, None], False, State.failed),
        (Word.ended, [75, 75], False, State.preempted),
        (Word.ended, [75, 75], True, State.cancelled),
        (Word.cancelled, [143, 143], False, State.cancelled),
        (Word.unknown, [], False, State.lost),
    ],
)
def test_a_state_is_the_schedulers_word_and_the_marks(
    word: Word, codes: list[int | None], cancelled: bool, expected: State
) -> None:
    marks = [mark(at, code) for at, code in enumerate(codes)]
    assert state_of(Report(word), marks, 2, cancelled=cancelled) is expected


def test_marks_are_those_of_one_attempt_and_of_no_job_that_was_here_before(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    for attempt in (0, 3, 1000):  # by number, not by name
        folder.mark(mark(0, attempt=attempt))
        folder.mark(mark(1, attempt=attempt))
    for asked, since, expected in ((None, 0, 1000), (3, 0, 3), (3, 3, 3), (None, 4, 1000), (3, 4, None), (1, 0, None)):
        found = folder.marks(asked, since=since)
        assert [(each.attempt, each.node) for each in found] == (
            [] if expected is None else [(expected, 0), (expected, 1)]
        )
    assert folder.marks(since=1001) == [] and sorted(folder.begun()) == [0, 3, 1000]


def test_the_root_cause_is_the_first_fault_and_not_what_followed() -> None:
    late = mark(1, 3, fault=fault("DataError", 12.0, rank=3))
    follows = mark(0, 3, fault=fault("UnexpectedError", 11.0))  # "connection closed by peer", told sooner
    stopped = mark(2, 75, fault=fault("StoppedError", 10.0))
    found = root_cause([follows, mark(3, 3), stopped, late])
    assert found is not None and found[0] is late and "DataError of rank 3" in str(found[1])
    killed = mark(1, 3, fault=fault("WorkerLostError", 13.0, rank=3))
    assert root_cause([follows, stopped, killed])[0] is killed  # type: ignore[index]
    saving = mark(0, 3, fault=fault(LostContactError.__name__, 10.0))  # in a save, where the killed one was missed
    assert root_cause([saving, stopped, killed])[0] is killed  # type: ignore[index]
    assert root_cause([follows, mark(1, 3, fault=fault("UnexpectedError", 10.5, rank=2))])[0].node == 1  # type: ignore[index]
    assert root_cause([mark(0, 3)]) is None
    assert isinstance(from_json(fault("NoSuchKind", 1.0)), Exception)


def test_a_machine_knows_its_place_or_says_what_is_missing(tmp_path: Path) -> None:
    folder, job = JobFolder.of_run(tmp_path), spec()
    told = {NODE: "1", MASTER: "n0", ATTEMPT: "4"}
    assert place(job, told, folder) == (1, "n0", 4)
    assert place(job, told | {ATTEMPT: AUTO}, folder) == (1, "n0", 0)
    folder.mark(mark(1, 75, attempt=2))
    folder.mark(mark(0, attempt=3))  # machine 0 has begun the next one already
    assert place(job, told | {ATTEMPT: AUTO}, folder) == (1, "n0", 3)
    for wrong in ({NODE: "2"}, {NODE: "-1"}, {NODE: ""}, {MASTER: ""}, {ATTEMPT: "x"}):
        with pytest.raises(ConfigError):
            place(job, told | wrong, folder)


def test_what_machines_compare_leaves_out_what_rightly_differs_and_every_secret() -> None:
    job = spec(secrets=("TOKEN",))
    one = {"A": "1", "SLURM_NODEID": "0", "HOSTNAME": "a", "TOKEN": "x", NODE: "0", "X_PORT_80_TCP": "1"}
    other = {"A": "1", "SLURM_NODEID": "1", "HOSTNAME": "b", "TOKEN": "y", NODE: "1"}
    seen = [environment_hash(what_ranks_see(job, each)) for each in (one, other, other | {"A": "2"}, {"A": "1"})]
    assert seen[0] == seen[1] and len(set(seen)) == 3
    assert "x" not in what_ranks_see(job, one).values()


def test_output_of_children_is_on_the_terminal_and_in_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with copied_to(tmp_path / "log"):
        os.write(1, b"ours\n")
        script = "import sys; print('child'); print('fault', file=sys.stderr)"
        subprocess.run([sys.executable, "-c", script], check=True)
    os.write(1, b"after\n")
    assert (tmp_path / "log").read_text() == "ours\nchild\nfault\n"
    assert capfd.readouterr().out == "ours\nchild\nfault\nafter\n"


def test_setup_scripts_come_first_and_no_word_is_read_twice(tmp_path: Path) -> None:
    script = tmp_path / NASTY.replace("/", "_")
    script.write_text("export A=$((1+1))\n")
    show = [sys.executable, "-c", "import os, sys; print(os.environ['A'], sys.argv[1:])"]
    words = with_setup([*show, NASTY, "$A"], [str(script), str(script)])
    assert subprocess.run(words, capture_output=True, text=True).stdout == f"2 {[NASTY, '$A']}\n"
    missing = subprocess.run(with_setup(show, [str(tmp_path / "none")]), capture_output=True)
    assert missing.returncode != 0, "a setup script that is not there must not be passed over"


def test_a_log_is_not_that_of_the_job_before(tmp_path: Path) -> None:
    folder, scheduler = JobFolder.of_run(tmp_path), Scheduler(options().launcher, options().cluster)
    for attempt in (0, 1):
        folder.mark(mark(0, 3, attempt=attempt))
        folder.logs(attempt, 0).mkdir(parents=True)
        folder.output(attempt, 0).write_text(f"attempt {attempt}\n")
    job = Job(spec(tmp_path), 0.0, {"id": "0"})
    assert list(scheduler.log(job, folder, 0, follow=False)) == ["attempt 1"]
    assert list(scheduler.log(replace(job, attempt=2), folder, 0, follow=False)) == []


def test_a_log_is_followed_to_its_last_line(tmp_path: Path) -> None:
    log, looks = tmp_path / "log", iter([True, True, True, False])

    def more() -> bool:
        with log.open("a") as file:
            file.write("half ")
            file.write(f"line {log.stat().st_size}\nrest")
        return next(looks)

    lines = list(tail(log, more))
    assert len(lines) == 5 and lines[0].startswith("half line") and lines[-1] == "rest"


# ---- the supervisor


def supervised(
    tmp_path: Path, outcomes: list[tuple[int, int]], *, restarts: int = 3
) -> tuple[int, list[int], list[str]]:
    """Exit code, attempts and notes of a job whose attempts end with (exit code, newest step)."""
    folder, notes, attempts = JobFolder.of_run(tmp_path), [], []

    def start(attempt: int) -> int:
        attempts.append(attempt)
        code, step = outcomes[len(attempts) - 1]
        if step:
            saved = tmp_path / "checkpoints" / f"step-{step:08d}"
            saved.mkdir(parents=True, exist_ok=True)
            (saved / "COMPLETE").touch()
        return code

    job = Job(spec(tmp_path, restarts=restarts), 0.0, attempt=5)
    return supervise(start, job, folder, StopSignals(), notes.append), attempts, notes


@pytest.mark.parametrize(
    ("outcomes", "restarts", "code", "count"),
    [
        ([(0, 4)], 3, 0, 1),
        ([(75, 4), (3, 8), (0, 12)], 3, 0, 3),
        ([(2, 4)], 3, 2, 1),
        ([(3, 4), (3, 8)], 1, 3, 2),
        ([(3, 0), (3, 0)], 3, 3, 2),  # twice without an advance: a third time would not help
        ([(3, 4)], 0, 3, 1),
    ],
)
def test_a_job_is_started_again_while_that_helps(
    tmp_path: Path, outcomes: list[tuple[int, int]], restarts: int, code: int, count: int
) -> None:
    ended, attempts, _ = supervised(tmp_path, outcomes, restarts=restarts)
    assert (ended, attempts) == (code, list(range(5, 5 + count)))


def test_nobody_starts_again_what_was_to_end(tmp_path: Path) -> None:
    folder = JobFolder.of_run(tmp_path)
    folder.path.mkdir()
    job = Job(spec(tmp_path), 0.0)
    with StopSignals() as stops:
        assert supervise(lambda attempt: os.kill(os.getpid(), signal.SIGTERM) or 75, job, folder, stops, print) == 75
        assert stops.heard == [signal.SIGTERM]
    folder.ask_to_cancel()
    assert supervise(lambda attempt: 75, job, folder, StopSignals(), print) == 75


# ---- before anything is written


def test_what_step_and_machines_say_against_each_other_is_told_at_once(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOKEN", "x")
    cfg = compose("train", ["model.path=m", "dataset.path=d", f"run_dir={tmp_path / 'r'}", "nproc=9", "device=cpu"])
    words = ["cluster=ascend", "cluster.devices_per_node=8", "secrets=[TOKEN]", "environment.TOKEN=y", "nodes=2"]
    with pytest.raises(ErrorGroup) as caught:
        launch.plan("train", cfg, options(*words))
    assert [error.where for error in caught.value.errors] == ["device", "nproc", "secrets", "nodes"]
    assert not (tmp_path / "r").exists()
    with pytest.raises(ConfigError, match="not set in this environment: NOT_THERE"):
        launch.plan("train", cfg, options("secrets=[NOT_THERE]"))


def test_a_way_to_the_first_machine_has_an_interface() -> None:
    assert node.interface_to("127.0.0.1").startswith("lo") and node.interface_to("localhost").startswith("lo")
    with pytest.raises(ConfigError, match="no-such-host.invalid"):
        node.interface_to("no-such-host.invalid")


def test_machine_0_takes_the_interface_that_others_see_though_its_own_name_is_a_loopback_address(monkeypatch) -> None:
    """Debian writes 127.0.1.1 and the machine's name into /etc/hosts."""

    def address(text: str) -> SimpleNamespace:
        return SimpleNamespace(address=text, family=socket.AF_INET)

    seen = {"n0": "127.0.1.1", node.ELSEWHERE: "10.0.0.5"}
    addresses = {"lo": [address("127.0.0.1"), address("127.0.1.1")], "ib0": [address("10.0.0.5")]}
    monkeypatch.setattr(node, "source_address", lambda host: seen[host])
    monkeypatch.setattr(node.psutil, "net_if_addrs", lambda: addresses)
    monkeypatch.setattr(node.psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=True) for name in addresses})
    assert node.interface_to("n0") == "ib0"

    def no_way(host: str) -> str:
        if host == node.ELSEWHERE:
            raise OSError("Network is unreachable")
        return seen[host]

    monkeypatch.setattr(node, "source_address", no_way)  # a cluster's network without a way out
    assert node.interface_to("n0") == "ib0"
    addresses["eth0"] = [address("192.168.0.5")]
    with pytest.raises(ConfigError, match="ib0, eth0"):
        node.interface_to("n0")
    del addresses["ib0"], addresses["eth0"]
    assert node.interface_to("n0") == "lo"


def test_a_sweep_gives_each_run_its_words_and_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model.path=m", "dataset.path=d", f"run_dir={tmp_path / 'sweep'}", "optim.lr=1e-3,2e-3", "seed=range(2)"]
    found = configs_of(words, lambda run: compose("train", run))
    assert [(cfg.optim.lr, cfg.seed) for cfg in found] == [(1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1)]
    assert [Path(str(cfg.run_dir)).name for cfg in found] == ["000", "001", "002", "003"]
    assert "002: optim.lr=0.002 seed=0" in capsys.readouterr().out
    for wrong in (words[:3], [*words[:3], "seed=range(100000)"]):
        with pytest.raises(ConfigError, match="--multirun"):
            configs_of(wrong, lambda run: compose("train", run))
    names = [launch.plan("train", cfg, options(), label=f"-{n}").job.spec.name for n, cfg in enumerate(found)]
    assert len(set(names)) == 4


def test_of_several_jobs_all_are_submitted_or_none(tmp_path: Path) -> None:
    jobs = [(Job(spec(tmp_path / str(n)), 0.0), JobFolder.of_run(tmp_path / str(n))) for n in range(3)]
    scheduler = Scheduler(options().launcher, options().cluster)
    assert [handle["id"] for handle in scheduler.submit_all(jobs)] == ["0", "1", "2"]
    scheduler.room = 4
    with pytest.raises(ConfigError, match="is full"):
        scheduler.submit_all(jobs)
    assert scheduler.cancelled == [("3", True)]


def test_jobs_of_a_sweep_that_could_not_be_ended_again_are_named_and_keep_their_folders(tmp_path, monkeypatch) -> None:
    def silent(self: Scheduler, job: Job, folder: JobFolder, *, hard: bool) -> None:
        if job.handle["id"] == "0":
            raise RunFailedError("scheduler", "no answer")

    monkeypatch.setattr(Scheduler, "room", 2)
    monkeypatch.setattr(Scheduler, "cancel", silent)
    with pytest.raises(UnknownOutcomeError, match=r"is full; jobs that may run .*: 000: no answer") as caught:
        launch.launch_all([job_of(tmp_path / "sweep" / f"{number:03}") for number in range(3)])
    assert f"crosstune cancel --hard {tmp_path / 'sweep'}" in str(caught.value.remedy)
    jobs = [JobFolder.of_run(tmp_path / "sweep" / name) for name in ("000", "001")]
    assert [(job.read().handle, job.cancelled) for job in jobs] == [({"id": "0"}, False), ({}, True)]

    def broken(self: Scheduler, job: Job, folder: JobFolder) -> dict[str, Any]:
        if self.taken == 1:
            raise KeyError("a fault of ours")
        return Scheduler_submit(self, job, folder)

    Scheduler_submit = Scheduler.submit
    monkeypatch.setattr(Scheduler, "submit", broken)
    monkeypatch.setattr(Scheduler, "cancel", lambda self, job, folder, *, hard: ended.append(job.handle["id"]))
    ended: list[str] = []
    with pytest.raises(KeyError):
        launch.launch_all([job_of(tmp_path / "other" / f"{number:03}") for number in range(3)])
    assert ended == ["0"] and not (tmp_path / "other").exists()


def test_a_job_that_another_command_starts_meanwhile_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    """The other one comes after this one has seen that there is no folder yet."""
    first = submit.make_writable

    def overtaken(path: Path, key: str) -> None:
        monkeypatch.setattr(submit, "make_writable", first)
        launch.launch(job_of(tmp_path / "r"))
        first(path, key)

    monkeypatch.setattr(submit, "make_writable", overtaken)
    with pytest.raises(ConfigError, match="the job has not ended"):
        launch.launch(job_of(tmp_path / "r"))
    assert status.status(tmp_path / "r")["state"] == "running"


def test_a_disk_that_is_full_meanwhile_leaves_the_job_that_was_there(tmp_path: Path, monkeypatch) -> None:
    launch.launch(job_of(tmp_path / "r"))
    monkeypatch.setattr(Scheduler, "word", Word.ended)
    folder = JobFolder.of_run(tmp_path / "r")
    folder.ask_to_cancel()
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}

    def full(self: JobFolder, job: Job) -> None:
        monkeypatch.setattr("configs.files.write_whole", no_room)
        monkeypatch.setattr(submit, "write_whole", no_room)
        no_room(self.file, "")

    def no_room(path: Path, text: str) -> None:
        raise StorageError(str(path), "cannot be written: No space left on device")

    monkeypatch.setattr(JobFolder, "write", full)
    for first in (r"/job\.json", r"/\.job\.json\.before"):  # the second time it is full from the beginning
        with pytest.raises(StorageError, match=f"{first}: cannot be written"):
            launch.launch(job_of(tmp_path / "r", "nodes=2"))
        assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before


def test_a_resume_takes_words_of_the_launch_and_a_refused_one_leaves_all_as_it_was(tmp_path: Path, monkeypatch) -> None:
    cfg = compose("train", ["model.path=m", "dataset.path=d", f"run_dir={tmp_path / 'r'}"])
    launch.launch(launch.plan("train", cfg, options(f"launcher._target_={__name__}.Scheduler")))
    folder = JobFolder.of_run(tmp_path / "r")
    folder.ask_to_cancel()
    before = {file.name: file.read_bytes() for file in folder.path.iterdir()}
    assert {"job.json", "launch.yaml", "request.yaml", "job.txt", "cancelled"} <= before.keys()
    again = replace(cfg, nproc=2)
    with pytest.raises(ConfigError, match="the job has not ended"):
        launch.relaunch(again, ["nodes=3"])
    monkeypatch.setattr(Scheduler, "word", Word.ended)
    monkeypatch.setattr(Scheduler, "room", 0)
    with pytest.raises(ConfigError, match="is full"):
        launch.relaunch(again, ["nodes=3"])
    assert {file.name: file.read_bytes() for file in folder.path.iterdir()} == before

    monkeypatch.setattr(Scheduler, "room", 1)
    folder.mark(mark(0, 75, attempt=4))
    launch.relaunch(again, ["nodes=3", "restarts=7"])
    job = folder.read()
    assert (job.spec.nodes, job.spec.nproc, job.spec.restarts, job.attempt) == (3, 2, 7, 5)
    assert (folder.path / "job.txt").read_text() == "3 machines from attempt 5\n"
    assert load_resolved(folder.options).nodes == 3 and load_resolved(folder.request) == again
    assert not folder.cancelled


def job_of(run: Path, *words: str) -> submit.Plan:
    cfg = compose("train", ["model.path=m", "dataset.path=d", f"run_dir={run}"])
    return launch.plan("train", cfg, options(f"launcher._target_={__name__}.Scheduler", *words))


def test_a_folder_takes_another_job_only_when_the_first_has_ended(tmp_path: Path, monkeypatch) -> None:
    launch.launch(job_of(tmp_path / "r"))
    folder = JobFolder.of_run(tmp_path / "r")
    first = folder.file.read_bytes()
    with pytest.raises(ConfigError, match="the job has not ended"):
        launch.launch(job_of(tmp_path / "r"))
    with submit.alone_with(folder), pytest.raises(ConfigError, match="another crosstune is just starting a job"):
        launch.launch(job_of(tmp_path / "r"))
    assert folder.file.read_bytes() == first
    monkeypatch.setattr(Scheduler, "word", Word.ended)
    folder.mark(mark(0, 2, fault=fault("DataError", 1.0)))
    folder.ask_to_cancel()
    launch.launch(job_of(tmp_path / "r"))
    assert folder.read().attempt == 1 and not folder.cancelled, "what the first one left is of another attempt"


def test_a_job_of_which_nothing_is_known_keeps_its_folder_and_a_refused_one_leaves_none(tmp_path, monkeypatch) -> None:
    def silent(self: Launcher, job: Job, folder: JobFolder) -> dict[str, Any]:
        raise UnknownOutcomeError("scheduler", "no answer")

    monkeypatch.setattr(Scheduler, "submit", silent)
    with pytest.raises(UnknownOutcomeError):
        launch.launch(job_of(tmp_path / "r"))
    assert JobFolder.of_run(tmp_path / "r").read().handle == {}
    monkeypatch.undo()
    monkeypatch.setattr(Scheduler, "room", 0)
    (tmp_path / "sweep" / "001" / "checkpoints").mkdir(parents=True)  # a run of another day
    for error, plans in (
        ("is full", [job_of(tmp_path / "deep" / "er" / "q")]),
        ("holds a run already", [job_of(tmp_path / "sweep" / name) for name in ("000", "001")]),
    ):
        with pytest.raises(ConfigError, match=error):
            launch.launch_all(plans)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if "r/" not in f"{path}/") == [
        "sweep",
        "sweep/001",
        "sweep/001/checkpoints",
    ]


def test_a_stop_waits_until_the_job_has_its_handle(tmp_path: Path, monkeypatch, capfd) -> None:
    def stopped(self: Launcher, job: Job, folder: JobFolder) -> dict[str, Any]:
        signal.raise_signal(signal.SIGINT)
        return {"id": "17"}

    monkeypatch.setattr(Scheduler, "submit", stopped)
    with pytest.raises(KeyboardInterrupt):
        launch.launch(job_of(tmp_path / "r"))
    assert JobFolder.of_run(tmp_path / "r").read().handle == {"id": "17"}
    assert "stops as soon as it is known" in capfd.readouterr().err


def test_status_without_a_scheduler_tells_what_lies_in_the_folder(tmp_path: Path, monkeypatch, capsys) -> None:
    launch.launch(job_of(tmp_path / "s" / "000"))
    folder = JobFolder.of_run(tmp_path / "s" / "000")
    folder.mark(mark(0, 3, fault=fault("RunFailedError", 1.0, rank=5)))
    monkeypatch.setattr(Scheduler, "silent", True)
    found = status.status(folder.run_dir)
    assert (found["state"], found["exit_code"], found["cause"]["rank"]) == ("unknown", 3, 5)
    assert status.status(tmp_path / "s")["exit_code"] == 3
    monkeypatch.setattr(Scheduler, "silent", False)
    swept = status.status(tmp_path / "s")
    assert (swept["jobs"][0]["state"], swept["exit_code"]) == ("running", 0)  # of a sweep's folder: its runs
    capsys.readouterr()
    monkeypatch.setattr(Scheduler, "word", Word.unknown)
    folder.mark(replace(mark(0), fault={"rank": 0, "errors": [{"of": "another version"}]}))
    assert status.status(folder.run_dir)["state"] == "lost"
    told = capsys.readouterr().out
    assert "did not say how it ended" in told and f"crosstune resume {folder.run_dir} starts it again" in told


def test_a_cancel_holds_although_the_scheduler_is_away(tmp_path: Path, monkeypatch) -> None:
    """Whoever would start a job again asks for the mark. All jobs of a sweep are told, whatever keeps one of them."""
    folders = [JobFolder.of_run(tmp_path / "s" / name) for name in ("000", "001")]
    for folder in folders:
        launch.launch(job_of(folder.run_dir))
    monkeypatch.setattr(Scheduler, "silent", True)
    with pytest.raises(ErrorGroup) as caught:
        status.cancel(tmp_path / "s", hard=False)
    assert [folder.cancelled for folder in folders] == [True, True] and caught.value.exit_code == 3
    assert "will not be started again" in str(caught.value.errors[0].remedy)
    folders[0].take_back_cancel()
    monkeypatch.setattr(Scheduler, "silent", False)
    monkeypatch.setattr(Scheduler, "word", Word.failed)
    assert status.cancel(folders[0].run_dir, hard=False) == {"cancelled": False}
    assert status.status(folders[0].run_dir)["state"] == "failed", "nobody cancelled it while it ran"


def test_a_log_goes_on_while_the_scheduler_is_away(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("launchers.base.LOOK_SECONDS", 0.0)
    planned, polls = job_of(tmp_path / "r"), iter([RunFailedError("scontrol", "no answer"), True])
    output = planned.folder.output(0, 0)
    output.parent.mkdir(parents=True)
    output.write_text("one\n")

    def over(job: Job, folder: JobFolder) -> bool:
        answer = next(polls)
        if isinstance(answer, Exception):
            with output.open("a") as file:
                file.write("two\n")
            raise answer
        return bool(answer)

    monkeypatch.setattr(planned.launcher, "is_over", over)
    assert list(planned.launcher.log(planned.job, planned.folder, 0, follow=True)) == ["one", "two"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["node=2"], "nodes"),
        (["launchr=slurm"], "launcher"),
        (["restart=0"], "restarts"),
        (["time_limit=10"], "time_limit_minutes"),
        (["interface=eth0"], "cluster.interface"),
    ],
)
def test_a_misspelt_word_of_the_launch_is_not_sought_among_the_steps(words: list[str], meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch_words.check_words("train", [*words, "model.path=m", "max_steps=1", "+experiment=x"], options())
    assert caught.value.where == words[0].partition("=")[0] and f"did you mean {meant}=...?" in str(caught.value.remedy)
    launch_words.check_words("train", ["modle.path=m"], options())  # the step's own, which it tells better


def test_jobs_have_rendezvous_ports_of_their_own() -> None:
    ports = {drawn_port(f"20260101-000000 /runs/{number}") for number in range(50)}
    assert len(ports) > 45 and all(20_000 <= port < 29_000 for port in ports)
    assert spec(Path("/runs/1")).master_port == spec(Path("/runs/1")).master_port in ports
    swept = [with_own_port(options("master_port=30000"), number).master_port for number in range(3)]
    assert swept == [30000, 30010, 30020] and with_own_port(options(), 2).master_port == 0


class Scheduler(Launcher):
    """Takes so many jobs."""

    name, room, word, silent = "fake", 100, Word.running, False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.taken, self.cancelled = 0, []

    def render(self, spec: LaunchSpec, attempt: int) -> dict[str, str]:
        return {"job.txt": f"{spec.nodes} machines from attempt {attempt}\n"}

    def submit(self, job: Job, folder: JobFolder) -> dict[str, Any]:
        if self.taken == self.room:
            raise ConfigError("scheduler", "is full")
        self.taken += 1
        return {"id": str(self.taken - 1)}

    def report(self, job: Job, folder: JobFolder) -> Report:
        if self.silent:
            raise RunFailedError("scheduler", "no answer")
        return Report(self.word)

    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        self.cancelled.append((job.handle["id"], hard))
