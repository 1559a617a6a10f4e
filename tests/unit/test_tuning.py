"""Which parameters train: on every family just what the user's word means, whatever peft makes of it."""

from __future__ import annotations

import pytest
import torch

from configs.errors import ConfigError
from configs.schema.tuning import Frozen, FullConfig, LoraConfig
from tests.tiny import tiny_model
from tests.tiny_families import CONFIGS, build
from train.models.families import FAMILIES, Family, family_of
from train.tuning.base import count_parameters
from train.tuning.full import FullTuning
from train.tuning.lora import LoraTuning, adapted_weights

VISION = ("vision", "visual", "projector")


def trained_names(module):
    return [n for n, p in module.named_parameters() if p.requires_grad]


def adapted(model, *targets, **changes):
    """Kinds of the weights that get an adapter, without layer numbers: ``self_attn.q_proj``."""
    cfg = LoraConfig(rank=2, targets=list(targets), **changes)
    names = adapted_weights(LoraTuning(cfg).apply(model, family_of(model.config)))
    return {
        n.rpartition(".layers.")[2].partition(".")[2].removesuffix(".weight") if ".layers." in n else n for n in names
    }


MLA = {f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
SOFTMAX = {f"self_attn.{n}" for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
DELTA = SOFTMAX | {f"linear_attn.{n}" for n in ("in_proj_qkv", "in_proj_z", "out_proj")}
NEXT = SOFTMAX | {f"linear_attn.{n}" for n in ("in_proj_qkvz", "out_proj")}
GATED = ("gate_proj", "up_proj", "down_proj")
DENSE = {f"mlp.{n}" for n in GATED}
SHARED = {f"mlp.shared_experts.{n}" for n in GATED}
SHARED_ONE = {f"mlp.shared_expert.{n}" for n in GATED}
NO_LATENT_QUERY = MLA - {"self_attn.q_a_proj", "self_attn.q_b_proj"} | {"self_attn.q_proj"}
KDA = SOFTMAX | {"self_attn.g_a_proj", "self_attn.g_b_proj"}
LING = SOFTMAX | {"self_attn.g_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"}
LATENT_O = {"self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_proj", "self_attn.o_b_proj", "self_attn.o_a_proj"}
LIGHTNING = SOFTMAX | {f"self_attn.{n}" for n in ("qkv_proj", "out_proj", "output_gate")}
FUSED_QKV = {"attention.query_key_value", "attention.dense"}
FUSED_M3 = {"mlp.gate_up_proj", "mlp.down_proj"}
MEANT = {
    "llama": (SOFTMAX, DENSE), "mistral": (SOFTMAX, DENSE), "qwen2": (SOFTMAX, DENSE), "qwen3": (SOFTMAX, DENSE),
    "qwen3_5_text": (DELTA, DENSE), "qwen3_5": (DELTA, DENSE), "qwen3_5_moe": (DELTA, SHARED_ONE),
    "qwen3_5_moe_text": (DELTA, SHARED_ONE), "qwen3_next": (NEXT, SHARED_ONE), "glm4_moe": (SOFTMAX, DENSE | SHARED),
    "glm_moe_dsa": (MLA, DENSE | SHARED), "deepseek_v2": (MLA, DENSE | SHARED), "deepseek_v3": (MLA, DENSE | SHARED),
    "deepseek_v32": (MLA, DENSE | SHARED), "deepseek_v4": (LATENT_O, SHARED), "kimi_k25": (MLA, DENSE | SHARED),
    "kimi_linear": (KDA | NO_LATENT_QUERY, DENSE | SHARED), "bailing_hybrid": (LING, DENSE | SHARED),
    "minimax": (LIGHTNING, set()), "minimax_m2": (SOFTMAX, set()),
    "minimax_m3_vl": (SOFTMAX, FUSED_M3 | {"mlp.shared_experts.gate_up_proj", "mlp.shared_experts.down_proj"}),
    "bailing_moe_v2": (FUSED_QKV, DENSE | SHARED), "bailingmm_moe_v2_lite": (FUSED_QKV, DENSE | SHARED),
    "step3p7": (SOFTMAX, DENSE | SHARED), "glm5_next": (KDA | MLA, DENSE | SHARED),
}  # fmt: skip
"""What `attention`, and what `mlp` means on each family."""
EXPERTS = {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_word_means_on_every_family_what_it_says(name):
    attention, mlp = MEANT[name]
    assert adapted(build(name), "attention") == attention
    assert adapted(build(name)) == attention | mlp, "the default"
    if mlp:
        assert adapted(build(name), "attention+mlp") == attention | mlp
        assert adapted(build(name), "mlp") == mlp
    if any("experts" in each for each in mlp) or "minimax" in name:
        assert adapted(build(name), "routed_experts") == EXPERTS
        assert adapted(build(name), "attention+routed_experts") == attention | EXPERTS
    shared = {each for each in mlp if "shared" in each}
    if shared:
        assert adapted(build(name), "shared_experts") == shared


@pytest.mark.parametrize("name", ["qwen3_5", "kimi_k25", "minimax_m3_vl", "step3p7", "glm5_next", "qwen3_5_moe"])
def test_the_vision_tower_is_adapted_only_when_named(name):
    model = LoraTuning(LoraConfig(rank=2, targets=["vision"])).apply(build(name), FAMILIES[name])
    assert adapted_weights(model) and all(any(m in n for m in VISION) for n in adapted_weights(model))
    model = LoraTuning(LoraConfig(rank=2)).apply(build(name), FAMILIES[name])
    assert not any(m in n for n in adapted_weights(model) for m in VISION)


def test_hyper_connections_are_adapted_by_their_name():
    assert adapted(build("deepseek_v4"), "hyper_connections") >= {"attn_hc.fn", "ffn_hc.fn"}
    with pytest.raises(
        ConfigError, match="'hyper_connections' is no part of this model[\\s\\S]*allowed: attention, mlp"
    ):
        adapted(build("llama"), "hyper_connections")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_full_tuning_trains_all_that_a_gradient_reaches_and_nothing_else(name):
    """What has no gradient would be shrunk by weight decay."""
    model, notes = build(name), []
    FullTuning(FullConfig()).apply(model, family_of(model.config), notes.append)
    ids = torch.randint(3, 300, (2, 70), generator=torch.Generator().manual_seed(1))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == reached and len(trained) > 10
    frozen = {n for n, _ in model.named_parameters()} - trained
    assert all("indexer" in n or "_gate." in n or any(m in n for m in VISION) for n in frozen)
    assert bool(notes) == bool(frozen)
    assert bool(FAMILIES[name].untrained) == any("no gradient" in n for n in notes)


def test_parts_that_stay_as_they_are_can_be_chosen():
    model = build("qwen3_5")
    FullTuning(FullConfig(frozen=[])).apply(model, FAMILIES["qwen3_5"])
    assert all(p.requires_grad for p in model.parameters())
    FullTuning(FullConfig(frozen=[Frozen.embeddings, Frozen.vision])).apply(model, FAMILIES["qwen3_5"])
    frozen = {n.split(".")[-2] for n, p in model.named_parameters() if not p.requires_grad and "visual" not in n}
    assert frozen == {"embed_tokens", "lm_head"}
    with pytest.raises(ConfigError, match="tuning.frozen: 'routed_experts' is no part of this model"):
        FullTuning(FullConfig(frozen=[Frozen.routed_experts])).apply(model, FAMILIES["qwen3_5"])


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


def test_what_is_adapted_is_told_by_kind_and_number():
    notes = []
    LoraTuning(LoraConfig(targets=["attention"])).apply(tiny_model("llama"), FAMILIES["llama"], notes.append)
    assert notes == [f"lora: model.layers.*.self_attn.{n} x 3" for n in ("q_proj", "k_proj", "v_proj", "o_proj")]


def test_an_unknown_family_gets_every_linear_module_but_head_and_routers():
    model = tiny_model("qwen3")
    model.model.layers[0].mlp.router = torch.nn.Linear(32, 4)
    names = adapted_weights(LoraTuning(LoraConfig()).apply(model, Family.unlisted("unheard_of")))
    assert {n.split(".")[-2] for n in names} == {*GATED, "q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(
        ConfigError, match="'attention' is no part of this model; nothing is known of family 'unheard_of'"
    ):
        LoraTuning(LoraConfig(targets=["attention"])).apply(tiny_model("qwen3"), Family.unlisted("unheard_of"))


def test_a_model_that_brings_its_own_code_is_an_unknown_family():
    config = tiny_model("llama").config
    config.auto_map = {"AutoModelForCausalLM": "modeling.Mine"}
    assert family_of(config, trust_remote_code=True) == Family.unlisted("llama")
    assert family_of(config).packing_exact, "without trust transformers' own class is loaded"


def test_a_target_that_is_not_there_names_the_nearest_that_is():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="'q_porj'.*did you mean 'q_proj'[\\s\\S]*allowed: attention, mlp, down_proj"):
        LoraTuning(LoraConfig(targets=["q_porj"])).apply(model, family_of(model.config))
    with pytest.raises(ConfigError, match="tuning.first_layer: 3 leaves no module[\\s\\S]*below 3"):
        LoraTuning(LoraConfig(first_layer=3)).apply(model, family_of(model.config))


@pytest.mark.parametrize("word", ["all-linear", ".*layers\\.2\\.self_attn\\.(q_a_proj|o_proj)", "self_attn.o_proj"])
def test_words_that_peft_would_understand_otherwise_are_refused(word):
    with pytest.raises(ConfigError, match="tuning.targets: [\\s\\S]*allowed: attention, mlp, routed_experts"):
        adapted(build("deepseek_v3"), word)


def test_a_bare_name_never_reaches_routed_experts_or_the_tower():
    assert adapted(build("deepseek_v3"), "up_proj") == {"mlp.up_proj", "mlp.shared_experts.up_proj"}
    model = LoraTuning(LoraConfig(targets=["q_proj"])).apply(build("minimax_m3_vl"), FAMILIES["minimax_m3_vl"])
    assert {n.split(".")[1] for n in adapted_weights(model)} == {"language_model"}
    assert not any("indexer" in n for n in adapted_weights(model))


def test_spaces_around_parts_are_no_matter_and_an_empty_part_is_refused_with_the_config():
    assert adapted(build("qwen3"), "attention + mlp") == adapted(build("qwen3"), "attention+mlp")
    with pytest.raises(ConfigError, match=r"tuning\.targets: .*has an empty part"):
        LoraConfig(targets=["attention+"])


def test_a_bare_name_reaches_the_attention_of_v4_and_not_its_compressors():
    model = build("deepseek_v4")
    assert any(name.endswith("compressor.kv_proj.weight") for name, _ in model.named_parameters())
    assert adapted(model, "kv_proj") == {"self_attn.kv_proj"}


def test_dropout_is_refused_where_a_whole_weight_is_adapted():
    with pytest.raises(ConfigError, match="tuning.dropout: 0.1, but 4 targets are adapted as whole weights"):
        adapted(build("deepseek_v3"), "routed_experts", dropout=0.1)


def test_what_peft_makes_of_targets_is_held_against_what_was_meant(monkeypatch):
    """If peft rewrote a target that we think it leaves alone, the run stops."""
    monkeypatch.setattr("train.tuning.targets.rewritten_by_peft", lambda model_type: frozenset())
    with pytest.raises(ConfigError, match="peft adapted 4 weights that were not meant and left out 9"):
        adapted(build("deepseek_v3"), "attention+mlp")


def test_a_model_without_linear_modules_is_told_as_such():
    model = tiny_model("llama")
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="tuning.targets: this model has no linear module to adapt"):
        LoraTuning(LoraConfig()).apply(model, Family.unlisted("bare"))


def test_biases_stay_with_the_projections_that_stay():
    model = build("qwen2")
    FullTuning(FullConfig(frozen=[Frozen.attention])).apply(model, FAMILIES["qwen2"])
    training = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not any("self_attn" in n for n in training) and any("mlp" in n for n in training)
