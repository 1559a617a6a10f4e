"""A packed row gives each sample the logits and gradients that it has alone, on every family."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import masking_utils

from configs.schema.tuning import LoraConfig
from tests.cells import PACKING
from tests.tiny_families import FAMILIES as NAMES
from tests.tiny_families import build
from tests.unit.packing_kit import kinds, packable, unwrapped
from train.models.families import FAMILIES
from train.ops import packed_mixers
from train.ops.packed_attention import Pack
from train.ops.packed_mixers import unwrap_mixers, wrap_mixers
from train.tuning.lora import LoraTuning

ONE_OF_EACH_KIND = ("qwen3_5", "kimi_linear", "deepseek_v4", "minimax_m3_vl", "glm_moe_dsa")
LONG = (300, 140, 1, 37)
"""Above every block, window and compression rate, below each of them, and a single token."""
EVEN = (40, 33, 1, 38, 30, 21)
"""Linear mixers take these together, padded."""


def some(quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in NAMES]


def samples_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (n,), generator=draw) for n in lengths]


def packed_logits(model, rows):
    """Of each sample, for rows of samples."""
    lengths = tuple(tuple(len(sample) for sample in row) for row in rows)
    ids = torch.stack([torch.cat(row) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    out = model(input_ids=ids, position_ids=positions, pack=Pack(lengths), use_cache=False).logits
    return [piece for row, sizes in zip(out, lengths, strict=True) for piece in row.split(sizes)]


def alone(model, sample):
    return model(input_ids=sample[None], use_cache=False).logits[0]


def loss_of(logits, sample):
    """A sum over the next tokens; for a single token, which has none, over its logits, so that it counts too."""
    if len(sample) == 1:
        return logits.float().logsumexp(-1).sum()
    return F.cross_entropy(logits[:-1].float(), sample[1:], reduction="sum")


def gradients(model, losses):
    """Of every parameter that gets one; `losses` are taken one after the other."""
    for loss in losses:
        loss.backward()
    found = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def packed_gradients(model, samples):
    logits = packed_logits(model, [samples])
    return gradients(model, [sum(loss_of(*each) for each in zip(logits, samples, strict=True))])


def gradients_alone(model, samples):
    return gradients(model, (loss_of(alone(model, sample), sample) for sample in samples))


def worst(found, expected):
    """Largest relative error of a parameter's gradient; those below 1e-3 of the whole are measured against that."""
    assert found.keys() == expected.keys()
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    return max(float((found[name] - g).norm() / max(g.norm(), 1e-3 * whole)) for name, g in expected.items())


@pytest.mark.cell(PACKING)
@pytest.mark.parametrize("name", some(ONE_OF_EACH_KIND))
@pytest.mark.parametrize("lengths", [LONG, EVEN], ids=["long", "even"])
def test_logits_and_gradients_are_those_of_the_samples_alone(name, lengths):
    reference, model = build(name), packable(name)
    samples = samples_of(lengths)
    with torch.no_grad():
        for sample, row in zip(samples, packed_logits(model, [samples]), strict=True):
            expected = alone(reference, sample)
            assert (row - expected).norm() <= 1e-5 * expected.norm(), len(sample)
    error = worst(packed_gradients(model.train(), samples), gradients_alone(reference.train(), samples))
    assert error < 2e-5, error


@pytest.mark.parametrize("name", some(("kimi_linear", "deepseek_v4")))
def test_several_rows_are_kept_apart_as_well(name):
    """Rows of different lengths, and rows of one sample, which go through whole."""
    reference, model = build(name), packable(name)
    samples = samples_of((9, 31, 22, 18, 40, 40))
    rows = [samples[:2], samples[2:4]], [samples[4:5], samples[5:]]
    with torch.no_grad():
        for batch in rows:
            found = packed_logits(model, batch)
            for sample, logits in zip([*batch[0], *batch[1]], found, strict=True):
                torch.testing.assert_close(logits, alone(reference, sample), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", some(("qwen3_5", "glm_moe_dsa")))
def test_activation_checkpointing_changes_no_gradient(name):
    model = packable(name).train()
    samples = samples_of(EVEN)
    expected = packed_gradients(model, samples)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert worst(packed_gradients(model, samples), expected) < 1e-6


@pytest.mark.parametrize("name", some(("minimax",)))
def test_adapters_get_the_gradients_of_the_samples_alone(name):
    samples, found = samples_of(EVEN), []
    for model, take in ((build(name), gradients_alone), (packable(name), packed_gradients)):
        torch.manual_seed(0)
        adapted = LoraTuning(LoraConfig(targets=["attention"])).apply(model, FAMILIES[name]).train()
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:  # zero at first, which would hide the gradient of lora_A
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(key)))
        found.append(take(adapted, samples))
    expected, packed = found
    assert expected and all("lora_" in key for key in expected)
    assert worst(packed, expected) < 2e-5


@pytest.mark.parametrize("name", some(("qwen3_next",)))
def test_in_bf16_packing_rounds_no_worse_than_bf16_does(name):
    """Both against fp32 gradients of the same, rounded, weights."""
    samples = samples_of(EVEN)
    exact = build(name, dtype=torch.bfloat16).float().train()
    expected = gradients_alone(exact, samples)
    by_itself = gradients_alone(build(name, dtype=torch.bfloat16).train(), samples)
    in_a_row = packed_gradients(packable(name, dtype=torch.bfloat16).train(), samples)

    def off(found):
        return sum((found[key] - g).norm() ** 2 for key, g in expected.items()).sqrt() / whole

    whole = sum(g.norm() ** 2 for g in expected.values()).sqrt()
    assert off(in_a_row) < 1.3 * off(by_itself) + 1e-3, (off(in_a_row), off(by_itself))


@pytest.mark.parametrize("name", ["deepseek_v4", "minimax_m3_vl", "glm5_next", "deepseek_v32", "kimi_k25", "qwen3_5"])
def test_no_mask_over_the_whole_row_is_made(name, monkeypatch):
    """It would grow with the square of the row."""
    model, samples = packable(name), samples_of(EVEN)
    made = []
    for kind in ("eager", "sdpa"):
        own = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS[kind]
        monkeypatch.setitem(
            masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
            kind,
            lambda *args, own=own, **kwargs: made.append(kwargs) or own(*args, **kwargs),
        )
    with torch.no_grad():
        packed_logits(model, [samples])
        assert not made
        alone(build(name), samples[0])
        assert made or name == "glm5_next", "a mask that is made is seen here"


@pytest.mark.parametrize("name", ["deepseek_v32", "minimax_m3_vl"])
def test_eager_attention_gets_masks_of_its_own_kind(name):
    """Additive ones; SDPA takes boolean ones."""
    model, samples = packable(name), samples_of(EVEN)
    with torch.no_grad():
        by_sdpa = packed_logits(model, [samples])
        model.set_attn_implementation("eager")
        for a, b in zip(packed_logits(model, [samples]), by_sdpa, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_wrapping_is_of_one_model_and_can_be_repeated_copied_and_undone():
    model, other, family = unwrapped("deepseek_v4"), unwrapped("deepseek_v4"), FAMILIES["deepseek_v4"]
    samples = samples_of((40, 33))
    with torch.no_grad():
        leaky = packed_logits(model, [samples])
        assert wrap_mixers(model, family) == wrap_mixers(model, family) == len(kinds(model, family)) == 4
        exact = packed_logits(model, [samples])
        assert torch.equal(packed_logits(other, [samples])[1], leaky[1]), "another model is not touched"
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(packed_logits(twin, [samples])[1], exact[1]), "a copy works on its own weights"
        unwrap_mixers(twin)
        assert torch.equal(packed_logits(twin, [samples])[1], leaky[1])
        assert not torch.allclose(leaky[1], exact[1], atol=1e-2)


def test_boundaries_met_without_gradients_serve_a_training_step():
    """Index tables are kept between passes."""
    model, samples = packable("qwen3_5").train(), samples_of((61, 29))
    with torch.inference_mode():
        packed_logits(model, [samples])
    assert packed_gradients(model, samples)


def test_every_family_knows_how_it_is_packed_and_its_mixers_exist():
    for name in NAMES:
        family, model = FAMILIES[name], build(name)
        found = {type(module).__name__ for module in kinds(model, family)}
        assert family.packing_exact and found == set(family.packed_mixers), name


def test_linear_mixers_take_samples_of_like_length_together_and_others_one_by_one():
    plan = packed_mixers._plan(((100, 90, 80, 30, 10), (310,)), torch.device("cpu"), True)
    assert [tuple(group.shape) for group in plan.groups] == [(1, 310), (3, 100), (2, 30)]
    plan = packed_mixers._plan(((100, 90), (190,)), torch.device("cpu"), False)
    assert [tuple(group.shape) for group in plan.groups] == [(1, 190), (1, 100), (1, 90)]


@pytest.mark.parametrize("name", ["qwen3_5_text", "deepseek_v32"])
def test_rows_of_one_sample_run_as_transformers_wrote_them(name):
    ids, positions = torch.stack(samples_of((40, 40))), torch.arange(40).expand(2, -1)
    with torch.no_grad():
        got = packable(name)(input_ids=ids, position_ids=positions, pack=Pack(((40,), (40,))), use_cache=False).logits
        assert torch.equal(got, build(name)(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4"])
def test_the_layers_of_a_pass_share_one_mask_for_each_length(name, monkeypatch):
    """Each would be kept for the backward pass: layers x t^2."""
    seen = []
    make = dict(packed_mixers._MASKS)
    for mixer in FAMILIES[name].packed_mixers:
        monkeypatch.setitem(
            packed_mixers._MASKS, mixer, lambda *args, make=make[mixer]: seen.append(make(*args)) or seen[-1]
        )
    packed_logits(packable(name), [samples_of((30, 20, 30))])
    assert len(seen) == 3 * build(name).config.num_hidden_layers > 6
    assert len({mask.untyped_storage().data_ptr() for mask in seen}) == 2
