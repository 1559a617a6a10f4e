"""`crosstune eval`: base and tuned model on the same held-out samples; whether the export answers as the run does."""

from __future__ import annotations

import gc
import io
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import DataError
from configs.files import write_whole
from configs.schema.outputs import EvalConfig
from data_prep.tokenizer import load_tokenizer
from train.data.images import ImageInputs
from train.data.prepared import PreparedData
from train.devices.base import Device
from train.evaluate.measure import Ruler
from train.evaluate.models import base_model, compute_dtype, plain_model, put_training_on
from train.evaluate.samples import Sample, read_samples
from train.evaluate.scores import Answer, figures
from train.export.run import MERGED, is_export_of, refresh_cards
from train.export.trained import Trained
from train.models.load import dtype_name, load_config
from train.observe.metrics import read_metrics
from train.observe.progress import counter
from train.run_folder import RunFolder, sha256_of

EXPORT_CHECK_PROMPTS = 32
"""Held-out prompts on which the export is compared with the run's own model."""

Note = Callable[[str], None]
Summary = dict[str, Any]


def evaluate_run(
    run: RunFolder,
    cfg: EvalConfig,
    device: Device,
    *,
    checkpoint: str = "latest",
    data: Path | None = None,
    out: Path | None = None,
    on_note: Note = print,
    seconds_before: float = 0.0,
) -> Summary:
    """Measures a run's base and tuned model; writes ``eval/*.jsonl`` and ``summary.json``.

    The tuned model is the merged export in plain transformers where there is one of this checkpoint, and it is then
    compared with the run's own model; otherwise it is the base with the checkpoint on it.

    Args:
        run: folder of the run.
        cfg: the eval group.
        device: activated.
        checkpoint: ``latest``, a step number, or a folder.
        data: prepared data; None: the run's own.
        out: folder for the figures; None: the run's.
        on_note: what the user should know.
        seconds_before: spent on earlier stages of the same command; counted in the summary's seconds.

    Raises:
        CheckpointError: no such checkpoint, or one that does not fit the base.
        DataError: the data is not there, has changed since the training, or has no such split.
        ModelError: a model does not open.
    """
    started = time.monotonic()
    with Trained.open(run, checkpoint) as trained:
        data = data or _own_data(trained)
        samples = read_samples(data, cfg.split, cfg.limit)
        ruler = _ruler(trained, samples, cfg, device, on_note)
        ruler.images = images_of(data, trained.base_dir, trained.cfg.model.trust_remote_code)
        answers: dict[str, list[Answer]] = {}
        model = base_model(trained, device, cfg.precision)
        if cfg.base:
            answers["base"] = _measure(ruler, model, "base")
        model = put_training_on(model, trained)
        merged = run.export / MERGED
        check = None
        if is_export_of(trained, merged):
            subset = [s for s in samples if s.has_prompt][:EXPORT_CHECK_PROMPTS]
            own = ruler.measure(model, subset, keep_logits=True)
            del model
            gc.collect()  # peft's wrapper and the model refer to each other
            trusted = trained.cfg.model.trust_remote_code
            model = plain_model(merged, trained.working_dtype, device, trusted, cfg.precision)
            check = compare_answers(own, ruler.measure(model, subset, keep_logits=True))
            say_check(check, on_note)
        answers["tuned"] = _measure(ruler, model, "tuned")
        summary: Summary = {name: figures(given) for name, given in answers.items()}
        dtype = compute_dtype(trained.working_dtype, device, cfg.precision)
        summary |= _facts(cfg, samples, device, dtype, seconds_before + time.monotonic() - started)
        summary |= {"step": trained.reader.state.step, "checkpoint": trained.checkpoint.name}
        summary["manifest_sha256"] = sha256_of(data / "manifest.json")
        summary["peak_gib"] = max([summary["peak_gib"], *(r.get("peak_gib", 0.0) for r in read_metrics(run.metrics))])
        if check:
            summary["export_check"] = check
        write_figures(RunFolder(out or run.path), answers, summary)
        if out is None or out.resolve() == run.path.resolve():
            refresh_cards(trained, run.export)
    for line in table_lines(summary):
        on_note(line)
    return summary


def evaluate_model(
    model_dir: Path,
    data: Path,
    cfg: EvalConfig,
    device: Device,
    out: Path,
    *,
    on_note: Note = print,
    trust_remote_code: bool = False,
) -> Summary:
    """Measures any model folder on prepared data; writes ``eval/model.jsonl`` and ``summary.json`` in `out`.

    Raises:
        DataError: the data is not there or has no such split.
        ModelError: the model does not open.
    """
    started = time.monotonic()
    samples = read_samples(data, cfg.split, cfg.limit)
    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    ruler = Ruler(cfg, samples, tokenizer, device.torch_device, on_note)
    ruler.images = images_of(data, model_dir, trust_remote_code)
    fastest = device.fast_dtypes()[0]
    model = plain_model(model_dir, fastest, device, trust_remote_code, cfg.precision)
    answers = {"model": _measure(ruler, model, "model")}
    summary: Summary = {"model": figures(answers["model"])}
    dtype = compute_dtype(fastest, device, cfg.precision)
    summary |= _facts(cfg, samples, device, dtype, time.monotonic() - started)
    write_figures(RunFolder(out), answers, summary)
    for line in table_lines(summary):
        on_note(line)
    return summary


def _own_data(trained: Trained) -> Path:
    """The data the run was trained from, unchanged since: else held-out samples might have been trained on."""
    data, manifest = Path(trained.record.prepared), Path(trained.record.prepared) / "manifest.json"
    if manifest.is_file() and sha256_of(manifest) != trained.record.manifest_sha256:
        raise DataError(
            str(data), "changed since the training", remedy=f"data={data} measures on it nevertheless; or bring it back"
        )
    return data


def _ruler(trained: Trained, samples: Sequence[Sample], cfg: EvalConfig, device: Device, on_note: Note) -> Ruler:
    trust = trained.cfg.model.trust_remote_code
    tokenizer = load_tokenizer(trained.base_dir, trust_remote_code=trust)
    return Ruler(cfg, samples, tokenizer, device.torch_device, on_note)


def images_of(data: Path, model_dir: Path, trust_remote_code: bool) -> ImageInputs | None:
    """What makes the inputs of the data's images; None: it has none."""
    config = load_config(model_dir, trust_remote_code=trust_remote_code)
    return ImageInputs.of(PreparedData.open(data), model_dir, config)


def _measure(ruler: Ruler, model: Any, name: str) -> list[Answer]:
    with counter(f"eval {name}", len(ruler.samples)) as ruler.on_progress:
        answers, _ = ruler.measure(model)
    ruler.on_progress = None
    return answers


def _facts(cfg: EvalConfig, samples: Sequence[Sample], device: Device, dtype: torch.dtype, seconds: float) -> Summary:
    return {
        "precision": dtype_name(dtype),
        "test_size": len(samples),
        "split": cfg.split,
        "tokens": sum(len(s.input_ids) for s in samples),
        "supervised_tokens": sum(len(s.targets) for s in samples),
        "seconds": round(seconds, 1),
        "peak_gib": device.peak_memory_bytes() / 2**30,
    }


def compare_answers(own: tuple[list[Answer], Any], exported: tuple[list[Answer], Any]) -> Summary:
    """How the export's answers, and the logits of their first tokens, differ from the run's own."""
    pairs = list(zip(own[0], exported[0], strict=True))
    differences = [
        float((mine.first_logits_V - theirs.first_logits_V).abs().max())
        for mine, theirs in zip(own[1], exported[1], strict=True)
        if mine.first_logits_V is not None
    ]
    return {
        "compared": len(pairs),
        "identical": sum(mine.answer == theirs.answer for mine, theirs in pairs),
        "max_logit_difference": max(differences, default=None),
    }


def say_check(check: Summary, on_note: Note) -> None:
    """Says what the comparison gave; loudly where answers differ."""
    compared, identical = check["compared"], check["identical"]
    difference = check["max_logit_difference"]
    logits = "" if difference is None else f", largest logit difference {difference:.2g}"
    if identical == compared:
        on_note(f"export check: all {compared} answers of the merged model are the trained model's{logits}")
    else:
        on_note(f"EXPORT CHECK FAILED: {compared - identical} of {compared} answers differ from the run's own{logits}")
        on_note("  a merged model in bf16 rounds the update away in part; export.precision=fp32 keeps it whole")


def write_figures(folder: RunFolder, answers: dict[str, list[Answer]], summary: Summary) -> None:
    """Writes every answer and the summary, each file whole or not at all."""
    folder.eval.mkdir(parents=True, exist_ok=True)
    for stale in {"base", "tuned", "model"} - answers.keys():
        # Of an earlier measurement: its figures are no longer in the summary.
        (folder.eval / f"{stale}.jsonl").unlink(missing_ok=True)
    for name, given in answers.items():
        lines = (json.dumps(answer.to_json(), ensure_ascii=False) + "\n" for answer in given)
        write_whole(folder.eval / f"{name}.jsonl", "".join(lines))
    write_whole(folder.summary, json.dumps(summary, indent=2) + "\n")


def table_lines(summary: Summary) -> list[str]:
    """The figures as a table for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    # Figures of an older version do not say what they were computed in.
    precision = f", {summary['precision']}" if "precision" in summary else ""
    table.add_column(f"{summary['test_size']} {summary['split']} samples{precision}")
    table.add_column("exact match", justify="right")
    table.add_column("perplexity", justify="right")
    for name in ("base", "tuned", "model"):
        if name in summary:
            match, perplexity = summary[name]["exact_match"], summary[name]["perplexity"]
            table.add_row(name, "-" if match is None else f"{match:.1%}", f"{perplexity:,.3f}")
    text = io.StringIO()
    Console(file=text, width=78).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
