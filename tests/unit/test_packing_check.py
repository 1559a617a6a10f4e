"""The check at start finds every leak, on a row that is long enough for it, and cries at nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import MethodType, SimpleNamespace

import pytest
import torch

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.tuning import LoraConfig
from tests.cells import PACKING
from tests.tiny import samples_of, write_prepared
from tests.tiny_families import FAMILIES as NAMES
from tests.tiny_families import build, save
from tests.unit.packing_kit import CPU, LEAKY, kinds, packable, unwrapped
from train.engine.base import World
from train.models.families import FAMILIES
from train.ops import packed_mixers, packing_check
from train.ops.packing_check import TOLERANCE, Row, check_packing, lengths_for
from train.run import train
from train.tuning.lora import LoraTuning

DTYPES = (torch.float32, torch.bfloat16)
QUICK = ("qwen3_5", "deepseek_v4", "minimax", "minimax_m3_vl")


def some(names, quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def check(model, name, dtype=torch.float32, *, forward=None, world=None):
    """What was noted."""
    notes = []
    world = world or World()
    check_packing(forward or model, model, FAMILIES[name], device=CPU, dtype=dtype, world=world, note=notes.append)
    return notes


@pytest.mark.cell(PACKING)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", some(NAMES, (*QUICK, "llama", "step3p7")))
def test_every_family_passes_as_it_is_packed(name, dtype):
    [note] = check(packable(name, dtype=dtype), name, dtype)
    assert "packing checked" in note and " s:" in note


@pytest.mark.cell(PACKING)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", some(LEAKY, QUICK))
def test_a_family_whose_mixers_are_not_wrapped_is_stopped(name, dtype):
    with pytest.raises(ConfigError, match="changing one sample of a row") as caught:
        check(unwrapped(name, dtype=dtype), name, dtype)
    assert str(caught.value).startswith("packing: ") and "at most" in str(caught.value)
    assert "packing=off" in str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", some(LEAKY, ("qwen3_5", "minimax_m3_vl")))
def test_one_layer_that_leaks_is_enough(name, dtype):
    model = packable(name, dtype=dtype)
    for layer in kinds(model, FAMILIES[name])[:4]:
        wrapped, layer.forward = layer.forward, MethodType(whole_row, layer)
        with pytest.raises(ConfigError, match="not kept apart"):
            check(model, name, dtype)
        layer.forward = wrapped
    check(model, name, dtype)


def whole_row(self, hidden_states, *, pack, **kwargs):
    """A layer that takes the row for one sample."""
    make_mask = packed_mixers._MASKS.get(type(self).__name__, packed_mixers._no_mask)
    kwargs["attention_mask"] = make_mask(self, hidden_states, pack)
    return type(self).forward(self, hidden_states, **kwargs)


def compressed_over_the_row(self, hidden_states, *, pack, **kwargs):
    """Softmax attention keeps to its own sample; what is compressed or chosen is the row's."""
    sample = torch.repeat_interleave(torch.arange(len(pack.lengths[0])), torch.tensor(pack.lengths[0]))
    other = sample[:, None] != sample[None, :]
    mask = packed_mixers._sliding(self, hidden_states, pack)
    kwargs["attention_mask"] = mask.masked_fill(other, torch.finfo(mask.dtype).min)
    return type(self).forward(self, hidden_states, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["HCA", "CSA"])
def test_one_compressor_that_leaks_is_enough(kind, dtype):
    model = packable("deepseek_v4", dtype=dtype)
    layer = with_compressor(model, kind)[0]
    layer.forward = MethodType(compressed_over_the_row, layer)
    with pytest.raises(ConfigError, match="not kept apart"):
        check(model, "deepseek_v4", dtype)


def with_compressor(model, kind):
    return [each for each in kinds(model, FAMILIES["deepseek_v4"]) if kind in type(each.compressor).__name__]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_samples_shorter_than_what_is_compressed_show_nothing_so_the_row_is_longer(dtype, monkeypatch):
    """A compressor of 128 tokens that mixes samples, seen by no token before the 128th."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    model = packable("deepseek_v4", dtype=dtype, compress_rates=rates)
    [layer] = with_compressor(model, "HCA")
    layer.forward = MethodType(compressed_over_the_row, layer)
    with pytest.raises(ConfigError, match="not kept apart"):
        check(model, "deepseek_v4", dtype)
    monkeypatch.setattr(packing_check, "lengths_for", lambda config: (24, 13))
    check(model, "deepseek_v4", dtype)


@pytest.mark.parametrize(
    ("name", "changes", "largest"),
    [
        ("llama", {}, 0),
        ("deepseek_v4", {"compress_rates": {"heavily_compressed_attention": 200}}, 200),
        ("minimax", {"block_size": 256}, 256),
        ("minimax_m3_vl", {"index_block_size": 128}, 128),
        ("glm5_next", {"index_kpool": 300}, 300),
        ("mistral", {"sliding_window": 4096}, 0),  # plain attention: its boundaries show in a shorter row as well
    ],
)
def test_both_samples_are_longer_than_every_block_and_multiples_of_none(name, changes, largest):
    config = build(name).config
    for key, value in changes.items():
        setattr(config.get_text_config(), key, value)
    x, y = lengths_for(config)
    assert min(x, y) > max(largest, 128) and x + y < 2048
    assert all(length % block for length in (x, y) for block in (16, 64, 128, largest or 64))


def test_sparse_attention_whose_choice_depends_on_the_row_is_told_and_not_stopped():
    """Ties of its top-k are broken by a row's width: no other sample can be seen."""
    notes = check(unwrapped("deepseek_v32"), "deepseek_v32")
    assert len(notes) == 2 and "nothing leaks" in notes[0]


def test_a_sample_that_is_misplaced_is_found():
    """Nothing leaks, but positions go on from sample to sample."""
    model = packable("llama")

    def forward(*, position_ids, **kwargs):
        return model(position_ids=torch.arange(position_ids.shape[1])[None] ** 2, **kwargs)

    with pytest.raises(ConfigError, match="differ from those alone"):
        check(model, "llama", forward=forward)


def test_a_misplaced_sample_is_no_broken_tie():
    """The top-k of sparse attention excuses differences, but none of the first tokens, which have fewer keys."""
    model = packable("deepseek_v32")

    def forward(*, position_ids, **kwargs):
        return model(position_ids=torch.arange(position_ids.shape[1])[None] ** 2, **kwargs)

    with pytest.raises(ConfigError, match="differ from those alone"):
        check(model, "deepseek_v32", forward=forward)


def test_what_all_logits_have_in_common_hides_no_leak():
    model = unwrapped("qwen3_5_text", dtype=torch.bfloat16)

    def forward(**kwargs):
        out = model(**kwargs)
        out.logits = out.logits + 30
        return out

    with pytest.raises(ConfigError, match="changing one sample of a row"):
        check(model, "qwen3_5_text", torch.bfloat16, forward=forward)


def test_samples_that_a_mixer_takes_together_are_looked_at(monkeypatch):
    """Those of like lengths get each other's tokens; alone or beside others none does."""
    plan = packed_mixers._plan.__wrapped__

    def mixed_up(lengths, device, together):
        found = plan(lengths, device, together)
        groups = tuple(group.roll(1, 0) if len(group) > 1 else group for group in found.groups)
        return replace(found, groups=groups)

    model = packable("qwen3_5_text")
    monkeypatch.setattr(packed_mixers, "_plan", mixed_up)
    with pytest.raises(ConfigError, match="not kept apart"):
        check(model, "qwen3_5_text")


@pytest.mark.parametrize(
    ("share", "both_ways", "stopped"), [(0.05, True, False), (0.05, False, True), (0.5, True, True)]
)
def test_tokens_that_round_over_to_another_expert_are_no_leak(share, both_ways, stopped):
    """What happens as much where nothing can leak is rounding; but rounding does not excuse everything."""
    model = packable("deepseek_v3")

    def forward(*, input_ids, pack, logits_to_keep, **kwargs):
        out = model(input_ids=input_ids, pack=pack, logits_to_keep=logits_to_keep, **kwargs)
        behind = len(pack.lengths[0]) == 2 and bool(logits_to_keep[0, -1])
        if behind or (both_ways and len(pack.lengths[0]) == 2):
            draw = torch.Generator().manual_seed(int(input_ids.sum()))
            flat = out.logits.flatten(0, -2)
            hit = 8 + torch.randperm(len(flat) - 8, generator=draw)[: round(share * len(flat)) // 2]
            flat[hit] += 0.1 * torch.randn(len(hit), flat.shape[-1], generator=draw) * flat[hit].norm(dim=-1)[:, None]
        return out

    if stopped:
        with pytest.raises(ConfigError, match="not kept apart"):
            check(model, "deepseek_v3", forward=forward)
    else:
        check(model, "deepseek_v3", forward=forward)


def test_ranks_stop_together():
    """The other rank has found a leak, this one has not."""

    class OtherFound(World):
        def all_reduce_sum(self, values):
            return [a + b for a, b in zip(values, [0.0] * 4 + [0.9, 0.5, 0.0, 0.0], strict=True)]

    with pytest.raises(ConfigError, match=r"by 0\.9 at its first tokens"):
        check(packable("llama"), "llama", world=OtherFound(rank=0, size=2))


def test_a_model_that_answers_with_nan_does_not_pass():
    model = packable("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="by inf"):
        check(model, "llama")


def test_model_gradients_and_random_numbers_are_left_as_they_were():
    model = packable("qwen3_5", attention_dropout=0.5)
    adapted = LoraTuning(LoraConfig(dropout=0.5)).apply(model, FAMILIES["qwen3_5"]).train()
    model.model.visual.eval()
    modes, before = [module.training for module in adapted.modules()], torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    check(adapted, "qwen3_5")
    assert [module.training for module in adapted.modules()] == modes and len(set(modes)) == 2
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], tensor) for name, tensor in adapted.state_dict().items())
    assert all(parameter.grad is None for parameter in adapted.parameters())


def test_tokens_that_stand_for_images_are_not_drawn():
    config = build("kimi_k25").config
    drawn = torch.cat(packing_check._tokens(config, (5000, 5000, 100), CPU))
    assert not torch.isin(drawn, torch.tensor([310, 311, 312, 313])).any()


def test_only_logits_that_are_looked_at_are_computed():
    """Of a vocabulary of 250,000 they would take more than the model's own."""
    model, sizes = packable("minimax", block_size=300), []

    def forward(**kwargs):
        out = model(**kwargs)
        sizes.append(out.logits.flatten(0, -2).shape[0])
        return SimpleNamespace(logits=out.logits)

    Row(forward, model, CPU, TOLERANCE[torch.float32]).leak()
    assert max(sizes) <= packing_check.SEEN


def test_a_run_is_checked_before_its_first_step_where_rows_are_packed(tmp_path, monkeypatch, caplog):
    """Unless it is told not to, or rows are not packed."""
    model = save("qwen3_5_text", tmp_path / "model")
    data = write_prepared(tmp_path / "data", {"train": samples_of((24, 31, 18), vocab_size=12)})

    def run(*words):
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        paths = [f"model.path={model}", f"dataset.path={data}", f"run_dir={folder}", "device=cpu"]
        fixed = ["max_steps=1", "batch_tokens=80", "micro_batch_tokens=80", "max_length=80", "checkpoint.every=0"]
        caplog.clear()
        with caplog.at_level("INFO"):
            train(compose("train", [*paths, *fixed, *words]), model_dir=model, prepared=data, run_dir=folder)
        return caplog.text

    assert "3 layers of Qwen3_5GatedDeltaNet" in (told := run()) and "packing checked" in told
    monkeypatch.setattr("train.run.wrap_mixers", lambda model, family: 0)
    with pytest.raises(ConfigError, match="packing: .*not kept apart"):
        run()
    assert "packing checked" not in run("check_packing=false")
    assert "packing checked" not in run("packing=off")
