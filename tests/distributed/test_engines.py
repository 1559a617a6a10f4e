"""Every engine, at one and two ranks and however the step is cut up, takes the same step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from configs.schema.optim import OptimConfig
from tests.distributed.forks import in_ranks
from tests.distributed.layouts import ENGINES, MORE_ENGINES, Net, build, must_lie_on_device, run_step, start
from train.checkpoint.layout import CheckpointReader, TrainerState
from train.checkpoint.save import save
from train.engine.base import World

pytestmark = pytest.mark.distributed

LR = 100.0
"""So large that the change of the weights is the gradient to fp32 rounding."""
CLIP = 0.1
BF16 = ["plain", "zero1", "zero2", "zero3"]
"""bf16 weights go through code of DeepSpeed's own; here, for gradients that are not finite."""
NAMES = [*ENGINES, "zero3_offload", "zero2_round_robin"]


@dataclass
class SGD(OptimConfig):
    _target_: str = "torch.optim.SGD"


def cases(ranks: int) -> list[dict]:
    """Layouts at one world size: micro-batches of a step, tuning, and activation checkpointing where it matters."""
    found = []
    for lora in (False, True):
        for name in NAMES if ranks > 1 else ("plain", "zero2", "zero3", "zero2_offload"):
            found.append({"name": name, "lora": lora, "micro_batches": 4})
            if name in ("plain", "zero2", "zero3"):
                found.append({"name": name, "lora": lora, "micro_batches": 1})
        if ranks > 1:
            found.append({"name": "zero3", "lora": lora, "micro_batches": 4, "activation_checkpointing": True})
            found += [{"name": name, "lora": lora, "micro_batches": 4, "bf16": True} for name in BF16]
    return [{**case, "ranks": ranks} for case in found]


def label(case: dict) -> str:
    tuning = "lora" if case["lora"] else "full"
    extra = ("-recompute" if case.get("activation_checkpointing") else "") + ("-bf16" if case.get("bf16") else "")
    return f"{tuning}-{case['name']}-x{case['ranks']}-micro{case['micro_batches']}{extra}"


ALL = {label(case): case for ranks in (1, 2) for case in cases(ranks)}
FP32 = [name for name, case in ALL.items() if not case.get("bf16")]


def worker(out: Path) -> None:
    world = start()
    take_steps(world, out, None)
    world.close()


def take_steps(world: World, out: Path, only: list[str] | None) -> None:
    """Takes one clipped step in each layout of this world size (or `only` some), then one that must not be taken."""
    results = {}
    for case in cases(world.size):
        if only is not None and label(case) not in only:
            continue
        arguments = {key: case[key] for key in case if key not in ("name", "ranks", "micro_batches", "bf16")}
        arguments["dtype"] = torch.bfloat16 if case.get("bf16") else torch.float32
        engine = build(case["name"], SGD(max_grad_norm=CLIP), world, **arguments)
        loss, norm = run_step(engine, 0, LR, case["micro_batches"])
        must_lie_on_device(engine)
        path = out / label(case)
        save(engine, path, TrainerState(1, 0, 7, 109, 0), world)
        _, poisoned = run_step(engine, 1, LR, case["micro_batches"], poison=float("inf"))
        save(engine, path, TrainerState(2, 0, 14, 218, 0), world)
        after, _ = run_step(engine, 0, 0.0, case["micro_batches"])
        results[label(case)] = {"loss": loss, "norm": norm, "poisoned": repr(poisoned), "after": after}
        engine.close()
    if world.rank == 0:
        (out / f"{world.size}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Folder and figures of all layouts, and the weights before the step."""
    out = tmp_path_factory.mktemp("engines")
    figures = {}
    for ranks in (1, 2):
        in_ranks(worker, ranks, out)
        figures |= json.loads((out / f"{ranks}.json").read_text())
    return out, figures


def weights(out: Path, name: str, step: int) -> dict[str, torch.Tensor]:
    with CheckpointReader(out / name / f"step-{step:08d}") as reader:
        return {parameter: reader.read(parameter) for parameter in reader.params}


def initial(lora: bool) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in Net(lora).named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FP32)
def test_step_equals_that_of_one_process_and_one_pass(ran, name):
    must_equal_one_pass(*ran, name)


def must_equal_one_pass(out: Path, figures: dict, name: str) -> None:
    """Loss, gradient norm and gradient of a layout are those of one process and one pass on the CPU."""
    reference = f"{'lora' if ALL[name]['lora'] else 'full'}-plain-x1-micro1"
    assert figures[name]["loss"] == pytest.approx(figures[reference]["loss"], rel=1e-6)
    assert figures[name]["norm"] == pytest.approx(figures[reference]["norm"], rel=1e-5)
    assert figures[name]["norm"] > CLIP, "the step must be one that is clipped"
    got, expected = weights(out, name, 1), weights(out, reference, 1)
    assert list(got) == list(expected)
    squares = 0.0
    for parameter, before in initial(ALL[name]["lora"]).items():
        change = expected[parameter] - before
        squares += float(change.norm()) ** 2
        error = (got[parameter] - expected[parameter]).norm()
        # One rounding of the weight itself is no fault of the gradient.
        assert error <= 1e-5 * change.norm() + 1e-7 * expected[parameter].norm(), parameter
    assert squares**0.5 == pytest.approx(LR * CLIP, rel=1e-4), "clipped to the norm asked for"


@pytest.mark.parametrize("name", ALL)
def test_a_gradient_that_is_not_finite_is_reported_and_not_taken(ran, name):
    out, figures = ran
    assert figures[name]["poisoned"] in ("inf", "nan")
    before, after = weights(out, name, 1), weights(out, name, 2)
    assert all(torch.equal(before[parameter], after[parameter]) for parameter in before)
    reference = f"{'lora' if ALL[name]['lora'] else 'full'}-plain-x1-micro1"
    assert figures[name]["after"] == pytest.approx(figures[reference]["after"], rel=1e-4 if name in FP32 else 2e-2), (
        "and training goes on"
    )


def test_more_engines_are_known_to_the_matrix():
    assert set(NAMES) <= set(ENGINES | MORE_ENGINES)
