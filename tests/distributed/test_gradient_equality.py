"""One global step gives one gradient, however its samples are laid out: the promise behind the loss of DESIGN.md.

Each case trains one step of plain gradient descent through the real command, with a learning rate so large that the
change of the weights is the gradient to fp32 rounding.
"""

from __future__ import annotations

import pytest

from tests.command import crosstune, final_weights, metrics_of, write_uneven_records
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.distributed

LR = 100.0
CASES = {
    "padded": ["packing=off"],
    "accumulation": ["micro_batch_tokens=320"],
    "two ranks": ["nproc=2"],
    "two ranks, padded, accumulation": ["nproc=2", "packing=off", "micro_batch_tokens=320"],
    "activation checkpointing": ["activation_checkpointing=true"],
    "zero1": ["sharding=zero1", "nproc=2"],
    "zero2": ["sharding=zero2", "nproc=2", "micro_batch_tokens=320"],
    "zero3": ["sharding=zero3", "nproc=2"],
    "zero3, accumulation": ["sharding=zero3", "nproc=2", "micro_batch_tokens=320"],
    "zero2, offload, accumulation": ["sharding=zero2_offload", "nproc=2", "micro_batch_tokens=320"],
}
# The engines' own tests cover the rest of the matrix in one process; here each case is a command of its own.
IN_DEFAULT_SUITE = {
    ("full", "padded"),
    ("full", "zero3"),
}


class Steps:
    """Takes the step in the layouts asked for; the reference is one packed pass on one rank."""

    def __init__(self, tmp, tuning):
        self.tmp, self.tuning = tmp, tuning
        self.model = save_tiny_model(tmp / "model")
        self.data = write_uneven_records(tmp / "data.jsonl")
        self.start = self.weights("start", "optim.lr=0")
        self.reference = self.weights("reference", f"optim.lr={LR}")
        self.record = metrics_of(self.tmp / "reference")[0]

    def weights(self, name, *overrides):
        crosstune(
            "train",
            f"model.path={self.model}",
            f"dataset.path={self.data}",
            f"run_dir={self.tmp / name}",
            f"cache_dir={self.tmp / 'cache'}",
            f"tuning={self.tuning}",
            "model.precision=fp32",
            "max_length=320",
            "batch_tokens=100000",
            "micro_batch_tokens=20000",
            "max_steps=1",
            "optim=sgd",
            "optim.max_grad_norm=0",
            "schedule=constant",
            *overrides,
        )
        return final_weights(self.tmp / name)


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory):
    """Makes the reference steps of a tuning method once."""
    made = {}

    def steps(tuning):
        if tuning not in made:
            made[tuning] = Steps(tmp_path_factory.mktemp(tuning), tuning)
        return made[tuning]

    return steps


@pytest.mark.parametrize("tuning", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_batch_is_uneven_and_the_gradient_is_not_zero(steps_of, tuning):
    steps = steps_of(tuning)
    assert steps.record["supervised_tokens"] < steps.record["tokens"] / 2
    assert steps.record["grad_norm"] > 0
    moved = [name for name in steps.start if not steps.start[name].equal(steps.reference[name])]
    # The B matrices of LoRA start at zero, so that the first gradient of the A matrices is zero.
    assert moved == [n for n in steps.start if "lora_A" not in n]


@pytest.mark.parametrize(
    ("tuning", "case"),
    [
        pytest.param(tuning, case, marks=() if (tuning, case) in IN_DEFAULT_SUITE else pytest.mark.slow)
        for tuning in ("full", "lora")
        for case in CASES
    ],
)
def test_gradients_equal_those_of_one_packed_pass(steps_of, tuning, case):
    steps = steps_of(tuning)
    folder = case.replace(" ", "_").replace(",", "")
    weights = steps.weights(folder, f"optim.lr={LR}", *CASES[case])
    for name, start in steps.start.items():
        gradient = steps.reference[name] - start
        error = (weights[name] - steps.reference[name]).norm()
        assert error <= 1e-5 * gradient.norm(), f"{name}: relative error {error / gradient.norm():.1e}"
    record = metrics_of(steps.tmp / folder)[0]
    assert record["data_hash"] == steps.record["data_hash"]
    for key in ("loss", "grad_norm"):
        assert record[key] == pytest.approx(steps.record[key], rel=1e-5)
