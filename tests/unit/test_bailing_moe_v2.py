"""Ling and Ring 2.x and Ming's thinker: the arithmetic, the published names, training, packing, padding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.errors import ModelError
from tests.unit.bailing_kit import CONFIGS, Reference, build, language_config
from train.models import bailing_moe_v2
from train.models.bailing_moe_v2.ming import CARRIED_OVER
from train.models.load import load_config, load_model
from train.ops.packed_attention import PACKED_ATTENTION, Pack
from train.ops.packed_attention import register as register_packing

register_packing()
LING, MING = CONFIGS
IDS = [5, 17, 300, 41, 41, 7, 123, 250, 9, 88, 61]
GATES = ["gate", *["image_gate"] * 4, "gate", *["audio_gate"] * 2, *["gate"] * 3]
POSITIONS = [(0, 0, 0), (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), *((i, i, i) for i in range(2, 8))]


def prefix(name: str) -> str:
    return "model." if name == MING else ""


def reference(name: str, folder: Path, *faults: str) -> Reference:
    return Reference(folder, language_config(name), prefix(name), frozenset(faults))


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Differs by the rounding of fp32 only, against the largest."""
    assert got.shape == expected.shape
    assert (got.double() - expected.double()).abs().max() <= 5e-6 * expected.abs().max()


def row(ids: list[int]) -> torch.Tensor:
    return torch.tensor([ids])


def masks() -> dict[str, torch.Tensor]:
    return {
        f"{sense}_mask": torch.tensor([[gate == f"{sense}_gate" for gate in GATES]]) for sense in ("image", "audio")
    }


def parameters(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Each family's model and the folder it was saved to."""
    made = {}
    for name in CONFIGS:
        folder = tmp_path_factory.mktemp(name)
        made[name] = build(name), folder
        made[name][0].save_pretrained(folder)
    return made


# the arithmetic


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_plain_loops_in_fp64(models, name, attention):
    model, folder = models[name]
    model.set_attn_implementation(attention)
    with torch.no_grad():
        got = model(row(IDS)).logits[0]
    near(got, reference(name, folder).logits(IDS))


@pytest.mark.parametrize("fault", ["no_groups", "bias_in_weights", "no_scaling", "all_rotated", "no_qk_norm"])
def test_the_comparison_would_see_a_fault(models, fault):
    """The same reference computed wrongly is far off, so that the test above holds each of these."""
    _, folder = models[LING]
    right, wrong = reference(LING, folder).logits(IDS), reference(LING, folder, fault).logits(IDS)
    assert (right - wrong).abs().max() > 1e-2


def test_images_and_audio_go_by_their_own_routers_and_positions(models):
    model, folder = models[MING]
    positions = torch.tensor(POSITIONS).T[:, None]
    with torch.no_grad():
        got = model(row(IDS), position_ids=positions, **masks()).logits[0]
    near(got, reference(MING, folder).logits(IDS, GATES, POSITIONS))
    for gates, places in ((None, POSITIONS), (GATES, None)):
        assert (got - reference(MING, folder).logits(IDS, gates, places)).abs().max() > 1e-2


@pytest.mark.parametrize(("mask", "used"), [(None, "gate"), ("image_mask", "image_gate"), ("audio_mask", "audio_gate")])
def test_only_the_router_of_a_sense_decides_for_it(mask, used):
    model = build(MING)
    given = {mask: torch.ones(1, len(IDS), dtype=torch.bool)} if mask else {}
    with torch.no_grad():
        before = model(row(IDS), **given).logits
        for gate in ("gate", "image_gate", "audio_gate"):
            if gate != used:
                for layer in model.model.model.layers[1:]:
                    getattr(layer.mlp, gate).weight.normal_()
                    getattr(layer.mlp, gate).e_score_correction_bias.normal_()
        assert torch.equal(before, model(row(IDS), **given).logits)
        model.model.model.layers[1].mlp.get_submodule(used).e_score_correction_bias.normal_(std=3)
        assert not torch.equal(before, model(row(IDS), **given).logits)


def test_fused_experts_are_the_default_and_equal_the_loop_over_experts(models):
    for model, _ in models.values():
        assert model.config.get_text_config()._experts_implementation == "grouped_mm"
        with torch.no_grad():
            fused = model(row(IDS)).logits
            model.set_experts_implementation("eager")
            looped = model(row(IDS)).logits
            model.set_experts_implementation("grouped_mm")
        near(fused, looped)


# the published names


def published_shapes(name: str) -> dict[str, list[int]]:
    """Of every weight, from `tests/unit/bailing_kit.CONFIGS`: 3 layers, the first one dense, 8 experts and 2 shared."""
    norms = ("q_norm", "k_norm") if name == MING else ("query_layernorm", "key_layernorm")
    gates = ("gate", "image_gate", "audio_gate") if name == MING else ("gate",)

    def mlp(at: str, width: int) -> dict[str, list[int]]:
        wide = {f"{at}{part}_proj.weight": [width, 64] for part in ("gate", "up")}
        return wide | {f"{at}down_proj.weight": [64, width]}

    shapes = {"model.word_embeddings.weight": [320, 64], "model.norm.weight": [64], "lm_head.weight": [320, 64]}
    for layer in range(3):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}{part}.weight": [64] for part in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{at}attention.{norm}.weight": [16] for norm in norms}
        shapes |= {f"{at}attention.query_key_value.weight": [(4 + 2 + 2) * 16, 64]}
        shapes |= {f"{at}attention.dense.weight": [64, 4 * 16]}
        if layer == 0:
            shapes |= mlp(f"{at}mlp.", 128)
            continue
        shapes |= {f"{at}mlp.{gate}.weight": [8, 64] for gate in gates}
        shapes |= {f"{at}mlp.{gate}.expert_bias": [8] for gate in gates}
        shapes |= mlp(f"{at}mlp.shared_experts.", 2 * 32)
        for expert in range(8):
            shapes |= mlp(f"{at}mlp.experts.{expert}.", 32)
    return {prefix(name) + key: shape for key, shape in shapes.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_folder_has_the_published_names_and_opens_bit_equal(models, name):
    model, folder = models[name]
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == published_shapes(name)
    again = load_model(folder, dtype=torch.float32)
    assert type(again).__name__ == CONFIGS[name][0]
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def published_folder(name: str, folder: Path) -> Path:
    """As it can be downloaded: keys of the config that we do not read, remote code, MTP layers, towers."""
    model = build(name, seed=3)
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    extra = language_config(name) | {"norm_softmax": False, "router_dtype": "fp32", "score_function": "sigmoid"}
    if name == LING:
        config = {"model_type": "bailing_moe", "num_nextn_predict_layers": 1, "rope_scaling": None} | extra
        mtp = {k.replace("layers.2.", "layers.3."): v.clone() for k, v in weights.items() if "layers.2." in k}
        weights |= mtp | {"model.layers.3.eh_proj.weight": torch.zeros(64, 128)}
    else:
        config = {"model_type": name, "vision_config": {"depth": 1}, "mlp_depth": 2, "llm_config": extra}
        weights |= {f"{each}blocks.0.weight": torch.zeros(2) for each in CARRIED_OVER}
    config |= {
        "architectures": [CONFIGS[name][0]],
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
        "torch_dtype": "bfloat16",
        "transformers_version": "4.52.3",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('remote code was run')\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_folder_opens_without_its_code_and_lacks_nothing(name, tmp_path):
    folder = published_folder(name, tmp_path)
    config = load_config(folder)
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        got = model(row(IDS)).logits[0]
    near(got, reference(name, folder).logits(IDS))
    assert config.model_type == ("bailing_moe" if name == LING else name)
    out = tmp_path / "out"
    model.save_pretrained(out)
    written, read = (json.loads((each / "config.json").read_text()) for each in (out, folder))
    for key in ("model_type", "architectures", "vision_config", "mlp_depth", "num_nextn_predict_layers"):
        assert written.get(key) == read.get(key)
    inner = (written.get("llm_config", written), read.get("llm_config", read))
    for key in ("rope_scaling", "rope_theta", "partial_rotary_factor", "router_type", "norm_softmax"):
        assert inner[0][key] == inner[1].get(key, inner[0][key]), key


def test_without_the_pattern_mtp_weights_would_be_called_unexpected(tmp_path):
    from train.models.bailing_moe_v2.modeling import BailingMoeV2ForCausalLM

    folder = published_folder(LING, tmp_path)
    config = load_config(folder)
    unexpected = []
    for layers in (1, 0):
        config.num_nextn_predict_layers = layers
        _, info = BailingMoeV2ForCausalLM.from_pretrained(folder, config=config, output_loading_info=True)
        unexpected.append({key for key in info["unexpected_keys"] if ".layers.3." in key})
    assert not unexpected[0] and "model.layers.3.eh_proj.weight" in unexpected[1]


def test_ling_1_keeps_its_name_and_is_refused_with_the_reason(tmp_path, monkeypatch):
    called: list[bool] = []
    monkeypatch.setattr(bailing_moe_v2, "register", lambda: called.append(True))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "bailing_moe", "architectures": ["BailingMoeForCausalLM"]})
    )
    bailing_moe_v2.register_for(tmp_path)
    assert not called
    monkeypatch.undo()
    bailing_moe_v2.register()  # of a model opened before, in the same process
    with pytest.raises(ModelError, match="Ling 1"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "change", [{"score_function": "softmax"}, {"router_type": "hash"}, {"rope_scaling": {"type": "3D"}}]
)
def test_what_no_published_model_has_is_refused(tmp_path, change):
    config = {"model_type": LING, "architectures": ["BailingMoeV2ForCausalLM"]} | language_config(LING) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="not covered"):
        load_config(tmp_path)


def test_rotary_settings_survive_a_round_trip(tmp_path):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    model = build(LING, rope_scaling=yarn, partial_rotary_factor=None, rotary_dim=8)
    assert model.model.rotary_emb.rope_type == "yarn" and len(model.model.rotary_emb.inv_freq) == 4
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(row(IDS)).logits, again(row(IDS)).logits)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == yarn


def test_importing_the_package_imports_no_torch():
    code = "import sys, train.models.bailing_moe_v2; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


# training


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_finite_and_reach_every_trained_parameter(name):
    model = build(name).train()
    ids = torch.randint(3, 320, (4, 40), generator=torch.Generator().manual_seed(0))
    model(ids, labels=ids).loss.backward()
    first = {n: p.grad for n, p in parameters(model).items()}
    without = {n for n, grad in first.items() if grad is None}
    # Text reaches no router of another sense.
    expected = {n for n in first if ".image_gate." in n or ".audio_gate." in n}
    assert without == expected and bool(expected) == (name == MING)
    for part, grad in first.items():
        assert grad is None or (grad.isfinite().all() and grad.abs().sum() > 0), part
    assert not any(n.endswith("e_score_correction_bias") for n in first)

    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for part, parameter in parameters(model).items():
        grad = first[part]
        assert grad is None or torch.equal(grad, parameter.grad), part


def test_routers_of_all_senses_learn_where_their_tokens_are():
    model = build(MING).train()
    model(row(IDS), labels=row(IDS), **masks()).loss.backward()
    gates = {n: p.grad for n, p in parameters(model).items() if "gate.weight" in n and "gate_proj" not in n}
    assert len(gates) == 6 and all(grad is not None and grad.abs().sum() > 0 for grad in gates.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_the_routers_bias_stays_in_fp32(models, name):
    model = AutoModelForCausalLM.from_pretrained(models[name][1], dtype=torch.bfloat16)
    fp32 = {key for key, value in model.state_dict().items() if value.dtype == torch.float32}
    assert fp32 == {key for key in model.state_dict() if key.endswith("e_score_correction_bias")} != set()
    with torch.no_grad():
        assert model(row(IDS)).logits.isfinite().all()


# packing, padding, generation


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_samples_have_logits_and_gradients_of_samples_alone(name):
    generator = torch.Generator().manual_seed(1)
    samples = [torch.randint(3, 320, (1, length), generator=generator) for length in (13, 2, 24, 7)]
    alone, packed = build(name).train(), build(name, attention=PACKED_ATTENTION).train()
    weight = torch.randn(46, 320, generator=generator)
    apart = torch.cat([alone(sample).logits[0] for sample in samples])
    (apart * weight).sum().backward()
    lengths = tuple(sample.shape[1] for sample in samples)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    keep = torch.ones(1, sum(lengths), dtype=torch.bool)
    together = packed(
        torch.cat(samples, dim=1), position_ids=positions, pack=Pack((lengths,)), logits_to_keep=keep
    ).logits
    (together * weight).sum().backward()
    near(together, apart)
    theirs = parameters(alone)
    for part, parameter in parameters(packed).items():
        if parameter.grad is not None:
            near(parameter.grad, theirs[part].grad)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_on_either_side_changes_no_token(models, name):
    model, _ = models[name]
    pad, ones = [0] * 5, [1] * len(IDS)
    ids = torch.tensor([IDS + pad, pad + IDS])
    mask = torch.tensor([ones + pad, pad + ones])
    with torch.no_grad():
        alone = model(row(IDS)).logits[0]
        both = model(ids, attention_mask=mask).logits
    near(both[0, : len(IDS)], alone)
    near(both[1, len(pad) :], alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_continues_as_whole_rows_do(models, name):
    model, _ = models[name]
    out = model.generate(row(IDS), max_new_tokens=4, do_sample=False, use_cache=True, eos_token_id=None)
    ids = list(IDS)
    with torch.no_grad():
        whole, start = model(row(IDS)).logits[:, 6:], model(row(IDS[:6]), use_cache=True)
        near(model(row(IDS[6:]), past_key_values=start.past_key_values).logits, whole)
        for _ in range(4):
            ids.append(int(model(row(ids)).logits[0, -1].argmax()))
    assert out[0].tolist() == ids
