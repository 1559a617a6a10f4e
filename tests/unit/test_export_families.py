"""Exports of every family: laid out as the base, opened by plain transformers and plain peft, equal to what trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from configs.schema.outputs import ExportConfig
from tests.tiny_families import FAMILIES, VOCABULARY
from tests.unit.trained_kit import FILES, NEXT_TOKENS, save_base, trained_run
from train.export.run import ExportResult, export
from train.export.tensors import stored_tensors

FAST = ("deepseek_v3", "qwen3_5", "kimi_k25", "deepseek_v4")
EVERY = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
TOKENS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))
NO_EXPERTS = {"llama", "mistral", "qwen2", "qwen3", "qwen3_5_text", "qwen3_5"}
NO_MLP = {"minimax", "minimax_m2"}
HYPER = {"deepseek_v4", "glm5_next"}


def parts_of(name: str) -> str:
    """All parts of a family that LoRA can adapt."""
    there = {"mlp": name not in NO_MLP, "routed_experts": name not in NO_EXPERTS, "hyper_connections": name in HYPER}
    return "+".join(["attention", *(part for part, is_there in there.items() if is_there)])


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    assert VOCABULARY > int(TOKENS.max())
    return model.eval()(input_ids=TOKENS, use_cache=False).logits


def plain(folder: Path) -> Any:
    """As somebody without crosstune opens it."""
    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32)


def values_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.read() for name, tensor in stored_tensors(folder).items()}


def exported(tmp_path: Path, name: str, *overrides: str) -> tuple[ExportResult, Any, list[str]]:
    run, module = trained_run(tmp_path, name, *overrides)
    notes: list[str] = []
    return export(run, ExportConfig(shard_gib=400_000 / 2**30), on_note=notes.append), module, notes


def require_base_layout(base: Path, merged: Path, name: str) -> Mapping[str, torch.Tensor]:
    before, after = values_of(base), values_of(merged)
    assert {n: (t.shape, t.dtype) for n, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    carried = [n for n in before if n.startswith(NEXT_TOKENS.get(name, "mtp."))]
    assert len(carried) == 3 and all(torch.equal(before[n], after[n]) for n in carried)
    assert {*FILES, "tokenizer.json", "chat_template.jinja"} <= {path.name for path in merged.iterdir()}
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    return {n: after[n] for n in after if not torch.equal(before[n], after[n])}


@pytest.mark.parametrize("name", EVERY)
def test_all_weights_trained(tmp_path: Path, name: str) -> None:
    result, module, notes = exported(tmp_path, name, "tuning=full", "tuning.frozen=[]")
    assert result.merged is not None and result.adapter is None
    changed = require_base_layout(tmp_path / "model", result.merged, name)
    assert len(changed) > 20
    assert any("3 tensors are of no part that trains here" in note for note in notes)
    opened = plain(result.merged)
    assert torch.equal(logits_of(opened), logits_of(module))
    trained = dict(module.named_parameters())
    for path, parameter in opened.named_parameters():
        assert torch.equal(parameter, trained[path]), path


@pytest.mark.parametrize("name", EVERY)
def test_an_adapter_on_all_parts(tmp_path: Path, name: str) -> None:
    result, module, _ = exported(tmp_path, name, "tuning=lora", "tuning.rank=4", f"tuning.targets=[{parts_of(name)}]")
    assert result.merged is not None and result.adapter is not None
    base = tmp_path / "model"
    changed = require_base_layout(base, result.merged, name)
    assert any(re.search(r"\.experts\.|\.moe\.", n) for n in changed) == (name not in NO_EXPERTS)
    expected = logits_of(module)

    reopened = PeftModel.from_pretrained(plain(base), result.adapter)
    trained = {n: p for n, p in module.named_parameters() if ".lora_" in n}
    found = {n: p for n, p in reopened.named_parameters() if ".lora_" in n}
    assert found.keys() == trained.keys() and all(torch.equal(found[n], trained[n]) for n in found)
    torch.testing.assert_close(logits_of(reopened), expected, rtol=0, atol=1e-6)

    opened = plain(result.merged)
    assert (expected - logits_of(plain(base))).abs().max() > 0.1
    torch.testing.assert_close(logits_of(opened), expected, rtol=1e-3, atol=2e-4)  # fp32 adds up in another order
    merged = module.merge_and_unload()  # as peft adds the same update to the same weights
    torch.testing.assert_close(logits_of(opened), logits_of(merged), rtol=0, atol=2e-5)
    weights = dict(merged.named_parameters())
    for path, parameter in opened.named_parameters():
        torch.testing.assert_close(parameter, weights[path], rtol=0, atol=1e-6, msg=lambda m, p=path: f"{p}: {m}")


def test_the_bases_are_named_as_on_the_hub(tmp_path: Path) -> None:
    """Else the tests above would find the modules' names and prove nothing."""
    v4 = set(stored_tensors(save_base("deepseek_v4", tmp_path / "v4")))
    assert {"embed.weight", "layers.0.attn.wq_a.weight", "layers.1.ffn.experts.7.w3.weight", "hc_head_fn"} <= v4
    kimi = set(stored_tensors(save_base("kimi_k25", tmp_path / "kimi")))
    assert {"language_model.model.layers.1.mlp.experts.7.up_proj.weight", "mm_projector.pre_norm.weight"} <= kimi
