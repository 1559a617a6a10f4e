"""The check at start finds every leak on the real model, and nothing where there is none."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from configs.errors import ConfigError
from tests.cells import PACKING
from tests.tiny_families import FAMILIES, build
from tests.unit.test_packed_families import QUICK, packed
from train.engine.base import World
from train.models.families import FAMILIES as FACTS
from train.ops.packed_mixers import attention_for_packing
from train.ops.packing_check import check_packing, lengths_for

LEAKY = tuple(name for name in FAMILIES if FACTS[name].packed_mixers and name not in ("deepseek_v32", "glm_moe_dsa"))
"""Those of sparse attention alone honour the boundaries themselves; their choice is what differs."""


def params(names, quick=QUICK):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


def check(model, name: str) -> list[str]:
    notes: list[str] = []
    dtype = next(p.dtype for p in model.parameters())
    cpu = torch.device("cpu")
    check_packing(model, model, FACTS[name], device=cpu, dtype=dtype, world=World(), note=notes.append)
    return notes


def bare(model, name: str):
    """The model without its wrapped mixers."""
    if (attention := attention_for_packing(FACTS[name])) != "sdpa":
        model.set_attn_implementation(attention)
    return model


@pytest.mark.cell(PACKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", params(FAMILIES))
def test_what_is_exact_passes(name, dtype):
    model = packed(build(name, dtype=dtype).train(), name)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    (told,) = check(model, name)
    assert "packing checked on this model" in told
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[part]) for part, tensor in model.state_dict().items())


@pytest.mark.cell(PACKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", params(LEAKY))
def test_every_family_that_leaks_is_stopped_without_its_wrapped_mixers(name, dtype):
    with pytest.raises(
        ConfigError, match="packing: samples of a row are not kept apart on this model[\\s\\S]*packing=off"
    ):
        check(bare(build(name, dtype=dtype), name), name)


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa"])
def test_ties_of_a_top_k_are_told_and_stop_nothing(name):
    """Without wrapped layers other rows' widths break ties: no sample sees another, the choice is another."""
    told, _ = check(build(name), name)
    assert "breaks ties by the width of a row" in told


@pytest.mark.parametrize("name", ["qwen3_5_text", "deepseek_v4"])
def test_one_layer_that_leaks_is_enough(name):
    model = packed(build(name), name)
    last = [m for m in model.modules() if type(m).__name__ in FACTS[name].packed_mixers][-1]
    del last.forward  # of the wrapped layers the last
    with pytest.raises(ConfigError, match="not kept apart"):
        check(model, name)


def test_wrong_positions_are_found_by_the_sample_alone():
    """Positions that go on over the row reach no other sample, yet they are not those of the sample alone."""
    model = packed(build("llama"), "llama")

    def forward(position_ids, **rest):
        return model(position_ids=torch.arange(position_ids.shape[1])[None] // 2, **rest)

    with pytest.raises(ConfigError, match="differ from those alone"):
        check_packing(
            forward, model, FACTS["llama"], device=torch.device("cpu"), dtype=torch.float32, world=World(), note=print
        )


def test_both_samples_are_longer_than_every_block_of_the_model():
    """A leak at a boundary between blocks shows only if the samples have whole blocks on both sides."""
    for rates in ({"a": 4, "b": 128}, {"a": 8, "b": 200}):
        config = SimpleNamespace(compress_rates=rates, sliding_window=4096)
        config.get_text_config = lambda config=config: config
        x, y = lengths_for(config)
        assert min(x, y) > max(rates.values()) and all(n % size for n in (x, y) for size in rates.values())
        assert x + y < 1000, "a plain sliding window needs no longer row"


def test_one_rank_that_finds_a_leak_stops_all():
    class Pair(World):
        def all_reduce_sum(self, values):
            return [*values[:4], 0.5, 1.0, 0.5, 1.0]  # the other rank's figures

    world = Pair(rank=0, size=2)
    model = packed(build("llama"), "llama")
    with pytest.raises(ConfigError, match="by 0.5 at its first tokens, by more than 0.001 at 100% of all"):
        check_packing(
            model, model, FACTS["llama"], device=torch.device("cpu"), dtype=torch.float32, world=world, note=print
        )
