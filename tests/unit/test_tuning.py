"""Which parameters train."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.schema.tuning import FullConfig, LoraConfig
from tests.tiny import tiny_model
from train.models.families import Family, family_of
from train.tuning.base import count_parameters
from train.tuning.full import FullTuning
from train.tuning.lora import LoraTuning


def trained_names(module):
    return [n for n, p in module.named_parameters() if p.requires_grad]


def test_full_trains_everything_and_counts_a_tied_parameter_once():
    model = tiny_model("llama")
    module = FullTuning(FullConfig()).apply(model.requires_grad_(False), family_of(model.config))
    trained, total = count_parameters(module)
    assert trained == total == model.num_parameters()


def test_lora_adapts_the_familys_projections_in_the_layers_asked_for():
    model = tiny_model("llama")
    module = LoraTuning(LoraConfig(rank=4, first_layer=1)).apply(model, family_of(model.config))
    names = trained_names(module)
    assert len(names) == 2 * 7 * 2  # two layers, seven projections, A and B
    assert all(".lora_A.default." in n or ".lora_B.default." in n for n in names)
    assert not any(".layers.0." in n for n in names)


def test_an_unknown_family_gets_every_linear_module_but_the_head():
    model = tiny_model("qwen3")
    names = LoraTuning(LoraConfig()).target_modules(model, Family("unheard_of", False, None))
    assert {n.rsplit(".", 1)[-1] for n in names} == set(family_of(model.config).lora_targets)
    assert "lm_head" not in names


def test_a_model_that_brings_its_own_code_is_an_unknown_family():
    config = tiny_model("llama").config
    config.auto_map = {"AutoModelForCausalLM": "modeling.Mine"}
    assert family_of(config, trust_remote_code=True) == Family("llama", packing_exact=False, lora_targets=None)
    assert family_of(config).packing_exact, "without trust transformers' own class is loaded"


def test_a_target_that_is_not_there_names_the_nearest_that_is():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="'q_porj'.*did you mean 'q_proj'[\\s\\S]*allowed: down_proj, gate_proj"):
        LoraTuning(LoraConfig(targets=["q_porj"])).apply(model, family_of(model.config))
    with pytest.raises(ConfigError, match="tuning.first_layer: 3 leaves no module[\\s\\S]*below 3"):
        LoraTuning(LoraConfig(first_layer=3)).apply(model, family_of(model.config))
