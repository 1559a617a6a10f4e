"""Every family under ZeRO-2 and ZeRO-3 takes the steps of one process, whichever experts a rank's tokens go to.

All that was selected runs in one pair of processes (`tests/distributed/families.py`); the tests look at what it left.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cells import FAMILIES, ROUTED, UNEVEN, ZERO2, ZERO3
from tests.distributed.families import CLIP, STEPS, Case, reference_of, resaver, worker
from tests.distributed.forks import Ranks, in_ranks
from train.checkpoint.layout import CheckpointReader

pytestmark = pytest.mark.distributed

QUICK = ("deepseek_v3", "minimax_m2", "deepseek_v4", "qwen3_5")
COLUMNS = {"zero2": ZERO2, "zero3": ZERO3, "zero3-uneven": UNEVEN}
SECONDS = 60.0
"""For one case, a hundred times what it takes: one that takes longer hangs."""


def cell(name: str, kind: str) -> pytest.param:
    marks = [pytest.mark.cell(COLUMNS[kind])] + ([] if name in QUICK else [pytest.mark.slow])
    return pytest.param(name, kind, marks=marks, id=f"{name}-{kind}")


CELLS = [cell(name, kind) for name in FAMILIES for kind in COLUMNS if kind != "zero3-uneven" or name in ROUTED]
EXPERTS = [
    pytest.param("deepseek_v3", "zero3-experts"),
    *(pytest.param(name, "zero3-experts", marks=pytest.mark.slow) for name in ROUTED if name != "deepseek_v3"),
]
BF16 = [
    pytest.param("deepseek_v4", "zero2-bf16"),
    *(pytest.param("deepseek_v4", kind, marks=pytest.mark.slow) for kind in ("zero1-bf16", "zero3-bf16")),
    *(pytest.param("deepseek_v4", kind, marks=pytest.mark.slow) for kind in ("zero2-hyper-bf16", "zero3-hyper-bf16")),
    *(pytest.param(name, "zero2-bf16", marks=pytest.mark.slow) for name in ("bailing_hybrid", "glm5_next")),
]


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory) -> Path:
    """The folder with what the ranks left of every case that a test asks for."""
    out = tmp_path_factory.mktemp("families")
    own = [item.callspec.params for item in request.session.items if item.fspath == request.node.fspath]
    cases = list(dict.fromkeys((params["name"], params["kind"]) for params in own))
    ranks = Ranks(worker, 2, out, cases, logs=out, environment={})
    done: set[str] = set()
    try:
        while (codes := ranks.wait(SECONDS)) == [None, None]:
            before, done = done, {path.name for path in out.glob("*.json")}
            if done == before:
                break
    finally:
        ranks.kill()
    (out / "end").write_text(
        f"exit codes {codes}; None: it had not ended, and waits for the other if that has\n{ranks.output()}"
    )
    return out


def figures(out: Path, label: str) -> dict:
    """What rank 0, or the one that ran alone, left."""
    files = sorted(out.glob(f"{label}.?.json"))
    assert files, f"{label} did not end\n{(out / 'end').read_text()}"
    return json.loads(files[0].read_text())


def changes(out: Path, case: Case) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By parameter: how far it went, how far it went in one process, and what it was before."""
    before = load_file(out / f"{reference_of(case)}.before")
    found = []
    for label in (case.label, reference_of(case)):
        with CheckpointReader(out / label / f"step-{STEPS:08d}") as reader:
            assert set(reader.params) == set(before)
            found.append({name: reader.read(name) - before[name] for name in before})
    return *found, before


def must_equal_one_process(out: Path, case: Case, relative: float) -> None:
    """Loss and norm of each step and the way of each weight."""
    got, expected = figures(out, case.label)["steps"], figures(out, reference_of(case))["steps"]
    for a, b in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
        assert a["norm"] > CLIP, "the step must be one that is clipped"
    here, alone, before = changes(out, case)
    whole = length(alone)
    for name, change in alone.items():
        # One rounding of the weight itself, or of a gradient that is nothing but rounding, is no fault.
        noise = 1e-7 * before[name].norm() + 1e-6 * whole
        assert (here[name] - change).norm() <= relative * change.norm() + noise, name


def length(vectors: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([vector.norm() for vector in vectors.values()]).norm())


@pytest.mark.parametrize(("name", "kind"), CELLS)
def test_two_ranks_take_the_steps_of_one_process(ran, name, kind):
    case = Case(name, kind)
    must_equal_one_process(ran, case, relative=5e-4)
    if case.uneven:
        hits = [json.loads((ran / f"{case.label}.{rank}.json").read_text())["hits"] for rank in (0, 1)]
        assert any(set(a) ^ set(b) for a, b in zip(*hits, strict=True)), "the ranks must use different experts"


@pytest.mark.parametrize(("name", "kind"), EXPERTS)
def test_adapters_on_experts_only_take_the_steps_of_one_process(ran, name, kind):
    must_equal_one_process(ran, Case(name, kind), relative=5e-4)


@pytest.mark.parametrize(("name", "kind"), BF16)
def test_parts_in_fp32_train_beside_bf16(ran, name, kind):
    case = Case(name, kind)
    found = figures(ran, case.label)
    here, alone, _ = changes(ran, case)
    assert found["steps"][0] == pytest.approx(figures(ran, reference_of(case))["steps"][0], rel=2e-3)
    # Stage 3 adds up some bf16 gradients in another order: 0.01 after one step, where bf16 itself is 0.14 from fp32.
    close = 0.15 if kind.startswith("zero3") else 1e-3
    for part in (set(found["fp32"]) & set(alone), set(alone) - set(found["fp32"])):
        expected = {name: alone[name] for name in part}
        assert length({name: here[name] - expected[name] for name in part}) <= close * length(expected)
    assert found["disagreement"], "of a part in fp32, which every rank holds"


@pytest.mark.parametrize(("name", "kind"), BF16[:3])
def test_what_stays_in_fp32_is_what_the_family_says(ran, name, kind):
    kept = figures(ran, Case(name, kind).label)["fp32"]
    for part in ("attn_hc.fn", "ffn_hc.base", "hc_head.hc_scale", "sinks", "position_bias", "e_score_correction_bias"):
        assert any(entry.endswith(part) for entry in kept), part
    assert {entry for entry in kept if "norm" in entry} and not any("proj" in entry for entry in kept)


@pytest.mark.parametrize(("name", "kind"), BF16[:3])
def test_a_step_that_is_not_finite_in_one_part_is_taken_in_none(ran, name, kind):
    found = figures(ran, Case(name, kind).label)
    for part in (torch.float32, torch.bfloat16):
        norm, unchanged = found[str(part)]
        assert norm in ("inf", "nan") and unchanged, part


def must_be_the_same_checkpoint(first: Path, second: Path) -> None:
    """Weights and optimizer state, bit by bit."""
    with (
        CheckpointReader(first / f"step-{STEPS:08d}") as a,
        CheckpointReader(second / f"step-{STEPS:08d}") as b,
    ):
        assert list(a.params) == list(b.params)
        for name, entry in a.params.items():
            assert sorted(entry.kinds) == sorted(b.params[name].kinds) == ["master", "momentum_buffer"]
            for kind in entry.kinds:
                assert torch.equal(a.read(name, kind), b.read(name, kind)), f"{name}: {kind}"


@pytest.mark.parametrize(("name", "kind"), BF16[:1])
def test_checkpoints_pass_between_kinds_of_sharding(ran, name, kind):
    case = Case(name, kind)
    figures(ran, case.label)
    alone, label = reference_of(case), case.label
    must_be_the_same_checkpoint(ran / alone, ran / f"{alone}-under-zero2-x2")
    for sharding in ("plain", "zero3"):
        must_be_the_same_checkpoint(ran / label, ran / f"{label}-under-{sharding}-x2")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), BF16[:1])
def test_checkpoints_pass_between_numbers_of_ranks(ran, name, kind):
    case = Case(name, kind)
    figures(ran, case.label)
    there, shardings = [case.label, f"{case.label}-under-zero3-x2"], ["plain", "zero2", "zero3"]
    in_ranks(resaver, 1, ran, (name, kind), there, shardings)
    back = [f"{case.label}-under-{sharding}-x1" for sharding in shardings]
    in_ranks(resaver, 2, ran, (name, kind), back, shardings)
    for source, ranks in ((there, 1), (back, 2)):
        for label in source:
            for sharding in shardings:
                must_be_the_same_checkpoint(ran / case.label, ran / f"{label}-under-{sharding}-x{ranks}")
