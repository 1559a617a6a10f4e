"""A packed row of every family is its samples alone: losses, and the gradient of every parameter."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from configs.schema.tuning import LoraConfig
from tests.cells import PACKING
from tests.tiny_families import FAMILIES, build
from train.models.families import FAMILIES as FACTS
from train.ops import packed_mixers
from train.ops.packed_attention import Pack
from train.ops.packed_mixers import attention_for_packing, wrap_mixers
from train.tuning.lora import LoraTuning

QUICK = ("qwen3_5", "deepseek_v4", "glm_moe_dsa", "minimax", "minimax_m3_vl", "kimi_linear", "step3p7")
"""One of each kind of mixer."""
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
LENGTHS = ((30, 1, 44, 37), (61, 16, 35))
"""Two rows of one width; a sample of one token, and some longer than every block of the tiny models."""


def rows() -> list[list[torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [[torch.randint(3, 300, (n,), generator=draw) for n in lengths] for lengths in LENGTHS]


def packed(model, name: str):
    """As `train/run.py` prepares a model for packed rows."""
    attention = attention_for_packing(FACTS[name])
    if attention != "sdpa":
        model.set_attn_implementation(attention)
    wrap_mixers(model, FACTS[name])
    return model


def losses_packed(model) -> torch.Tensor:
    """Summed over the tokens of each sample."""
    ids = torch.stack([torch.cat(row) for row in rows()])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    logits = model(input_ids=ids, position_ids=positions, pack=Pack(LENGTHS), use_cache=False).logits
    return torch.stack(
        [
            loss(part, sample)
            for row, lengths, made in zip(rows(), LENGTHS, logits, strict=True)
            for part, sample in zip(made.split(lengths), row, strict=True)
        ]
    )


def losses_alone(model) -> torch.Tensor:
    samples = [sample for row in rows() for sample in row]
    return torch.stack([loss(model(input_ids=s[None], use_cache=False).logits[0], s) for s in samples])


def loss(logits: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:-1].float(), sample[1:], reduction="sum") if len(sample) > 1 else logits.sum() * 0.0


def gradients(model, losses) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    losses.sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def must_be_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of a gradient's own norm, or of a hundredth of the whole, below which rounding decides."""
    assert got.keys() == expected.keys() and len(got) > 5
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), whole / 100), name


@pytest.mark.cell(PACKING)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_of_packed_rows_are_those_of_the_samples_alone(name):
    assert FACTS[name].packing_exact
    model = build(name).train()
    alone = losses_alone(model)
    expected = gradients(model, alone)
    together = losses_packed(packed(copy.deepcopy(model), name))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-4)
    model = packed(model, name)
    must_be_equal(gradients(model, losses_packed(model)), expected)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "qwen3_5" else pytest.mark.slow) for n in QUICK])
def test_activation_checkpointing_runs_the_same_boundaries_again(name):
    model = packed(build(name).train(), name)
    expected = gradients(model, losses_packed(model))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, losses_packed(model))
    assert got.keys() == expected.keys() and all(torch.equal(got[n], g) for n, g in expected.items())


@pytest.mark.parametrize("name", ["deepseek_v4", "qwen3_5"])
def test_adapters_sit_inside_wrapped_mixers(name):
    adapted = LoraTuning(LoraConfig(rank=4, targets=["attention"])).apply(build(name).train(), FACTS[name])
    with torch.no_grad():
        for part, p in adapted.named_parameters():
            if "lora_B" in part:
                p.normal_(std=0.02)
    expected = gradients(adapted, losses_alone(adapted))
    packed(adapted.get_base_model(), name)
    must_be_equal(gradients(adapted, losses_packed(adapted)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_in_bf16_packing_is_as_near_to_fp32_as_the_samples_alone_are(name):
    """A mean over all gradients: single ones flip with a router's choice."""
    truth = build(name).train()
    expected = gradients(truth, losses_alone(truth))
    model = build(name, dtype=torch.bfloat16).train()
    alone = gradients(model, losses_alone(model))
    model = packed(model, name)
    together = gradients(model, losses_packed(model))

    def error(got: dict[str, torch.Tensor]) -> float:
        pairs = [(got[n].float() - g, g) for n, g in expected.items() if "experts" not in n]
        return float(
            torch.stack([d.norm() for d, _ in pairs]).norm() / torch.stack([g.norm() for _, g in pairs]).norm()
        )

    assert error(together) <= 1.25 * error(alone)


def test_linear_mixers_take_samples_of_like_length_together_and_others_one_by_one():
    plan = packed_mixers._plan(((100, 90, 80, 30, 10), (310,)), torch.device("cpu"), True)
    assert [tuple(group.shape) for group in plan.groups] == [(1, 310), (3, 100), (2, 30)]
    plan = packed_mixers._plan(((100, 90), (190,)), torch.device("cpu"), False)
    assert [tuple(group.shape) for group in plan.groups] == [(1, 190), (1, 100), (1, 90)]


def test_rows_of_one_sample_run_as_transformers_wrote_them():
    model = build("qwen3_5_text")
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = model(input_ids=ids, use_cache=False).logits
    wrap_mixers(model, FACTS["qwen3_5_text"])
    positions = torch.arange(40).expand(2, -1)
    got = model(input_ids=ids, position_ids=positions, pack=Pack(((40,), (40,))), use_cache=False).logits
    assert torch.equal(got, expected)
