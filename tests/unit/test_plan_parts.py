"""The prediction of what engines treat apart: parts in fp32, and what ZeRO-3 gathers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from configs.compose import compose
from configs.errors import ConfigError
from configs.schema.tuning import FullConfig
from tests.cells import FAMILIES
from tests.tiny_families import save
from tests.unit.test_memory_plan import held, predictor, setting
from train.engine.needs import needs_of
from train.models.families import family_of
from train.models.load import load_model
from train.plan import tape as part
from train.plan.engines import Weight, Zero
from train.plan.gathering import Gathered, Part, gathered, part_of
from train.plan.model import Model
from train.plan.zero_engines import script_of
from train.tuning.full import FullTuning

KEPT = ("deepseek_v4", "bailing_hybrid", "glm5_next")
"""Families with trained parts in fp32: hyper-connections, decay rates of linear attention."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in (*KEPT, "llama") else pytest.mark.slow) for name in FAMILIES]
)
def test_parts_in_fp32_are_those_that_a_run_keeps(tmp_path, name):
    """Planned without weights, and as they are loaded."""
    save(name, tmp_path)
    planned = predictor(tmp_path, "tuning=full", "model.precision=bf16")
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    needs = needs_of(FullTuning(FullConfig()).apply(loaded, family_of(loaded.config)))
    assert planned.needs.fp32 == needs.fp32 == {weight.name for weight in planned.weights if weight.fp32}
    assert {cls.__name__ for cls in planned.needs.as_one} == {cls.__name__ for cls in needs.as_one}
    assert bool(planned.trained_numel - planned.spread_numel) == (name in KEPT)
    whole = predictor(tmp_path, "tuning=full", "model.precision=fp32")
    assert whole.spread_numel == whole.trained_numel, "nothing stands out where all is fp32"


def test_parts_in_fp32_are_whole_on_every_rank_by_hand():
    """A million parameters and a quarter as many in fp32: 4 bytes each of weight, gradient; later 8 of state."""
    weights = [
        Weight("w", torch.Size((1000, 1000)), True),
        Weight("hc", torch.Size((500, 500)), True, fp32=True),
        Weight("frozen", torch.Size((1000, 250)), False, fp32=True),
    ]

    def holds(zero, world=4):
        return held(setting(zero, world=world, size=2, weights=weights))

    assert holds(None) == {part.WEIGHTS: 2 + 2, part.MASTERS: 4, part.GRADIENTS: 4 + 1}, "no master beside them"
    assert holds(Zero(1)) == {part.WEIGHTS: 2 + 2, part.MASTERS: 1, part.GRADIENTS: 4 + 1}
    assert holds(Zero(2)) == {part.WEIGHTS: 2 + 2, part.MASTERS: 1, part.GRADIENTS: 1}
    assert holds(Zero(3), world=2)[part.MASTERS] == 2
    assert holds(Zero(3), world=2)[part.WEIGHTS] == 1 + 2
    for zero, world in (Zero(1), 4), (Zero(2), 4), (Zero(3), 4), (Zero(2, offload=True), 4), (Zero(3), 1):
        made = setting(zero, world=world, size=2, weights=weights)
        script_of(made).write(passes=1, steps=2)
        state, host = (tape.parts_after(len(tape.events) - 1)[part.STATE] / 1e6 for tape in (made.device, made.host))
        assert state == pytest.approx(2 + (0 if zero.offload else 8 / world), rel=0.01)
        assert host == pytest.approx(8 / world if zero.offload else 0, rel=0.01), "what is whole is not offloaded"


def test_gradients_of_parts_in_fp32_are_sent_once_a_step(tmp_path):
    save("deepseek_v4", tmp_path)
    words = ("tuning=full", "model.precision=bf16", "batch_tokens=4096", "micro_batch_tokens=512", "max_length=512")
    sent = {}
    for sharding in ("plain", "zero2", "zero3"):
        one = predictor(tmp_path, *words, f"sharding={sharding}", world=2)
        assert one.passes > 1
        sent[sharding] = one.sent()
    own = 4 * (one.trained_numel - one.spread_numel)
    name = "gradients of parts in fp32, all-reduce"
    assert sent["zero2"][name] == sent["zero3"][name] == own > 0 and name not in sent["plain"]
    assert sent["zero3"]["gradients, reduce-scatter"] == one.passes * 2 * one.spread_numel


def test_nothing_left_to_shard_is_refused_as_a_run_refuses_it(tmp_path):
    save("deepseek_v4", tmp_path)
    lora = ("tuning=lora", "tuning.targets=[hyper_connections]", "model.precision=bf16")
    assert predictor(tmp_path, *lora, world=2).forecast().parts
    with pytest.raises(ConfigError, match="nothing is left to shard"):
        predictor(tmp_path, *lora, "sharding=zero2_offload", world=2).forecast()


def test_what_is_gathered_by_hand():
    """Three layers of 10 and 20 elements under a model with 5 of its own, and a norm that always stays."""
    layers = tuple(Part(parts=(Part(((f"{n}.a", 10),)), Part(((f"{n}.b", 20), (f"{n}.norm", 1))))) for n in range(3))
    root = Part((("own", 5),), layers)

    def most(prefetch=0, max_live=1000, reuse=0):
        return gathered(root, prefetch=prefetch, persistent=1, max_live=max_live, reuse=reuse)

    assert most() == Gathered(large=5 + 20, small=3, fetched=20), "the model's own stay until all below has run"
    assert most(prefetch=1).large == 5 + 3 * 30, "each module asks for more, however little each asks for"
    assert most(prefetch=1).fetched == 20 and most(prefetch=1000).fetched == 3 * 30
    assert most(prefetch=1000, max_live=40).large == 5 + 20 + 10 + 20, "the last one that is asked for comes whole"
    assert most(reuse=50).large == 5 + 10 + 20, "what is used again soon, at the turn, stays"


def test_a_layer_of_experts_is_gathered_as_one():
    """A list of experts comes with all of them and its router; what is never spread does not come."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.bias = nn.Linear(4, 2, bias=False), nn.Parameter(torch.ones(3))
            self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(8))

    model = nn.Sequential(nn.Linear(4, 4, bias=False), Layer())
    found = part_of(model, needs_of(model).as_one, {"1.bias"})
    assert [sum(numel for _, numel in each.weights) for each in found.parts] == [16, 8 + 8 * 16]
    assert found.parts[1].parts == ()
    alone = part_of(model, (), ())
    one, all_of_them = (gathered(each, prefetch=0, persistent=0, max_live=1, reuse=0).large for each in (alone, found))
    assert (one, all_of_them) == (3 + 16, 8 + 8 * 16)
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert gathered(part_of(tied, (), ()), prefetch=99, persistent=0, max_live=99, reuse=0).large == 16


def test_a_model_knows_its_modules(tmp_path):
    """Fused experts of a real family: the gathered layer is all of them."""
    save("glm4_moe", tmp_path)
    cfg_words = ("tuning=full", "model.precision=fp32", "sharding=zero3", "+sharding.deepspeed={zero_optimization:"
                 "{stage3_prefetch_bucket_size:0,stage3_max_reuse_distance:0}}")  # fmt: skip
    one = predictor(tmp_path, *cfg_words, world=2)
    experts = [weight.numel for weight in one.weights if ".layers.1.mlp.experts." in f".{weight.name}"]
    assert len(experts) == 2
    script = script_of(one._setting())
    assert script.gathered().large == 0 and max(experts) < Zero(3).persistent, "all of a tiny model stays"
    one.zero.__dict__["persistent"] = 500
    assert script_of(one._setting()).gathered().large == sum(experts)
    adapted = predictor(tmp_path, "tuning=lora", "tuning.targets=[routed_experts]", *cfg_words[1:], world=2)
    adapted.zero.__dict__["persistent"] = 500
    inside = [weight.numel for weight in adapted.weights if ".layers.1.mlp.experts." in weight.name]
    assert len(inside) == 2 + 4, "with the adapters of both"
    assert script_of(adapted._setting()).gathered().large == sum(numel for numel in inside if numel > 500)


def test_a_model_on_the_meta_device_computes_as_loaded(tmp_path):
    """Parts in fp32 must not keep the trace from running."""
    save("deepseek_v4", tmp_path)
    cfg = compose("train", [f"model.path={tmp_path}", "dataset.path=x", "device=cpu", "tuning=full"])
    one = predictor(tmp_path, "tuning=full", "model.precision=bf16", "max_length=64", model=Model(cfg, tmp_path))
    assert not one.forecast().unknown
