"""The whole road on two pretended NPUs: the real torch_npu API over a pretended CANN, not a card.

It shows that every tensor and every collective of every engine goes where it must, and that a run moves between the
CPU and the device at a checkpoint. It cannot show the card's own rounding, nor its speed: the stand-in computes with
torch's CPU kernels, so that what is compared differs only in the order of sums over ranks. Hence the tolerances are
those of two CPU ranks against one (`tests/distributed`): 1e-6 of a loss, 1e-5 of a gradient, the latter 84 times
fp32's epsilon; the largest measured was 2.5e-6.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from itertools import product
from pathlib import Path

import pytest

from launchers.doctor import tripwire
from tests.command import crosstune, metrics_of, write_uneven_records
from tests.distributed import test_engines as engines
from tests.distributed import test_resume_matrix as resuming
from tests.distributed.layouts import DEVICE_VARIABLE, launch, start
from tests.tiny import save_tiny_model
from tests.tripwire_allowed import not_allowed, unused
from train.engine.base import World

pytestmark = pytest.mark.distributed

STEPS = [
    f"{tuning}-{name}-x2-micro4"
    for tuning, name in [
        *product(["full", "lora"], ["plain", "zero1", "zero2", "zero3"]),
        ("full", "zero2_offload"),
        ("lora", "zero3_offload"),
    ]
]
BF16 = "lora-zero2-x2-micro4-bf16"
REFERENCES = ["full-plain-x1-micro1", "lora-plain-x1-micro1"]
PLANS = [resuming.plan_of("lora", dropouts=[0.0, 0.2], x1=["plain"], x2=["plain", "zero3"]) | resuming.WHOLE]
PLAIN_KERNELS = [f"device.{op}_kernel=reference" for op in ("attention", "rms_norm", "rotary", "swiglu")]


def worker(out: Path) -> None:
    """One rank of the only launch: every engine's step, then saving and resuming under each of `PLANS`."""
    world = start()
    engines.take_steps(world, out, [*STEPS, BF16])
    resuming.run_tasks(world, out, PLANS, ["save", "resume"])
    world.close()


@pytest.fixture(scope="module", autouse=True)
def cuda_assumptions(tmp_path_factory):
    """File of what every process started here, on the CPU or on NPUs, takes for granted of CUDA."""
    folder = tmp_path_factory.mktemp("tripwire")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tripwire.VARIABLE, str(folder / "records.jsonl"))
        patch.setenv("PYTHONPATH", str(tripwire.site_folder(folder)), prepend=os.pathsep)
        yield folder / "records.jsonl"


@pytest.fixture(scope="module")
def matrix(standin, tmp_path_factory):
    """Figures of all layouts; one process on the CPU saves before them, and resumes after them what they saved."""
    out = tmp_path_factory.mktemp("matrix")
    engines.take_steps(World(), out, REFERENCES)
    resuming.run_tasks(World(), out, PLANS, ["save"])
    environment = standin.environment(report=str(out / "report")) | {DEVICE_VARIABLE: "ascend"}
    launch(__name__, 2, environment, out=str(out))
    resuming.run_tasks(World(), out, PLANS, ["resume"])
    return out, json.loads((out / "1.json").read_text()) | json.loads((out / "2.json").read_text())


@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_that_of_one_cpu_process(matrix, name):
    """The workers themselves assert that weights, gradients and optimizer state lie on npu, and the backend is hccl."""
    engines.must_equal_one_pass(*matrix, name)


def test_a_step_in_bf16_is_near_that_in_fp32(matrix):
    _, figures = matrix
    assert figures[BF16]["loss"] == pytest.approx(figures["lora-plain-x1-micro1"]["loss"], rel=1e-2)


def test_checkpoints_move_between_cpu_and_npu(matrix):
    """Both ways under each engine, bit by bit what was saved; under dropout the NPU's generators go on, too."""
    resuming.must_have_resumed(matrix[0], PLANS)


def test_the_ranks_talked_by_hccl(matrix):
    reports = ranks_of(matrix[0] / "report")
    assert len(reports) == 2
    for report in reports:
        assert report["collectives"] and all(count > 0 for count in report["collectives"].values()), report
        assert sum(operator["count"] for operator in report["operators"].values()) > 10_000
        assert len(report["collectives"]) >= 3, "sums, gathers and broadcasts"
    assert reports[0]["collectives"] == reports[1]["collectives"], "both ranks take part in each"


def ranks_of(folder: Path) -> list[dict]:
    """Reports of the processes that took part in collectives."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return [report for report in found if report["collectives"]]


class Road:
    """Records, a model, and what the CPU makes of them."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.model = save_tiny_model(tmp / "model", tie_word_embeddings=False)
        self.data = write_uneven_records(tmp / "data.jsonl", count=40)

    def words(self, run: str, tuning: str) -> list[str]:
        sizes = ["max_length=320", "batch_tokens=400", "micro_batch_tokens=400", "max_steps=8", "checkpoint.every=2"]
        paths = [f"model.path={self.model}", f"dataset.path={self.data}", f"cache_dir={self.tmp / 'cache'}"]
        rest = ["dataset.test_fraction=0.1", "dataset.license=CC0-1.0", "model.precision=fp32", "optim.lr=5e-3"]
        return [*paths, *sizes, *rest, f"tuning={tuning}", f"run_dir={self.tmp / run}"]

    def losses(self, run: str) -> list[float]:
        return [line["loss"] for line in metrics_of(self.tmp / run)]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    return Road(tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="module")
def lora_on_cpu(road):
    """Losses of a run in one process."""
    crosstune("train", *road.words("cpu-lora", "lora"), "device=cpu")
    return road.losses("cpu-lora")


@pytest.fixture(scope="module")
def full_on_cpu(road):
    """As `lora_on_cpu`, to the end of the road."""
    crosstune("run", *road.words("cpu-full", "full"), "eval.base=false", "device=cpu")
    return road.losses("cpu-full")


@pytest.mark.slow
def test_killed_under_zero3_on_npus_goes_on_on_a_cpu(standin, road, lora_on_cpu):
    """Rank 1 dies in a collective about halfway through the 8 steps; the parent tells it from the one that noticed."""
    words = [*road.words("killed", "lora"), *PLAIN_KERNELS, "device=ascend", "nproc=2", "sharding=zero3"]
    shown = standin.crosstune("train", *words, code=3, die="1:650")
    assert re.search(r"rank 1: ended by signal SIGKILL.* after step [2-7]", shown) and "Traceback" not in shown, shown
    assert re.search(rf"crosstune resume {road.tmp / 'killed'}\s+goes on after step [246]", shown), shown
    crosstune("resume", str(road.tmp / "killed"), "device=cpu", "nproc=1", "sharding=plain")
    assert road.losses("killed") == pytest.approx(lora_on_cpu, rel=1e-5)


@pytest.mark.slow
def test_begun_on_a_cpu_goes_on_on_slow_npus_to_the_end_of_the_road(standin, road, full_on_cpu):
    """Full tuning; rank 1 comes late to every collective, which changes nothing. Export and eval follow on one NPU."""
    run = road.tmp / "cpu-full"
    shutil.rmtree(run / "checkpoints/step-00000008")
    standin.crosstune("resume", str(run), "device=ascend", "nproc=2", "sharding=zero2", slow="1:20")
    assert road.losses("cpu-full") == pytest.approx(full_on_cpu, rel=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["export_check"]["identical"] == summary["export_check"]["compared"] > 0


def test_nothing_on_the_road_assumed_cuda(matrix, full_on_cpu, cuda_assumptions):
    """Our code nothing at all; libraries what `tests/tripwire_allowed.py` gives reasons for."""
    found = tripwire.records(cuda_assumptions)
    assert not not_allowed(found), "\n".join(not_allowed(found))
    assert not unused(found)
    assert {record["rank"] for record in found} == {0, 1}, "the ranks on the NPUs were watched, too"


if __name__ == "__main__":
    worker(Path(json.loads(sys.argv[1])["out"]))
