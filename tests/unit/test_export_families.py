"""Exports of every family: laid out as the base, opened by plain transformers and plain peft, equal to what trained."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import train.export.base_files
import train.export.merged
from configs.errors import CheckpointError
from configs.schema.outputs import ExportConfig
from tests.cells import ADAPTER, MERGED
from tests.tiny_families import FAMILIES, VOCABULARY
from tests.unit.trained_kit import FILES, NEXT_TOKENS, checkpoint, save_base, trained_run
from train.export.run import ExportResult, export
from train.export.tensors import stored_tensors
from train.models.load import load_model
from train.run_folder import sha256_of

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
    """As somebody without crosstune opens it, but for families that transformers does not have."""
    class_name = json.loads((folder / "config.json").read_text())["architectures"][0]
    if not hasattr(transformers, class_name):
        return load_model(folder, dtype=torch.float32)
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


@pytest.mark.cell(MERGED)
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


@pytest.mark.cell(MERGED, ADAPTER)
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


def test_what_the_base_keeps_in_fp32_stays_so(tmp_path: Path) -> None:
    """bf16 on disk and in training: hyper-connections, sinks and router corrections lose nothing on the way."""
    base = save_base("deepseek_v4", tmp_path / "model")
    model = transformers.DeepseekV4ForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    kept = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"fn", "base", "scale", "sinks"} <= kept
    file = base / "model.safetensors"
    small = re.compile(r"hc_|attn_sink|norm|gate\.bias|\.ape")
    save_file({n: t if small.search(n) else t.bfloat16() for n, t in load_file(file).items()}, file, {"format": "pt"})
    targets = "tuning.targets=[attention+routed_experts+hyper_connections]"
    run, _ = trained_run(tmp_path, "deepseek_v4", "tuning=lora", targets, base=base)
    record = run.read_record()
    run.write_record(dataclasses.replace(record, precision="bf16"))
    merged = export(run, ExportConfig(adapter=False), on_note=lambda _: None).merged
    assert merged is not None
    before, after = values_of(base), values_of(merged)
    assert {n: t.dtype for n, t in after.items()} == {n: t.dtype for n, t in before.items()}
    assert {after[n].dtype for n in after if "hc_attn_fn" in n} == {torch.float32}
    assert {after[n].dtype for n in after if ".experts." in n and "mtp" not in n} == {torch.bfloat16}
    untouched = [n for n in before if torch.equal(before[n], after[n])]
    assert not [n for n in untouched if "hc_attn_fn" in n] and [n for n in untouched if "attn_sink" in n]


def test_modules_that_trained_whole_beside_an_adapter(tmp_path: Path) -> None:
    base = save_base("qwen3", tmp_path / "model")
    run, module = trained_run(tmp_path, "qwen3", "tuning=lora", "tuning.targets=[attention]", base=base)
    shutil.rmtree(run.checkpoints)
    config = module.peft_config["default"]
    config.modules_to_save = ["lm_head"]
    module = get_peft_model(plain(base), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    checkpoint(run, module)
    result = export(run, ExportConfig(), on_note=lambda _: None)
    assert result.merged is not None and result.adapter is not None
    expected = logits_of(module)
    torch.testing.assert_close(logits_of(plain(result.merged)), expected, rtol=1e-3, atol=2e-4)
    assert not torch.equal(values_of(result.merged)["lm_head.weight"], values_of(base)["lm_head.weight"])
    reopened = PeftModel.from_pretrained(plain(base), result.adapter)
    torch.testing.assert_close(logits_of(reopened), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_tensors_are_made_in_small_blocks(tmp_path: Path, tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacked experts of step3p7 too, which are cut along another dimension than the stack."""
    targets = ["tuning.targets=[attention+routed_experts]"] if tuning == "lora" else []
    run, _ = trained_run(tmp_path, "step3p7", f"tuning={tuning}", *targets)
    at_once = export(run, ExportConfig(adapter=False), out=tmp_path / "at_once", on_note=lambda _: None).merged
    sizes = []

    def recorded(job: Any, tensor: Any, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        sizes.append(values.numel())
        return checked(job, tensor, values, shape)

    checked = train.export.merged._checked
    monkeypatch.setattr(train.export.merged, "_checked", recorded)
    monkeypatch.setattr(train.export.base_files, "BLOCK_BYTES", 1000)
    in_blocks = export(run, ExportConfig(adapter=False), out=tmp_path / "in_blocks", on_note=lambda _: None).merged
    assert at_once is not None and in_blocks is not None
    assert max(sizes) <= 32 * 64, "more than a slice of the experts' stack"
    expected = values_of(at_once)
    for name, found in values_of(in_blocks).items():
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-7, msg=name)


def test_an_adapter_on_experts_alone(tmp_path: Path) -> None:
    result, module, _ = exported(tmp_path, "deepseek_v3", "tuning=lora", "tuning.targets=[routed_experts]")
    assert result.adapter is not None and result.merged is not None
    reopened = PeftModel.from_pretrained(plain(tmp_path / "model"), result.adapter)
    torch.testing.assert_close(logits_of(reopened), logits_of(module), rtol=0, atol=1e-6)


def test_a_run_that_diverged_is_not_exported(tmp_path: Path) -> None:
    run, module = trained_run(tmp_path, "deepseek_v3", "tuning=lora", "tuning.targets=[routed_experts]")
    shutil.rmtree(run.checkpoints)
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if ".lora_B" in n)[3, 5] = float("nan")
    checkpoint(run, module)
    with pytest.raises(CheckpointError, match="(?s)experts.*is not finite.*checkpoint=STEP"):
        export(run, ExportConfig(adapter=False), on_note=lambda _: None)
    assert not run.export.exists()


def test_a_model_that_transformers_does_not_know_is_named_as_its_files_are(tmp_path: Path) -> None:
    run, module = trained_run(tmp_path, "qwen2", "tuning=full", "tuning.frozen=[]")
    config = tmp_path / "model" / "config.json"
    known = config.read_text()
    config.write_text(known.replace('"qwen2"', '"nobody_knows"'))
    record = run.read_record()
    hashes = record.model_sha256 | {config.name: sha256_of(config)}
    run.write_record(dataclasses.replace(record, model_sha256=hashes))
    notes: list[str] = []
    merged = export(run, ExportConfig(), on_note=notes.append).merged
    assert merged is not None and any("taken to be named as its modules" in note for note in notes)
    (merged / "config.json").write_text(known)
    assert torch.equal(logits_of(plain(merged)), logits_of(module))


def test_kimi_k2_keeps_the_name_that_its_folder_has(tmp_path: Path) -> None:
    run, module = trained_run(tmp_path, "deepseek_v3", "tuning=lora", "tuning.targets=[attention,routed_experts]")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"deepseek_v3"', '"kimi_k2"'))
    record = run.read_record()
    hashes = record.model_sha256 | {config.name: sha256_of(config)}
    run.write_record(dataclasses.replace(record, model_sha256=hashes))
    merged = export(run, ExportConfig(shard_gib=400_000 / 2**30), on_note=lambda _: None).merged
    assert merged is not None and require_base_layout(tmp_path / "model", merged, "deepseek_v3")
    assert json.loads((merged / "config.json").read_text())["model_type"] == "kimi_k2"
    opened = load_model(merged, dtype=torch.float32)
    torch.testing.assert_close(logits_of(opened), logits_of(module), rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_5_moe", "minimax_m2"])
def test_a_fresh_interpreter_with_plain_peft(tmp_path: Path, name: str) -> None:
    """Nothing that was imported or registered here helps."""
    result, module, _ = exported(tmp_path, name, "tuning=lora", f"tuning.targets=[{parts_of(name)}]")
    save_file({"input_ids": TOKENS}, tmp_path / "tokens")
    code = (
        "import sys, json, torch, transformers, peft\n"
        "from safetensors.torch import load_file, save_file\n"
        "base, adapter, here = sys.argv[1:]\n"
        "name = json.load(open(base + '/config.json'))['architectures'][0]\n"
        "model = getattr(transformers, name).from_pretrained(base, dtype=torch.float32)\n"
        "model = peft.PeftModel.from_pretrained(model, adapter).eval()\n"
        "with torch.no_grad(): out = model(**load_file(here + '/tokens'), use_cache=False).logits\n"
        "save_file({'logits': out}, here + '/logits')\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "model"), str(result.adapter), str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    torch.testing.assert_close(load_file(tmp_path / "logits")["logits"], logits_of(module), rtol=0, atol=1e-6)


def test_the_bases_are_named_as_on_the_hub(tmp_path: Path) -> None:
    """Else the tests above would find the modules' names and prove nothing."""
    v4 = set(stored_tensors(save_base("deepseek_v4", tmp_path / "v4")))
    assert {"embed.weight", "layers.0.attn.wq_a.weight", "layers.1.ffn.experts.7.w3.weight", "hc_head_fn"} <= v4
    kimi = set(stored_tensors(save_base("kimi_k25", tmp_path / "kimi")))
    assert {"language_model.model.layers.1.mlp.experts.7.up_proj.weight", "mm_projector.pre_norm.weight"} <= kimi
