"""Exports: the merged model and the adapter compute what the trained run computes, in plain transformers and peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3_5ForCausalLM

import train.export.tensors
from configs.errors import CheckpointError, ConfigError, ModelError, StorageError
from configs.schema.device import DeviceConfig
from configs.schema.model import Precision
from configs.schema.outputs import ExportConfig
from tests.unit.tiny_run import tiny_run
from tests.unit.trained_kit import trained_run
from train.devices.cpu import CpuDevice
from train.evaluate.models import base_model, put_training_on
from train.export.adapter import target_modules
from train.export.run import export
from train.export.tensors import Planned, stored_tensors, write_file, write_model
from train.export.trained import Trained, lora_pairs
from train.run_folder import RunFolder, sha256_of

WEIGHTS = "model.safetensors"
TOKENS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(0))


def quiet(_: str) -> None:
    pass


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def trained_logits(run: RunFolder) -> torch.Tensor:
    device = CpuDevice(DeviceConfig("train.devices.cpu.CpuDevice"))
    with Trained.open(run) as trained:
        return logits_of(put_training_on(base_model(trained, device), trained))


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def put_weights(run: RunFolder, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Stores the base's weights another way, as if the run had begun with these files."""
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    record = run.read_record()
    run.write_record(replace(record, model_sha256=record.model_sha256 | {WEIGHTS: sha256_of(folder / WEIGHTS)}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_merged_model_is_the_trained_one(tmp_path: Path, tuning: str, tied: bool) -> None:
    run = tiny_run(tmp_path, f"tuning={tuning}", tie_word_embeddings=tied)
    result = export(run, ExportConfig(shard_gib=60_000 / 2**30), on_note=quiet)
    assert result.merged == run.export / "merged"
    expected = trained_logits(run)
    assert not torch.allclose(expected, logits_of(plain(tmp_path / "model")), atol=1e-2)
    torch.testing.assert_close(logits_of(plain(result.merged)), expected, rtol=1e-4, atol=1e-4)

    shards = sorted(result.merged.glob("model-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 70_000 or len(load_file(shard)) == 1 for shard in shards)
    names = {name for shard in shards for name in load_file(shard)}
    assert names == set(stored_tensors(tmp_path / "model")) and ("lm_head.weight" in names) != tied
    tokenizer = AutoTokenizer.from_pretrained(result.merged)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tmp_path / "model").chat_template

    if tuning == "full":
        assert result.adapter is None and not (run.export / "adapter").exists()
        return
    assert result.adapter is not None
    wrapped = PeftModel.from_pretrained(plain(tmp_path / "model"), result.adapter)
    torch.testing.assert_close(logits_of(wrapped), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits_of(wrapped.merge_and_unload()), logits_of(plain(result.merged)), rtol=1e-4, atol=1e-4
    )
    assert wrapped.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")


@pytest.mark.parametrize("said", [True, False])
def test_a_second_copy_of_a_tied_head_is_brought_up_to_date(tmp_path: Path, said: bool) -> None:
    run = tiny_run(tmp_path, "tuning=full", tie_word_embeddings=True)
    expected = trained_logits(run)
    stored = {n: t.read().clone() for n, t in stored_tensors(tmp_path / "model").items()}
    put_weights(run, tmp_path / "model", stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()})
    if not said:  # Gemma and others are tied unless their config says otherwise
        config = tmp_path / "model" / "config.json"
        config.write_text(config.read_text().replace('"tie_word_embeddings": true,', ""))
        record = run.read_record()
        run.write_record(replace(record, model_sha256=record.model_sha256 | {config.name: sha256_of(config)}))
    merged = export(run, ExportConfig(), on_note=quiet).merged
    assert merged is not None and stored_tensors(merged).keys() == {*stored, "lm_head.weight"}
    torch.testing.assert_close(logits_of(plain(merged)), expected, rtol=1e-4, atol=1e-4)


def test_weights_stored_without_the_outermost_module_are_found(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "tuning=full", tie_word_embeddings=True)
    stored = {n.removeprefix("model."): t.read().clone() for n, t in stored_tensors(tmp_path / "model").items()}
    put_weights(run, tmp_path / "model", stored)
    merged = export(run, ExportConfig(), on_note=quiet).merged
    assert merged is not None and stored_tensors(merged).keys() == stored.keys()
    torch.testing.assert_close(logits_of(plain(merged)), trained_logits(run), rtol=1e-4, atol=1e-4)


def test_bf16_is_rounded_before_and_after_the_merge(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "model.precision=bf16", "tuning.rank=2")
    exact = export(run, ExportConfig(precision=Precision.fp32), out=tmp_path / "fp32", on_note=quiet).merged
    auto = export(run, ExportConfig(), on_note=quiet).merged
    assert exact is not None and auto is not None
    torch.testing.assert_close(logits_of(plain(exact)), trained_logits(run), rtol=1e-4, atol=1e-4)
    assert {t.dtype for t in stored_tensors(auto).values()} == {torch.bfloat16}
    assert json.loads((auto / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(auto).dtype == torch.bfloat16
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(
        stored_tensors(auto)[name].read(), stored_tensors(exact)[name].read().bfloat16(), rtol=0, atol=0
    )


def test_adapters_of_upper_layers_stay_there(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "tuning.first_layer=2", "tuning.targets=[q_proj,down_proj]")
    result = export(run, ExportConfig(), on_note=quiet)
    assert result.adapter is not None and result.merged is not None
    expected = trained_logits(run)
    wrapped = PeftModel.from_pretrained(plain(tmp_path / "model"), result.adapter)
    torch.testing.assert_close(logits_of(wrapped), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(plain(result.merged)), expected, rtol=1e-4, atol=1e-4)


def test_target_modules_are_last_names_only_where_that_is_exact() -> None:
    modules = ["l.0.q", "l.1.q", "l.0.v", "norm"]
    assert target_modules(["l.0.q", "l.1.q"], modules) == ["q"]
    assert target_modules(["l.1.q", "l.0.v"], modules) == ["l.0.v", "l.1.q"]


def test_one_tensor_is_alive_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    made: list[weakref.ref[torch.Tensor]] = []
    alive = []

    def make() -> torch.Tensor:
        alive.append(sum(ref() is not None for ref in made))
        tensor = torch.ones(100)
        made.append(weakref.ref(tensor))
        return tensor

    write_model(tmp_path, [Planned(str(i), (100,), torch.float32, make) for i in range(6)], shard_bytes=1000)
    assert alive == [0] * 6
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_written_files_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(4, dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    planned = [Planned(n, tuple(t.shape), t.dtype, lambda t=t: t) for n, t in tensors.items()]
    write_file(tmp_path / "x.safetensors", planned)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_base_that_is_another_model_is_refused(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    stored = stored_tensors(tmp_path / "model")
    fewer = {n: t.read().clone() for n, t in stored.items() if "layers.1.mlp" not in n}
    put_weights(run, tmp_path / "model", fewer)
    with pytest.raises(ModelError, match="layers.1.mlp.down_proj.weight"):
        export(run, ExportConfig(), on_note=quiet)
    assert not run.export.exists() and not list(run.path.glob(".export*"))
    with pytest.raises(CheckpointError, match="no pair of LoRA factors: strange"):
        lora_pairs(["base_model.model.q.lora_A.default.weight", "strange"])


def test_a_base_that_changed_since_the_training_is_not_merged(tmp_path: Path) -> None:
    """The provenance names the base that was trained on: an export must be made of just that one."""
    run = tiny_run(tmp_path)
    stored = {n: t.read() * 1.01 for n, t in stored_tensors(tmp_path / "model").items()}
    save_file(stored, tmp_path / "model" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match="differs from the model that the run began with: model.safetensors"):
        export(run, ExportConfig(), on_note=quiet)
    assert not run.export.exists()


def test_what_is_in_the_way_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path)
    foreign = tmp_path / "foreign"
    (foreign / "adapter").mkdir(parents=True)
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(StorageError, match="not an export"):
        export(run, ExportConfig(), out=foreign, overwrite=True, on_note=quiet)
    assert (foreign / "thesis.txt").read_text() == "mine"

    first = export(run, ExportConfig(merged=False), on_note=quiet)
    assert first.merged is None
    with pytest.raises(StorageError, match="overwrite=true"):
        export(run, ExportConfig(), on_note=quiet)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(StorageError, match="No space left"):
        patched.setattr(train.export.tensors, "write_file", fail)
        export(run, ExportConfig(), overwrite=True, on_note=quiet)
    assert sorted(p.name for p in run.export.iterdir()) == ["adapter"]  # the one before is whole

    export(run, ExportConfig(), overwrite=True, on_note=quiet)
    assert sorted(p.name for p in run.export.iterdir()) == ["adapter", "merged"]
    with pytest.raises(ConfigError, match="neither"):
        export(run, ExportConfig(adapter=False, merged=False), overwrite=True, on_note=quiet)


def test_a_checkpoint_by_number_or_a_clear_refusal(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "checkpoint.every=1", "checkpoint.keep_last=0")
    merged = export(run, ExportConfig(adapter=False), checkpoint="2", on_note=quiet).merged
    assert merged is not None
    assert json.loads((merged / "provenance.json").read_text())["checkpoint"]["step"] == 2
    with pytest.raises(CheckpointError, match="(?s)checkpoint=7.*step-00000003"):
        export(run, ExportConfig(), checkpoint="7", overwrite=True, on_note=quiet)


def test_the_card_says_what_matters(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "dataset.system='Be \"brief\".'")
    result = export(run, ExportConfig(), on_note=quiet)
    assert result.adapter is not None and result.merged is not None
    for folder, library in ((result.adapter, "peft"), (result.merged, "transformers")):
        card = (folder / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: " + library)
        for fact in ("base_model: model", "CC0-1.0", "LoRA, rank 16", "0.01", "Not measured yet", '\\"brief\\"'):
            assert fact in card, fact


def test_the_model_is_read_where_transformers_reads_it(tmp_path: Path) -> None:
    """Other files beside it count for nothing; a tensor that two files of a model have is refused."""
    one, two = {"a.weight": torch.ones(2)}, {"a.weight": torch.zeros(2), "b.weight": torch.zeros(3)}
    save_file(one, tmp_path / "model.safetensors")
    save_file(two, tmp_path / "model_old.safetensors")
    assert stored_tensors(tmp_path)["a.weight"].read().tolist() == [1, 1] and "b.weight" not in stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "another.safetensors")
    with pytest.raises(ModelError, match="a.weight is in another.safetensors as well"):
        stored_tensors(tmp_path)


def test_an_adapter_of_a_version_that_understood_targets_otherwise_is_exported_as_it_is(tmp_path: Path) -> None:
    run, module = trained_run(tmp_path, "qwen3_5_text", "tuning=lora", "tuning.targets=[q_proj,in_proj_a]")
    resolved = run.resolved.read_text()
    assert "in_proj_a" in resolved
    config = yaml.safe_load(resolved)
    config["tuning"]["targets"] = []  # today's default has no in_proj_a
    run.resolved.write_text(yaml.safe_dump(config))
    out = export(run, ExportConfig(), on_note=quiet)
    ids = torch.arange(3, 40)[None]
    merged = Qwen3_5ForCausalLM.from_pretrained(out.merged, dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, module.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
