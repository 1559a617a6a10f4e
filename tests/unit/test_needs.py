"""What a loaded model asks of an engine, and rows that are shorter than what its attention compresses."""

from __future__ import annotations

import copy

import pytest
import torch

from configs.schema.tuning import LoraConfig
from tests.cells import DENSE, FAMILIES, ROUTED
from tests.tiny_families import build, save
from train.engine.needs import ModelNeeds, needs_of
from train.models.families import family_of
from train.models.load import load_model
from train.models.short_rows import COMPRESSORS, always_compress
from train.tuning.lora import LoraTuning

QUICK = ("deepseek_v3", "step3p7", "qwen3_5")


class OneByOne(torch.nn.Module):
    """A mixture as an unknown model may hold it: a list of experts beside a router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(4, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_experts_are_gathered_as_one(name):
    as_one = needs_of(build(name)).as_one
    experts = [cls.__name__ for cls in as_one if cls.__name__.endswith("Experts")]
    assert bool(experts) == (name in ROUTED) and (name in ROUTED) == (name not in DENSE)


def test_a_list_of_experts_is_gathered_with_its_router():
    assert needs_of(torch.nn.Sequential(OneByOne())) == ModelNeeds(as_one=(OneByOne,))


def test_adapters_follow_the_precision_of_what_they_adapt(tmp_path):
    model = load_model(save("deepseek_v4", tmp_path), dtype=torch.bfloat16)
    cfg = LoraConfig(rank=2, targets=["attention+hyper_connections"], dropout=0.0)
    module = LoraTuning(cfg).apply(model, family_of(model.config))
    needs = needs_of(module)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {name for name in trained if "hc" in name} == trained & needs.fp32 != set()
    assert any(cls.__name__ == "ParamWrapper" for cls in needs.as_one)


def test_fp32_as_working_dtype_asks_for_nothing():
    assert needs_of(build("deepseek_v4")).fp32 == frozenset()


@pytest.mark.parametrize("tokens", [2, 3, 5, 9])
def test_short_rows_use_every_weight_and_change_nothing(tokens):
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (2, tokens))
    logits, gradients = [], []
    for lengthened in (False, True):
        model = build("deepseek_v4").train()
        if lengthened:
            always_compress(model)
        out = model(input_ids=ids, use_cache=False).logits
        out.square().sum().backward()
        logits.append(out.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if ".indexer." not in name})
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients[1].items():
        assert gradient is not None, name
        before = gradients[0][name]
        if before is None:
            assert not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()) + 1e-7)


def test_a_copy_of_a_model_compresses_by_its_own_weights():
    torch.manual_seed(0)
    ids = torch.randint(3, 300, (1, 5))
    model = build("deepseek_v4").eval()
    always_compress(model)
    twin = copy.deepcopy(model)
    parts = [part for part in twin.modules() if type(part).__name__ in COMPRESSORS]
    assert parts and all(part.forward.__self__ is part for part in parts)
    model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert all(p.grad is None for p in twin.parameters())
    twin(input_ids=ids, use_cache=False).logits.sum().backward()
    own = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (own[name].grad is None), name
