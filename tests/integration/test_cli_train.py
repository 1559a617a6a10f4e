"""`crosstune train` and `resume` as real processes: two workers of our own, an outer torchrun, signals, lost ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from configs.compose import load_resolved
from launchers.torchrun import free_port
from tests.command import crosstune, metrics_of, write_uneven_records
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.distributed
ENDLESS = 100_000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    write_uneven_records(home / "data.jsonl")
    # A file of the user's that must not be taken for ours.
    (home / "train.py").write_text("raise SystemExit('the wrong train')\n")
    return home


def words(home: Path, run: Path, *, steps: int, **more: object) -> list[str]:
    sizes = ["batch_tokens=256", "micro_batch_tokens=128", "max_length=128", f"max_steps={steps}"]
    given = [f"{key.replace('__', '.')}={value}" for key, value in more.items()]
    paths = [f"model.path={home / 'model'}", f"dataset.path={home / 'data.jsonl'}", f"cache_dir={home / 'cache'}"]
    return ["train", *paths, *sizes, "device=cpu", "model.precision=fp32", f"run_dir={run}", *given]


def test_two_workers_then_resume_from_the_moved_folder_on_one(home, tmp_path):
    shown = crosstune(*words(home, tmp_path / "run", steps=4, nproc=2, checkpoint__every=2), cwd=home)
    for text in ("[1/3] model", "[2/3] data", "[3/3] train", "4/4", f"run: {tmp_path / 'run'}"):
        assert text in shown, shown
    assert "OMP_NUM_THREADS" not in shown, "torchrun's own messages stay in its log"
    assert [path.name for path in tmp_path.glob("run/logs/*/workers/*.log")] == ["rank1.log"]
    assert load_resolved(tmp_path / "run/resolved.yaml").nproc == 2
    whole = metrics_of(tmp_path / "run")

    moved = (tmp_path / "run").rename(tmp_path / "moved")
    (last,) = moved.glob("checkpoints/*4")
    last.rename(tmp_path / "aside")
    shown = crosstune("resume", str(moved), "nproc=1", "sharding=plain", cwd=home)
    assert "reused" in shown, shown
    resumed = metrics_of(moved)
    assert [line["step"] for line in resumed] == [line["step"] for line in whole] == [1, 2, 3, 4]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in whole], rel=1e-5)


def test_under_an_outer_torchrun(home, tmp_path):
    outer = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    outer += ["--master-addr", "127.0.0.1", "--master-port", str(free_port()), "-m", "launchers.cli"]
    done = subprocess.run(
        [*outer, *words(home, tmp_path / "run", steps=2)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[3/3] train") == 1, "only rank 0 speaks"
    assert len(metrics_of(tmp_path / "run")) == 2


@pytest.fixture
def endless(home: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A run on two workers in the midst of its steps, started by nohup."""
    command = ["nohup", sys.executable, "-P", "-m", "launchers.cli"]
    command += words(home, tmp_path / "run", steps=ENDLESS, nproc=2)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, **streams)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() or not metrics_of(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    return process


def interrupt(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGHUP)  # not heard of under nohup
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)


def kill_a_worker(process: subprocess.Popen[str]) -> None:
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in family if "RANK" in child.environ()]
    next(worker for worker in workers if worker.environ()["RANK"] == "1").kill()


def kill_the_command(process: subprocess.Popen[str]) -> None:
    process.kill()


@pytest.mark.parametrize(
    ("what", "code", "told"),
    [
        (interrupt, 75, "saved"),
        (kill_a_worker, 3, "rank 1: ended by signal SIGKILL"),
        pytest.param(kill_the_command, -9, None, marks=pytest.mark.slow),
    ],
)
def test_an_end_before_the_end_leaves_no_process_and_no_traceback(
    what: Callable[[subprocess.Popen[str]], None], code: int, told: str | None, endless
):
    family = psutil.Process(endless.pid).children(recursive=True)
    assert len(family) >= 3, "torchrun and two workers"
    what(endless)
    _, shown = endless.communicate(timeout=90)
    assert endless.returncode == code, shown
    assert "Traceback" not in shown and (told is None or told in shown), shown
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive


@pytest.mark.slow
def test_resume_from_another_folder_without_the_records_and_never_on_another_base(home, tmp_path):
    """What was named relative to one working folder is found from another; a LoRA checkpoint needs its own base."""
    shutil.copytree(home / "model", tmp_path / "here/model")
    shutil.copy(home / "data.jsonl", tmp_path / "here/data.jsonl")
    (tmp_path / "there").mkdir()
    given = words(Path(), Path("run"), steps=4, checkpoint__every=2)
    crosstune(*given, cwd=tmp_path / "here")
    run = tmp_path / "here/run"
    shutil.rmtree(run / "checkpoints/step-00000004")
    (tmp_path / "here/data.jsonl").unlink()
    crosstune("resume", "../here/run", cwd=tmp_path / "there")
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]
    save_tiny_model(tmp_path / "here/model", seed=1)
    shown = crosstune("resume", str(run), cwd=tmp_path / "there", code=2)
    assert "differs from the model that the run began with: model.safetensors" in shown


@pytest.mark.slow
def test_figures_of_a_model_leave_the_working_folder_alone(home, tmp_path):
    prepared = [f"model.path={home / 'model'}", f"dataset.path={home / 'data.jsonl'}", "max_length=128", "out=prepared"]
    crosstune("prep", *prepared, "dataset.test_fraction=0.3", f"cache_dir={tmp_path}", cwd=tmp_path)
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/mine.jsonl").write_text("a user's own")
    crosstune("eval", f"model.path={home / 'model'}", "data=prepared", "eval.limit=1", "device=cpu", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["mine.jsonl"]
    (summary,) = tmp_path.glob("runs/eval-model-*/summary.json")
    assert "model" in json.loads(summary.read_text())
