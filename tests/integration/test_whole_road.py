"""The whole road through the real command on a tiny model: records in, measured and exported model out."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.command import crosstune, metrics_of, without_network, write_uneven_records
from tests.tiny import save_tiny_model
from train.data.prepared import PreparedData, PreparedSplit
from train.run_folder import RunFolder


class Road:
    """A model, records and the words that both need."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.model = save_tiny_model(tmp / "model", tie_word_embeddings=False)
        self.data = write_uneven_records(tmp / "data.jsonl", count=60)

    def words(self, *more: str) -> list[str]:
        return [
            f"model.path={self.model}",
            f"dataset.path={self.data}",
            "dataset.test_fraction=0.2",
            "dataset.validation_fraction=0.2",
            "dataset.license=CC0-1.0",
            f"cache_dir={self.tmp / 'cache'}",
            "model.precision=fp32",
            "batch_tokens=400",
            "max_length=320",
            "micro_batch_tokens=400",
            "optim.lr=5e-3",
            *more,
        ]

    def prepared(self, run: RunFolder, split: str) -> PreparedSplit:
        return PreparedData.open(Path(run.read_record().prepared)).split(split)


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    return Road(tmp_path_factory.mktemp("road"))


@pytest.fixture(scope="module")
def lora_run(road):
    """A LoRA run in one process, and what the terminal showed."""
    screen = crosstune("run", *road.words(f"run_dir={road.tmp / 'lora'}", "max_steps=12", "checkpoint.every=4"))
    return RunFolder(road.tmp / "lora"), screen


def loss_of(model: torch.nn.Module, split: PreparedSplit) -> float:
    """Mean loss per supervised token, sample by sample, with nothing of ours but the data."""
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(split)):
            sample = split[i]
            ids = torch.from_numpy(sample.input_ids.astype("int64"))
            logits = model(input_ids=ids[None]).logits[0].float()
            for start, stop in sample.spans:
                total += F.cross_entropy(logits[start - 1 : stop - 1], ids[start:stop], reduction="sum").item()
                count += int(stop - start)
    return total / count


def test_summary_table_and_report(road, lora_run):
    run, screen = lora_run
    summary = json.loads(run.summary.read_text())
    for which in ("base", "tuned"):
        assert set(summary[which]) >= {"exact_match", "perplexity"}
    assert summary["test_size"] == len(road.prepared(run, "test"))
    assert summary["seconds"] > 0 and summary["peak_gib"] > 0.1
    assert summary["tuned"]["perplexity"] < summary["base"]["perplexity"]
    assert "perplexity" in screen and f"{summary['tuned']['perplexity']:.3f}" in screen
    assert summary["export_check"]["identical"] == summary["export_check"]["compared"] > 0
    page = run.report.read_text()
    assert "<svg" in page and "exact match" in page.lower()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script src" not in page


def test_perplexity_of_the_summary_is_that_of_plain_transformers(road, lora_run):
    run, _ = lora_run
    summary = json.loads(run.summary.read_text())
    for which, folder in (("base", road.model), ("tuned", run.export / "merged")):
        model = AutoModelForCausalLM.from_pretrained(folder).float()
        expected = math.exp(loss_of(model, road.prepared(run, "test")))
        assert summary[which]["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_merged_folder_in_plain_transformers_gives_the_answers_of_the_run(lora_run):
    run, _ = lora_run
    answers = [json.loads(line) for line in (run.eval / "tuned.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(run.export / "merged").float()
    tokenizer = AutoTokenizer.from_pretrained(run.export / "merged")
    assert tokenizer.chat_template
    for answer in answers[:5]:
        ids = tokenizer(answer["prompt"], return_tensors="pt", add_special_tokens=False).input_ids
        made = model.generate(ids, max_new_tokens=120, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(made, skip_special_tokens=True).strip().startswith(answer["answer"].strip())


def test_adapter_opens_in_plain_peft_and_equals_the_merged_model(road, lora_run):
    run, _ = lora_run
    ids = torch.arange(5, 60)[None]
    merged = AutoModelForCausalLM.from_pretrained(run.export / "merged").float()
    base = AutoModelForCausalLM.from_pretrained(road.model)
    plain = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, str(run.export / "adapter")).eval()
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted(input_ids=ids).logits, plain, atol=1e-3)


def test_metrics_have_every_step_once_and_the_keys_promised(lora_run):
    run, _ = lora_run
    records = metrics_of(run.path)
    assert [r["step"] for r in records] == list(range(1, 13))
    keys = "step loss lr grad_norm tokens supervised_tokens tokens_per_second peak_gib data_hash"
    assert all(set(keys.split()) <= set(r) for r in records)
    assert records[-1]["loss"] < records[0]["loss"]
    environment = json.loads(run.environment.read_text())
    assert "torch" in json.dumps(environment)


def test_a_second_run_reuses_the_prepared_data_and_says_so(road, lora_run):
    screen = crosstune("train", *road.words(f"run_dir={road.tmp / 'again'}", "max_steps=12"))
    assert "reused" in screen
    first, again = metrics_of(lora_run[0].path), metrics_of(road.tmp / "again")
    assert [(r["loss"], r["data_hash"]) for r in first] == [(r["loss"], r["data_hash"]) for r in again]


def test_resume_needs_only_the_folder_and_is_bit_exact(road, lora_run):
    """The run is cut back to its second checkpoint; what follows must be what was."""
    run, _ = lora_run
    cut = RunFolder(road.tmp / "cut")
    shutil.copytree(run.path, cut.path)
    shutil.rmtree(cut.checkpoints / "step-00000012")
    crosstune("resume", str(cut.path))
    first, resumed = metrics_of(run.path), metrics_of(cut.path)
    drop = ("tokens_per_second", "peak_gib")
    assert [{k: r[k] for k in r if k not in drop} for r in resumed] == [
        {k: r[k] for k in r if k not in drop} for r in first
    ]
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (cut.export / name).read_bytes() == (run.export / name).read_bytes()


def test_an_export_tells_where_it_came_from(road, lora_run):
    run, _ = lora_run
    provenance = json.loads((run.export / "merged" / "provenance.json").read_text())
    text = json.dumps(provenance)
    record = run.read_record()
    assert record.manifest_sha256 in text
    assert all(sha in text for name, sha in record.model_sha256.items() if name.endswith(".safetensors"))
    chain = crosstune("report", str(run.export / "merged"))
    assert "unchanged" in chain and "step 12" in chain.replace("step-00000012", "step 12")
    config = road.model / "config.json"
    original = config.read_bytes()
    config.write_bytes(original + b"\n")
    try:
        assert "changed" in crosstune("report", str(run.export / "merged")).replace("unchanged", "")
    finally:
        config.write_bytes(original)
    card = (run.export / "merged" / "README.md").read_text()
    assert "CC0-1.0" in card and str(road.model.name) in card


@pytest.mark.distributed
@pytest.mark.parametrize("tuning", [pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_zero3_on_two_ranks_exports_what_it_trained_with_the_network_cut(road, tuning):
    """The loss of the live, sharded model on the validation split is that of the exported model."""
    run = RunFolder(road.tmp / f"zero3_{tuning}")
    words = road.words(f"run_dir={run.path}", "nproc=2", "sharding=zero3", f"tuning={tuning}", "max_steps=3")
    crosstune("run", *words, "eval_every=3", "optim.lr=1e-3", prefix=without_network())
    model = AutoModelForCausalLM.from_pretrained(run.export / "merged").float()
    live = metrics_of(run.path)[-1]
    assert live["step"] == 3
    assert live["validation_loss"] == pytest.approx(loss_of(model, road.prepared(run, "validation")), rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(road.model)
    assert abs(loss_of(base, road.prepared(run, "validation")) - live["validation_loss"]) > 1e-2
    assert (run.export / "adapter").exists() == (tuning == "lora")
    check = json.loads(run.summary.read_text())["export_check"]
    assert check["identical"] == check["compared"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_an_outer_torchrun_works_too(road):
    words = road.words(f"run_dir={road.tmp / 'outer'}", "max_steps=2", "sharding=zero2")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
    crosstune("train", *words, launcher=launcher)
    alone = crosstune("train", *road.words(f"run_dir={road.tmp / 'alone'}", "max_steps=2"))
    assert alone
    for a, b in zip(metrics_of(road.tmp / "outer"), metrics_of(road.tmp / "alone"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["data_hash"] == b["data_hash"]


def test_the_network_is_cut_where_ci_says_so():
    if "CROSSTUNE_NETWORK_IS_CUT" not in os.environ:
        pytest.skip("the network is cut by .ci/run only")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, pytest.raises(OSError, match="unreachable"):
        probe.connect(("192.0.2.1", 9))  # nobody's (RFC 5737); sends nothing: there is no way out
