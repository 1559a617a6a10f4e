"""Evaluation: the fast path gives what plain transformers gives, and the figures are what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from configs.errors import DataError
from configs.schema.device import DeviceConfig
from configs.schema.model import Precision
from configs.schema.outputs import EvalConfig, ExportConfig
from tests.tiny import samples_of, save_tiny_model, tiny_model, write_prepared
from tests.tiny_families import save
from tests.unit.tiny_run import tiny_run
from train.devices.cpu import CpuDevice
from train.evaluate.generate import has_plain_cache, measure_batch, measure_batch_plainly
from train.evaluate.models import base_model, plain_model
from train.evaluate.run import compare_answers, evaluate_model, evaluate_run, say_check, table_lines
from train.evaluate.samples import Sample, batches, read_samples
from train.evaluate.scores import Answer, exact_match, perplexity, worst_classes
from train.export.run import export

CPU = torch.device("cpu")
STOP = {2, 5}
MAX_NEW = 9


def plain_nll(model: torch.nn.Module, sample: Sample) -> float:
    """By one forward pass over the sample alone, every logit kept."""
    with torch.no_grad():
        logprobs = model(torch.tensor([sample.input_ids])).logits[0].float().log_softmax(-1)
    return -sum(float(logprobs[i - 1, sample.input_ids[i]]) for start, end in sample.spans for i in range(start, end))


def plain_answer(model: torch.nn.Module, sample: Sample) -> list[int]:
    """By `generate` on the prompt alone."""
    ends = sorted({*STOP, sample.answer[-1]})
    prompt = torch.tensor([sample.prompt])
    config = GenerationConfig(do_sample=False, max_new_tokens=MAX_NEW, eos_token_id=ends, pad_token_id=ends[0])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    tokens = out[0, len(sample.prompt) :].tolist()
    return tokens[:-1] if tokens[-1] in ends else tokens


def mixed_samples(model: torch.nn.Module) -> list[Sample]:
    """Very uneven lengths behind a shared beginning; several turns; answers the model agrees with in part or wholly."""
    shared = [7, 11, 13, 17, 19, 23]
    samples = []
    for i, drawn in enumerate(samples_of([3, 40, 9, 22, 5, 31, 12], vocab_size=97, seed=3)):
        prompt = shared + drawn.input_ids.tolist()
        answer = samples_of([1 + 2 * (i % 4)], vocab_size=97, seed=50 + i)[0].input_ids.tolist() + [2]
        samples.append(Sample(f"s{i}", prompt + answer, [(len(prompt), len(prompt) + len(answer))]))
    for agreed in (2, 4, MAX_NEW + 2):  # the reference follows the model's own choices this far
        sample = samples[agreed % len(samples)]
        own = plain_answer(model, sample)[:agreed]
        tokens = sample.prompt + own + ([2] if agreed > MAX_NEW else [96, 2])
        samples.append(Sample(f"own{agreed}", tokens, [(len(sample.prompt), len(tokens))]))
    # An end token of the sample's own, which the model says only after it has left the reference.
    said = [(s, plain_answer(model, s)) for s in samples]
    sample, end = next((s, token) for s, own in said for token in own[1:] if token != own[0])
    tokens = [*sample.prompt, 96, end]
    samples.append(Sample("own end", tokens, [(len(sample.prompt), len(tokens))]))
    turns = samples[1]
    return [*samples, Sample("turns", turns.input_ids, [(9, 12), (20, 21), *turns.spans])]


@pytest.mark.parametrize(
    ("family", "is_plain"), [("llama", True), ("qwen3", True), ("mistral", False), ("qwen2", False)]
)
def test_answers_and_likelihood_are_those_of_plain_transformers(family: str, is_plain: bool) -> None:
    model = tiny_model(family, seed=1)
    assert has_plain_cache(model) == is_plain
    measure = measure_batch if is_plain else measure_batch_plainly
    samples = mixed_samples(model)
    expected = [plain_answer(model, s) for s in samples]
    assert len({tuple(e) for e in expected}) > 3 and any(len(e) == MAX_NEW for e in expected)
    for batch in (samples, samples[:1], samples[-2:]):
        for sample, found in zip(batch, measure(model, batch, STOP, MAX_NEW, CPU, keep_logits=True), strict=True):
            assert found.answer_ids == plain_answer(model, sample), sample.id
            assert found.nll == pytest.approx(plain_nll(model, sample), rel=1e-4), sample.id
            with torch.no_grad():
                alone = model(torch.tensor([sample.prompt])).logits[0, -1]
            torch.testing.assert_close(found.first_logits_V, alone, rtol=1e-4, atol=1e-4)


def test_without_generation_only_the_likelihood_is_measured() -> None:
    model = tiny_model()
    samples = mixed_samples(model)
    for sample, found in zip(samples, measure_batch(model, samples, STOP, 0, CPU), strict=True):
        assert found.answer_ids is None
        assert found.nll == pytest.approx(plain_nll(model, sample), rel=1e-4)


def test_batches_hold_every_sample_once_within_the_budget() -> None:
    samples = [Sample(str(n), list(range(n)), [(1, n)]) for n in (5, 80, 7, 7, 30, 4, 120, 6)]
    found = list(batches(samples, 60))
    assert sorted(i for batch in found for i in batch) == list(range(len(samples)))
    assert all(len(b) == 1 or len(b) * max(len(samples[i].input_ids) for i in b) <= 60 for b in found)


def answer(reference: str, said: str | None, nll: float = 1.0, tokens: int = 2) -> Answer:
    return Answer("x", "p", reference, said, nll, tokens)


def test_figures() -> None:
    answers = [answer("mit", "mit "), answer("mit", "bsd", nll=3.0, tokens=1), answer("bsd", None)]
    assert exact_match(answers) == 0.5
    assert exact_match([answer("text", None)]) is None
    assert perplexity(answers) == pytest.approx(math.exp(5 / 5))
    assert perplexity([answer("x", "y", nll=9e5, tokens=1)]) == math.inf


def test_worst_classes_are_those_with_most_wrong_answers() -> None:
    answers = [answer("gpl", "lgpl")] * 3 + [answer("gpl", "gpl")] + [answer("mit", "x"), answer("mit", "mit")]
    answers += [answer("bsd", "bsd")] * 2
    first, second = worst_classes(answers)
    assert (first.reference, first.total, first.right, first.answers) == ("gpl", 4, 1, [("lgpl", 3)])
    assert second.reference == "mit"
    assert worst_classes([answer(str(i), "?") for i in range(9)]) == []  # free text: every reference is its own


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"train": samples_of([9], vocab_size=90)})
    with pytest.raises(DataError, match="(?s)eval.split=test.*allowed: train"):
        read_samples(data, "test")


@pytest.fixture
def device() -> CpuDevice:
    return CpuDevice(DeviceConfig("train.devices.cpu.CpuDevice"))


@pytest.mark.parametrize("tuning", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_a_run_is_measured_and_its_export_compared(tmp_path: Path, device: CpuDevice, tuning: str) -> None:
    run = tiny_run(tmp_path, f"tuning={tuning}")
    notes: list[str] = []
    cfg = EvalConfig(batch_tokens=100)
    unmerged = evaluate_run(run, cfg, device, on_note=notes.append)
    assert "export_check" not in unmerged
    export(run, ExportConfig(), on_note=notes.append)
    summary = evaluate_run(run, cfg, device, on_note=notes.append, seconds_before=1000)

    assert json.loads(run.summary.read_text()) == summary
    assert summary["precision"] == "fp32" and any("8 test samples, fp32" in note for note in notes)
    del summary["precision"]  # as an older version left it
    assert "8 test samples " in table_lines(summary)[0]
    assert summary["test_size"] == 8 and summary["seconds"] > 1000 and summary["peak_gib"] > 0
    assert summary["tuned"]["perplexity"] == pytest.approx(unmerged["tuned"]["perplexity"], rel=1e-4)
    assert summary["base"]["perplexity"] != pytest.approx(summary["tuned"]["perplexity"], rel=1e-3)
    check = summary["export_check"]
    assert (check["compared"], check["identical"]) == (8, 8) and check["max_logit_difference"] < 1e-3
    lines = [json.loads(line) for line in (run.eval / "tuned.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"sample:{i}" for i in range(8)]
    assert set(lines[0]) >= {"id", "prompt", "reference", "answer", "exact"}
    assert any("exact match" in note for note in notes)
    card = run.export / "merged" / "README.md"
    assert "Measured on the 8 held-out samples of the same data:" in card.read_text()
    for other, said in (("train", "that it was trained on"), ("test", "of other data than it was trained on")):
        data = (
            tmp_path / "data"
            if other == "train"
            else write_prepared(tmp_path / "other", {"test": samples_of([20] * 8, vocab_size=290)})
        )
        evaluate_run(run, EvalConfig(split=other, base=False, generate=False), device, data=data, on_note=notes.append)
        assert f"Measured on 8 samples {said}:" in card.read_text()


def test_an_export_of_another_checkpoint_is_not_taken_for_this_one(tmp_path: Path, device: CpuDevice) -> None:
    run = tiny_run(tmp_path, "checkpoint.every=1")
    merged = export(run, ExportConfig(), checkpoint="2", on_note=lambda _: None).merged
    assert merged is not None
    cfg = EvalConfig(base=False, generate=False)
    last = evaluate_run(run, cfg, device, on_note=lambda _: None)
    assert last["step"] == 3 and "export_check" not in last
    assert "Not measured yet" in (merged / "README.md").read_text()


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "minimax_m2"])
@pytest.mark.parametrize("working", [torch.bfloat16, torch.float32])
def test_the_base_in_bf16_is_the_model_that_anyone_opens_in_bf16(
    tmp_path: Path, device: CpuDevice, name: str, working: torch.dtype
) -> None:
    """A cast would round angles of positions and what the family keeps in fp32 besides."""
    folder = save(name, tmp_path / "model")
    trained: Any = SimpleNamespace(working_dtype=working, base_dir=folder)
    trained.cfg = SimpleNamespace(model=SimpleNamespace(trust_remote_code=False))
    base = base_model(trained, device, Precision.bf16)
    plain = plain_model(folder, torch.bfloat16, device, asked=Precision.bf16)
    for ours, theirs in ((base.named_parameters, plain.named_parameters), (base.named_buffers, plain.named_buffers)):
        assert [(key, each.dtype) for key, each in ours()] == [(key, each.dtype) for key, each in theirs()]
    assert {each.dtype for each in base.buffers()} >= {torch.float32}
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(base(ids).logits, plain(ids).logits)
    assert {each.dtype for each in base_model(trained, device).parameters()} == {torch.float32}


def test_changed_data_is_refused(tmp_path: Path, device: CpuDevice) -> None:
    run = tiny_run(tmp_path)
    manifest = tmp_path / "data" / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(DataError, match="changed since the training"):
        evaluate_run(run, EvalConfig(), device)
    evaluate_run(run, EvalConfig(base=False), device, data=tmp_path / "data", on_note=lambda _: None)
    assert not (run.eval / "base.jsonl").exists()


def test_differing_answers_are_said_loudly() -> None:
    own, other = [answer("a", "a"), answer("b", "b")], [answer("a", "a"), answer("b", "c")]
    check = compare_answers((own, []), (other, []))
    assert check == {"compared": 2, "identical": 1, "max_logit_difference": None}
    notes: list[str] = []
    say_check(check, notes.append)
    assert notes[0].startswith("EXPORT CHECK FAILED: 1 of 2")


def test_any_model_folder_can_be_measured(tmp_path: Path, device: CpuDevice) -> None:
    model_dir = save_tiny_model(tmp_path / "model")
    data = write_prepared(tmp_path / "data", {"test": samples_of([20, 30], vocab_size=290)})
    summary = evaluate_model(model_dir, data, EvalConfig(), device, tmp_path / "out", on_note=lambda _: None)
    assert summary["model"]["exact_match"] == 0
    assert (tmp_path / "out" / "eval" / "model.jsonl").is_file()
