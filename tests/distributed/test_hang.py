"""Ranks that stop, die, read slowly or wait for ever: who is named, and that all end, with exit code 3."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from configs.compose import compose
from configs.errors import CrosstuneError
from configs.schema.roots import TrainConfig
from tests.command import write_uneven_records
from tests.distributed.forks import Ranks
from tests.tiny import samples_of, save_tiny_model, write_prepared
from train import loop
from train.data.collate import Batch
from train.data.sampler import GlobalStep, StepSampler
from train.loop import Loop
from train.run import train

pytestmark = pytest.mark.distributed

TIMEOUT = 3.0
STEP = 4
"""At which it happens."""
FOR_EVER = 1000.0
STARTED_WITHIN = 60.0
"""Seconds to the step, on a machine that is busy with other tests."""
WORDS = "last_words"


@dataclass(frozen=True)
class Case:
    """What happens to whom, and what is to be said."""

    sabotage: Callable[[int], None]
    """Called in each rank before it trains, with its number."""
    late: str
    """First line of the report."""
    says: tuple[str, ...]
    """Parts of the message."""
    in_stacks: str = ""
    codes: tuple[int, ...] = (3, 3, 3)
    more: tuple[str, ...] = ()


def before_data(act: Callable[[], None], at: int = STEP) -> None:
    """Something happens before the data of a step are read."""
    read, steps = StepSampler.batches, count(1)

    def batches(self: StepSampler, step: GlobalStep) -> Iterator[Batch]:
        if next(steps) == at:
            act()
        return read(self, step)

    StepSampler.batches = batches


def slow_disk() -> None:
    time.sleep(FOR_EVER)


def stop_of(rank: int) -> Callable[[int], None]:
    def sabotage(me: int) -> None:
        if me == rank:
            before_data(lambda: os.kill(os.getpid(), signal.SIGSTOP))

    return sabotage


def slow_reader_of(*ranks: int) -> Callable[[int], None]:
    def sabotage(me: int) -> None:
        if me in ranks:
            before_data(slow_disk)

    return sabotage


def death_of_the_last(me: int) -> None:
    """The others go on waiting, as with a backend that does not notice; gloo does."""
    if me == 2:
        before_data(lambda: os.kill(os.getpid(), signal.SIGKILL))
    waiting: dict[str, Callable[[float], None]] = {"sleep": time.sleep}
    code = "def all_reduce(seconds):\n    sleep(seconds)\n"
    exec(compile(code, "/x/torch/distributed/distributed_c10d.py", "exec"), waiting)
    take_step = Loop.take_step

    def waits(self: Loop, state: object) -> object:
        try:
            return take_step(self, state)
        except RuntimeError:
            waiting["all_reduce"](FOR_EVER)

    Loop.take_step = waits


def error_of_the_second(me: int) -> None:
    """Rank 1 leaves with an error; nobody ends the others, and they do not notice."""
    death_of_the_last(-1)
    if me == 1:

        def fails() -> None:
            raise ValueError("a fault of one rank")

        before_data(fails)


def slow_writer(me: int) -> None:
    if me == 2:
        os.fsync = lambda handle: slow_disk()


def long_but_well(me: int) -> None:
    """A first step beyond the time-out, and a validation whose batches are each below it."""
    before_data(lambda: time.sleep(1.5 * TIMEOUT), at=1)
    made = loop.batches_of

    def slowly(*arguments: object) -> Iterator[Batch]:
        for batch in made(*arguments):
            time.sleep(0.6 * TIMEOUT)
            yield batch

    loop.batches_of = slowly


def ring(me: int) -> None:
    """Each waits for the next."""
    before_data(lambda: dist.recv(torch.zeros(1), src=(me + 1) % 3))


CASES = {
    "stopped": Case(stop_of(1), "LATE: rank 1", ("rank 1", "stopped", "hang_report.txt"), codes=(3, -9, 3)),
    "stopped with the store": Case(stop_of(0), "LATE: rank 0", ("rank 0", "stopped"), codes=(-9, 3, 3)),
    "dead": Case(death_of_the_last, "LATE: rank 2", ("rank 2", "its process is gone"), codes=(3, 3, -9)),
    "slow reader": Case(
        slow_reader_of(1), "LATE: rank 1", ("phase data of step 4", "slow_disk", "ranks 0, 2 wait"), "slow_disk"
    ),
    "two slow readers": Case(
        slow_reader_of(0, 2), "LATE: ranks 0, 2 (cannot tell between them)", ("cannot tell", "phase data of step 4")
    ),
    "slow writer": Case(
        slow_writer,
        "LATE: rank 2",
        ("phase save", "slow_disk"),
        "checkpoint-writer",
        more=("checkpoint.mode=asynchronous", "checkpoint.every=2"),
    ),
    "long but well": Case(long_but_well, "", (), codes=(0, 0, 0), more=("eval_every=2", "max_steps=3")),
    "ring": Case(ring, "LATE: no rank in particular (cannot tell)", ("all ranks wait", "recv")),
    "error": Case(error_of_the_second, "LATE: rank 1", ("left", "ValueError: a fault of one rank"), codes=(3, 1, 3)),
}


def config_of(name: str, folder: Path, run_dir: Path) -> TrainConfig:
    paths = [f"model.path={folder / 'model'}", f"dataset.path={folder / 'data'}", f"run_dir={run_dir}", "nproc=3"]
    sizes = ["batch_tokens=100", "micro_batch_tokens=50", "max_length=50", "max_steps=8", "checkpoint.every=0"]
    how = ["device=cpu", "model.precision=fp32", f"guard.hang_timeout_seconds={TIMEOUT}"]
    cfg: TrainConfig = compose("train", [*paths, *sizes, *how, *CASES[name].more])
    return cfg


def rank_of(name: str, cfg: TrainConfig, folder: Path, run_dir: Path) -> None:
    """One rank of a case."""
    me = int(os.environ["RANK"])
    CASES[name].sabotage(me)

    def tell(error: CrosstuneError) -> None:
        (run_dir / f"{WORDS}-{me}").write_text(error.render())

    train(cfg, model_dir=folder / "model", prepared=folder / "data", run_dir=run_dir, last_words=tell)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder / "model", num_hidden_layers=1)
    samples = samples_of((24, 31, 18, 40, 27, 22, 35, 29), vocab_size=290)
    write_prepared(folder / "data", {"train": samples, "validation": samples})
    return folder


def run_case(name: str, folder: Path, run_dir: Path) -> Ranks:
    run_dir.mkdir()
    cfg = config_of(name, folder, run_dir)
    return Ranks(rank_of, 3, name, cfg, folder, run_dir, logs=run_dir, environment={})


def must_end_well(ranks: Ranks, run_dir: Path) -> None:
    codes = ranks.wait(STARTED_WITHIN + 6 * TIMEOUT)
    ranks.kill()
    assert codes == [0, 0, 0], f"{codes}\n{ranks.output()}"
    assert not list(run_dir.glob("hang_report*"))


def must_name_the_late(name: str, ranks: Ranks, run_dir: Path) -> None:
    case = CASES[name]
    try:
        for process in ranks.processes:
            process.join(STARTED_WITHIN + 2 * TIMEOUT)
        codes = ranks.codes
    finally:
        ranks.kill()
    assert tuple(codes) == case.codes, f"{name}: {codes}\n{ranks.output()}"
    [words] = run_dir.glob(f"{WORDS}-*")  # one rank speaks for the machine
    message, report = words.read_text(), (run_dir / "hang_report.txt").read_text()
    assert report.splitlines()[0] == case.late, report
    for part in case.says:
        assert part in message, f"{name}: {part!r} is not in\n{message}"
    assert case.in_stacks in report, report


WELL = "long but well"
FAST = ["stopped with the store", "slow reader", "slow writer", "ring"]


@pytest.mark.slow
def test_the_late_rank_is_named_and_all_end(folder: Path, tmp_path: Path) -> None:
    begun = {name: run_case(name, folder, tmp_path / name) for name in [*FAST, WELL]}
    for name in FAST:
        must_name_the_late(name, begun[name], tmp_path / name)
    must_end_well(begun[WELL], tmp_path / WELL)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - {*FAST, WELL}))
def test_other_late_ranks(name: str, folder: Path, tmp_path: Path) -> None:
    must_name_the_late(name, run_case(name, folder, tmp_path / name), tmp_path / name)


def test_the_command_names_a_stopped_rank_and_says_how_to_go_on(folder: Path, tmp_path: Path) -> None:
    run_dir, data = tmp_path / "run", write_uneven_records(tmp_path / "records.jsonl")
    words = [f"model.path={folder / 'model'}", f"dataset.path={data}", f"run_dir={run_dir}", "nproc=2"]
    words += ["dataset.license=CC0-1.0", f"cache_dir={tmp_path / 'cache'}", "device=cpu", "model.precision=fp32"]
    words += ["max_length=300", "batch_tokens=300", "micro_batch_tokens=300"]
    words += ["max_steps=1000000", "checkpoint.every=20", f"guard.hang_timeout_seconds={TIMEOUT}"]
    command = [sys.executable, "-P", "-m", "launchers.cli", "train", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        give_up = time.monotonic() + 2 * STARTED_WITHIN
        while not list(run_dir.glob("checkpoints/step-*[0-9]/COMPLETE")):
            assert time.monotonic() < give_up and started.poll() is None, started.communicate()[0]
            time.sleep(0.1)
        family = psutil.Process(started.pid).children(recursive=True)
        [second] = [worker for worker in family if worker.environ().get("RANK") == "1"]
        second.suspend()
        output, _ = started.communicate(timeout=STARTED_WITHIN)
    finally:
        started.kill()
    assert started.returncode == 3, output
    assert "rank 1 (" in output and "its process is stopped" in output, output
    assert f"crosstune resume {run_dir} goes on after step" in output, output
    assert "Traceback" not in output, output
    assert not any(worker.is_running() for worker in family), "nothing of it is left"
