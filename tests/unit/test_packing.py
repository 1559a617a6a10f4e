"""No leak: a packed row gives each sample the logits and gradients that it has alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.device import DeviceConfig
from configs.schema.objective import CausalLMConfig
from tests.tiny import TINY_CONFIGS, samples_of, tiny_model, write_prepared
from train.data.collate import collate
from train.data.plan import RowKind
from train.data.prepared import PreparedData
from train.data.sampler import ROW_LENGTHS, RowLayout, fill_step
from train.devices.cpu import CpuDevice
from train.engine.base import World
from train.models.families import FAMILIES, family_of
from train.objectives.causal_lm import CausalLM
from train.ops.packed_attention import PACKED_ATTENTION, Pack, packed_attention, register
from train.run import make_sampler, row_kind

register()
CPU = torch.device("cpu")
LENGTHS = (37, 2, 75, 20)


def packed(model, samples):
    model.set_attn_implementation(PACKED_ATTENTION)
    return collate((tuple(range(len(samples))),), samples.__getitem__, kind=RowKind.packed, device=CPU)


def test_every_family_whose_layers_have_kernels_is_tested_here():
    assert {name for name, family in FAMILIES.items() if family.layers} == set(TINY_CONFIGS)


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_packed_logits_equal_those_of_the_samples_alone(family):
    model = tiny_model(family)
    assert family_of(model.config).packing_exact
    samples = samples_of(LENGTHS, vocab_size=model.config.vocab_size)
    with torch.no_grad():
        batch = packed(model, samples)
        inputs = batch.model_inputs() | {"logits_to_keep": 0}
        rows = model(**inputs).logits[0].split(LENGTHS)
        model.set_attn_implementation("sdpa")
        for sample, row in zip(samples, rows, strict=True):
            alone = model(input_ids=torch.from_numpy(sample.input_ids.astype(np.int64))[None]).logits[0]
            torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_another_sample_in_the_row_changes_nothing(family):
    """Immune to rounding: same shapes, same kernels, so the difference must be exactly 0."""
    model = tiny_model(family)
    a, b = (samples_of(LENGTHS, vocab_size=model.config.vocab_size, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        first = model_logits(model, a)
        second = model_logits(model, [b[0], a[1], b[2], a[3]])
    for i, (x, y) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(x, y) == (i in (1, 3))


def model_logits(model, samples):
    inputs = packed(model, samples).model_inputs() | {"logits_to_keep": 0}
    return model(**inputs).logits[0].split(LENGTHS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_packed_padded_and_single_rows_are_equal(checkpointing):
    gradients = {}
    for kind in RowKind:
        model = tiny_model("llama").train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        samples = samples_of(LENGTHS, vocab_size=model.config.vocab_size)
        model.set_attn_implementation(PACKED_ATTENTION if kind is RowKind.packed else "sdpa")
        rows = {
            RowKind.packed: [((0, 1, 2, 3),)],
            RowKind.padded: [((2,), (0,), (3,), (1,))],
            RowKind.single: [((i,),) for i in range(4)],
        }[kind]
        objective = CausalLM(CausalLMConfig())
        for micro_batch in rows:
            batch = collate(micro_batch, samples.__getitem__, kind=kind, device=CPU)
            objective.loss_sum(model, batch).backward()
        gradients[kind] = {n: p.grad for n, p in model.named_parameters()}
    for kind in (RowKind.padded, RowKind.single):
        for name, gradient in gradients[RowKind.packed].items():
            error = (gradients[kind][name] - gradient).norm() / gradient.norm()
            assert error < 1e-5, (kind, name, error)


def test_a_filler_gives_zero_loss_and_zero_gradients():
    model = tiny_model("llama").train()
    model.set_attn_implementation(PACKED_ATTENTION)
    loss = CausalLM(CausalLMConfig()).loss_sum(model, collate((), [].__getitem__, kind=RowKind.packed, device=CPU))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_supervised_positions_are_those_before_the_spans():
    [sample] = samples_of((10,), vocab_size=50, spans=[[[2, 4], [7, 10]]])
    batch = collate(((0,),), [sample].__getitem__, kind=RowKind.padded, device=CPU)
    assert batch.predicts_BT[0].nonzero().flatten().tolist() == [1, 2, 6, 7, 8]
    assert batch.targets_N.tolist() == sample.input_ids[[2, 3, 7, 8, 9]].tolist()


def test_positions_begin_anew_with_each_sample_and_padding_is_masked():
    """Rotary models would not notice the one, causal ones not the other; both are what a model is promised."""
    samples = samples_of((3, 2), vocab_size=50)
    batch = collate(((0, 1),), samples.__getitem__, kind=RowKind.packed, device=CPU)
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1]] and batch.attention_mask_BT is None
    batch = collate(((0,), (1,)), samples.__getitem__, kind=RowKind.padded, device=CPU)
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_scaling_and_dropout_of_the_model_are_taken_and_soft_caps_refused():
    q, k, v = torch.randn(3, 1, 2, 6, 4).unbind()
    layer, pack = torch.nn.Module(), Pack(((6,),))
    out, _ = packed_attention(layer, q, k, v, None, scaling=0.1, pack=pack)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.1)
    torch.testing.assert_close(out.transpose(1, 2), expected)
    assert not torch.equal(packed_attention(layer, q, k, v, None, dropout=0.5, scaling=0.1, pack=pack)[0], out)
    with pytest.raises(AssertionError, match="softcapped"):
        packed_attention(layer, q, k, v, None, pack=pack, softcap=30.0)


def test_the_loss_is_summed_in_fp32_whatever_the_working_weights():
    """In bf16 a sum over some hundred tokens would keep three digits."""
    logits = torch.randn(1, 300, 97, generator=torch.Generator().manual_seed(0)).bfloat16()
    [sample] = samples_of((301,), vocab_size=97, spans=[[[1, 301]]])
    batch = collate(((0,),), [sample].__getitem__, kind=RowKind.single, device=CPU)
    loss = CausalLM(CausalLMConfig()).loss_sum(lambda **_: SimpleNamespace(logits=logits), batch)
    expected = torch.nn.functional.cross_entropy(logits[0].double(), batch.targets_N, reduction="sum")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def rows_of(step: int, most: int) -> RowLayout:
    return RowLayout(0, 1, most, RowKind.packed, CPU, step=step)


def test_a_row_is_filled_up_to_a_multiple_and_never_beyond_a_micro_batch():
    assert [rows_of(64, 200).fill_to(tokens) for tokens in (1, 64, 65, 130, 199, 200)] == [64, 64, 128, 192, 200, 200]
    assert [rows_of(1, 200).fill_to(tokens) for tokens in (1, 65)] == [1, 65]


@pytest.mark.parametrize("family", sorted(TINY_CONFIGS))
def test_what_fills_a_row_up_changes_nothing_and_counts_for_nothing(family):
    model = tiny_model(family).train()
    model.set_attn_implementation(PACKED_ATTENTION)
    samples = samples_of(LENGTHS, vocab_size=model.config.vocab_size)
    found = []
    for step in (1, 64):
        micro_batch = (tuple(range(4)),)
        batch = collate(
            micro_batch, samples.__getitem__, kind=RowKind.packed, device=CPU, fill_to=rows_of(step, 999).fill_to
        )
        assert batch.input_ids_BT.shape[1] == {1: 134, 64: 192}[step]
        assert batch.lengths() == (LENGTHS,) and batch.num_tokens == 134
        loss = CausalLM(CausalLMConfig()).loss_sum(model, batch)
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    for name, gradient in found[0][1].items():
        assert (found[1][1][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_in_bf16_rows_of_a_cpu_have_few_lengths(tmp_path):
    """Each new length of a row costs a host's library new code for every product."""
    write_prepared(tmp_path, {"train": samples_of(range(20, 120), vocab_size=50)})
    widths = {}
    for precision in ("bf16", "fp32"):
        words = [f"dataset.path={tmp_path}", "model.path=m", f"model.precision={precision}", "device=cpu"]
        cfg = compose("train", [*words, "batch_tokens=1500", "micro_batch_tokens=1024", "max_length=120"])
        device = CpuDevice(DeviceConfig())
        data = PreparedData.open(tmp_path)
        sampler = make_sampler(cfg, data, RowKind.packed, FAMILIES["llama"], device, World(), print)
        steps = [sampler.step(step) for step in range(8)]
        batches = [batch for step in steps for batch in sampler.batches(step)]
        assert sum(b.num_tokens for b in batches) == sum(step.num_tokens for step in steps)
        widths[precision] = {b.input_ids_BT.shape[1] for b in batches}
    assert all(width % 64 == 0 for width in widths["bf16"]) and len(widths["bf16"]) < len(widths["fp32"])
    wrapped = make_sampler(cfg, data, RowKind.packed, FAMILIES["qwen3_next"], device, World(), print)
    assert wrapped.rows.step == 1, "its mixers would take what fills a row up for a sample"


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
OF_EACH_KIND = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": LONGROPE}


@pytest.mark.parametrize(
    ("rope", "most", "turns"),
    [
        (LONGROPE, 512, ("longrope", 64)),
        (DYNAMIC, 96, ("dynamic", 96)),
        (LONGROPE | {"rope_type": "yarn"}, 512, None),
        ({"rope_type": "default", "rope_theta": 1e4}, 512, None),
        (OF_EACH_KIND, 512, ("longrope", 64)),
    ],
)
def test_positions_that_turn_by_the_longest_sample_are_known(rope, most, turns):
    config = SimpleNamespace(model_type="llama", max_position_embeddings=most, rope_parameters=rope)
    config.get_text_config = lambda: config
    assert family_of(config).turns_by_length == turns


def test_samples_whose_positions_turn_by_the_longest_of_a_pass_share_none():
    """What packing would do to them is real: behind a long sample a short one has other logits."""
    model = tiny_model("llama", rope_parameters=LONGROPE, max_position_embeddings=512)
    model.set_attn_implementation(PACKED_ATTENTION)
    long, short = (each.input_ids for each in samples_of((90, 30), vocab_size=97))

    def logits(*rows):
        lengths = tuple(len(row) for row in rows)
        ids = torch.from_numpy(np.concatenate(rows)).long()[None]
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        with torch.no_grad():
            return model(input_ids=ids, position_ids=places, pack=Pack((lengths,)), use_cache=False).logits[0, -30:]

    assert (logits(long, short) - logits(short)).abs().max() > 1e-2
    assert torch.allclose(logits(long[:60], short), logits(short), atol=1e-4)

    family, notes = family_of(model.config), []
    words = ["model.path=x", "dataset.path=x"]
    assert row_kind(compose("train", [*words, "max_length=64"]), family, notes.append, 1) is RowKind.packed
    assert not notes
    assert row_kind(compose("train", [*words, "max_length=65"]), family, notes.append, 1) is RowKind.single
    assert "65, but positions beyond 64" in notes[0] and "one sample" in notes[0]
    for packing in ("on", "off"):
        with pytest.raises(ConfigError, match="no two samples may share one"):
            row_kind(compose("train", [*words, "max_length=65", f"packing={packing}"]), family, notes.append, 1)
    model.config.rope_parameters = DYNAMIC
    with pytest.raises(ConfigError, match="by the order of the data"):
        row_kind(compose("train", [*words, "max_length=513"]), family_of(model.config), notes.append, 1)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks"), [(1024, 16384, 2), (4096, 65536, 4), (1536, 2047, 1), (99999, 2048, 1)]
)
def test_rows_have_few_lengths_and_waste_little(batch, micro, ranks):
    step = fill_step(64, 300, batch_tokens=batch, world_size=ranks, micro_batch_tokens=micro)
    widest = min(micro, max(300, -(-batch // ranks)))
    assert step % 64 == 0 and len(range(0, widest, step)) <= ROW_LENGTHS
    assert step == 64 or step <= widest // 8
    assert fill_step(1, 300, batch_tokens=batch, world_size=ranks, micro_batch_tokens=micro) == 1
