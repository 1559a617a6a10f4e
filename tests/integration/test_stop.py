"""Stops of real runs: signals of every kind to one process or all, the file, the clock; the second signal."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.compose import compose
from configs.errors import HangError, RunFailedError, StoppedError
from configs.schema.guard import GuardConfig
from launchers.steps import resumable
from tests.command import metrics_of, write_uneven_records
from tests.distributed.forks import Ranks
from tests.tiny import samples_of, save_tiny_model, write_prepared
from train.checkpoint.layout import checkpoints
from train.guard.stop import StopRequests
from train.observe.metrics import MetricsHook
from train.run import train
from train.run_folder import STOP_FILE, RunFolder

pytestmark = pytest.mark.distributed
ENDLESS = 100_000
ROOT = str(Path(__file__).parents[2])


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    write_uneven_records(home / "data.jsonl")
    write_prepared(home / "data", {"train": samples_of((24, 31, 18, 40), vocab_size=290)})
    return home


def words(home: Path, run: Path, *more: str) -> list[str]:
    paths = [f"model.path={home / 'model'}", f"dataset.path={home / 'data.jsonl'}", f"run_dir={run}", "device=cpu"]
    sizes = [f"max_steps={ENDLESS}", "batch_tokens=256", "micro_batch_tokens=128", "max_length=128"]
    data = ["dataset.test_fraction=0.2", f"cache_dir={home / 'cache'}", "checkpoint.every=0"]
    return [*paths, *sizes, *data, "model.precision=fp32", "device.threads=1", *more]


def started(home: Path, run: Path, *more: str, command: str = "train") -> subprocess.Popen[str]:
    given = [sys.executable, "-P", "-m", "launchers.cli", command, *words(home, run, *more)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(given, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.05)


def steps_of(run: Path) -> list[int]:
    return [int(line["step"]) for line in metrics_of(run)] if RunFolder(run).metrics.exists() else []


def saved_its_last_step(run: Path) -> int:
    """The step, which must be the one of the newest checkpoint and of the last line."""
    step = int(checkpoints(RunFolder(run).checkpoints)[-1].name.removeprefix("step-"))
    assert steps_of(run) == list(range(1, step + 1))
    return step


def to_the_command(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)


def to_every_process(process: subprocess.Popen[str], number: int) -> None:
    """As Slurm does when a job's time is over: torchrun hears it twice, and so do the workers."""
    for one in [*psutil.Process(process.pid).children(recursive=True)[::-1], process]:
        one.send_signal(number)


@pytest.mark.parametrize(
    ("number", "to", "command"),
    [
        pytest.param(signal.SIGTERM, to_every_process, "run", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, to_the_command, "train", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, to_the_command, "train", marks=pytest.mark.slow),
        (signal.SIGINT, to_every_process, "train"),
    ],
)
def test_two_workers_save_and_leave(home, tmp_path, number, to, command):
    run = tmp_path / "run"
    process = started(home, run, "nproc=2", command=command)
    wait_for(lambda: len(steps_of(run)) >= 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    family = psutil.Process(process.pid).children(recursive=True)
    to(process, number)
    shown, _ = process.communicate(timeout=90)
    assert process.returncode == 75, shown
    name, step = signal.Signals(number).name, saved_its_last_step(run)
    by = rf"{name} \(all ranks\)"
    if to is to_every_process and number == signal.SIGINT:  # handed on as SIGTERM, which a busy rank may hear first
        name, by = "SIG(?:INT|TERM)", r"SIG(?:INT|TERM) \(.+\)(?: and 1 more rank\(s\))?"
    assert re.search(f"{name}: stopping after this step; again to end at once", shown), shown
    assert re.search(rf"{re.escape(str(run))}: stopped by {by} after step {step} of {ENDLESS}, saved", shown), shown
    assert f"remedy:  crosstune resume {run}" in shown and "Traceback" not in shown, shown
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


@pytest.mark.slow
@pytest.mark.parametrize("patience", ["of the user", "of guard.grace_seconds"])
def test_workers_that_cannot_save_are_ended_and_none_is_left(home, tmp_path, patience):
    run = tmp_path / "run"
    process = started(home, run, "nproc=2", "guard.grace_seconds=" + ("300" if patience == "of the user" else "4"))
    wait_for(lambda: len(steps_of(run)) >= 2 or process.poll() is not None)
    family = psutil.Process(process.pid).children(recursive=True)
    next(one for one in family if one.environ().get("RANK") == "1").suspend()
    process.send_signal(signal.SIGTERM)
    if patience == "of the user":
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    if patience == "of the user":
        assert process.returncode == 128 + signal.SIGTERM, shown
    else:
        assert process.returncode == 3, shown
        assert "guard.grace_seconds=4: the workers had not saved so long after SIGTERM and were killed" in shown, shown
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


def test_torchrun_cleaning_up_after_a_dead_worker_is_no_wish_to_stop(tmp_path):
    """The survivor ends at once, instead of waiting for the dead one in a collective until torchrun kills it."""
    script = "import sys, time; from pathlib import Path; from train.guard.stop import *\n"
    script += (
        "with StopRequests(Path(sys.argv[1]), GuardConfig(), time.time()): print('up', flush=True); time.sleep(60)"
    )
    shared = os.environ | {"TORCHELASTIC_RUN_ID": "run", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": ROOT}
    given = [sys.executable, "-P", "-c", script, str(tmp_path)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        subprocess.Popen(["sleep", "300"], env=shared | {"LOCAL_RANK": "1"}) as other,
        subprocess.Popen(given, env=shared | {"LOCAL_RANK": "0"}, **streams) as worker,
    ):
        assert worker.stdout is not None and worker.stdout.readline() == "up\n"
        worker.send_signal(signal.SIGTERM)
        assert worker.stdout.readline().startswith("SIGTERM: stopping after this step")
        assert worker.poll() is None, "both live: a wish to stop"
        other.kill()
        other.wait()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=20) == 128 + signal.SIGTERM


def test_the_second_signal_ends_a_run_at_once_though_its_thread_sits_in_a_kernel(home, tmp_path):
    """One process; the step hangs, as far as signals go, in one long call."""
    run, log = tmp_path / "run", tmp_path / "log"
    stuck = "import torch, train.loop as loop; step = loop.Loop.take_step\n"
    stuck += "def hang(self, state):\n    return step(self, state) if state.step < 2 else torch.ones(10**9).sort()\n"
    main = "loop.Loop.take_step = hang\nfrom launchers.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    given = [sys.executable, "-P", "-c", stuck + main, "train", *words(home, run, "checkpoint.every=1")]
    with log.open("w") as out:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
        process = subprocess.Popen(given, env=environment, stdout=out, stderr=out)
    wait_for(lambda: process.poll() is not None or len(checkpoints(RunFolder(run).checkpoints)) == 2)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # the same wish: `timeout` signals a process and then its group
    wait_for(lambda: "SIGTERM: stopping after this step; again to end at once" in log.read_text(), seconds=5)
    time.sleep(1.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 75, log.read_text()
    assert f"{run}: ended at once by SIGINT, unsaved" in log.read_text()
    assert f"crosstune resume {run} goes on after step 2" in log.read_text()


def a_rank(home: str, run: str, minutes: float) -> None:
    """Under somebody else's launcher: no parent of ours, no torchrun."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    cfg = compose("train", words(Path(home), Path(run), "nproc=2", f"guard.stop_after_minutes={minutes}"))
    try:
        train(cfg, model_dir=Path(home, "model"), prepared=Path(home, "data"), run_dir=Path(run))
    except StoppedError as error:
        print(f"ENDED {error}", flush=True)


@pytest.mark.parametrize(
    ("ask", "told"),
    [
        (lambda run, pids: os.kill(pids[1], signal.SIGUSR1), r"SIGUSR1 \(rank 1 on \S+\)"),
        (lambda run, pids: (run / STOP_FILE).touch(), r"the file PREEMPT \(rank 0 on \S+\)"),
        (None, r"guard.stop_after_minutes=0.002 \(all ranks\)"),
    ],
    ids=["signal to rank 1", "file", "clock"],
)
def test_a_wish_of_one_rank_stops_all_at_the_same_step(home, tmp_path, ask, told):
    run = tmp_path / "run"
    run.mkdir()
    (run / STOP_FILE).touch()
    os.utime(run / STOP_FILE, (1e9, 1e9))  # left by a former command: it must not stop this one
    ranks = Ranks(a_rank, 2, str(home), str(run), 0 if ask else 0.002, logs=tmp_path, environment={})
    try:
        if ask:
            wait_for(lambda: len(steps_of(run)) >= 2 or any(code is not None for code in ranks.codes))
            assert not (run / STOP_FILE).exists()
            ask(run, ranks.pids)
        assert ranks.wait(90) == [0, 0], ranks.output()
    finally:
        ranks.kill()
    step = saved_its_last_step(run)
    said = [re.search(rf"ENDED {run}: stopped by (.*) after step {step} of", log.read_text()) for log in ranks.logs]
    assert all(one and re.fullmatch(told, one[1]) for one in said), ranks.output()
    assert f"{run / STOP_FILE} is older than this command: removed" in ranks.logs[0].read_text()
    assert not (run / STOP_FILE).exists(), "it has been honoured"


def test_handlers_and_descriptor_are_as_before_and_a_signal_is_heard_at_once(tmp_path, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with StopRequests(tmp_path, GuardConfig(), time.time()) as stop:
        assert stop.wanted() is None
        os.kill(os.getpid(), signal.SIGINT)  # no KeyboardInterrupt
        wait_for(lambda: stop.wanted() == "SIGINT", seconds=5)
        assert stop.reason() == "SIGINT" and "SIGINT: stopping after this step" in capfd.readouterr().err
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert signal.set_wakeup_fd(-1) == -1 and "stop-requests" not in {thread.name for thread in threading.enumerate()}


def test_a_stop_in_the_last_step_is_not_lost_and_the_finished_run_resumes(home, tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    cfg = compose("train", words(home, run.path, "max_steps=2", "checkpoint.mode=synchronous"))
    given = {"model_dir": home / "model", "prepared": home / "data", "run_dir": run.path}
    on_step = MetricsHook.on_step
    monkeypatch.setattr(
        MetricsHook, "on_step", lambda self, line: on_step(self, line) or (run.path / STOP_FILE).touch()
    )
    monkeypatch.setattr("train.guard.stop.LOOK_SECONDS", 0.0)
    with pytest.raises(StoppedError, match="stopped by the file PREEMPT after step 2 of 2, saved"):
        train(cfg, **given)
    monkeypatch.undo()
    train(cfg, **given, resume=True)
    assert saved_its_last_step(run.path) == 2


def test_a_run_that_failed_says_how_it_goes_on(tmp_path):
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints/step-00000004/COMPLETE").touch()
    for kind in (RunFailedError, HangError):
        with (
            pytest.raises(kind, match=rf"a remedy; crosstune resume {tmp_path} goes on after step 4"),
            resumable(tmp_path),
        ):
            raise kind("step 6", "spikes", remedy="a remedy")
