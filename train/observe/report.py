"""report.html of a run: one page, nothing loaded from elsewhere. Shows what is there: a run may not be measured yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from os.path import commonprefix
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from configs.files import write_whole
from train.evaluate.scores import Answer, worst_classes
from train.loop import Record
from train.observe import charts
from train.observe.metrics import read_metrics
from train.observe.pages import html_page
from train.run_folder import RunFolder

SHOWN_CHARACTERS = 700
"""Of a prompt; longer ones are cut in the middle."""


def write_report(run: RunFolder) -> Path:
    """Writes ``report.html`` from metrics.jsonl, the manifest, the answers and summary.json.

    Args:
        run: folder of a run, finished or not.

    Returns:
        The page.

    Raises:
        CheckpointError: it is not the folder of a run.
        StorageError: the page cannot be written.
    """
    record = run.read_record()
    metrics = read_metrics(run.metrics)
    manifest = _json(Path(record.prepared) / "manifest.json")
    summary = _json(run.summary)
    base, tuned = _answers(run.eval / "base.jsonl"), _answers(run.eval / "tuned.jsonl")
    config = run.resolved.read_text(encoding="utf-8") if run.resolved.is_file() else ""
    page = html_page(
        "train.observe",
        "report.html.jinja",
        name=run.path.resolve().name,
        record=record,
        summary=summary,
        tiles=_tiles(summary, metrics, record.total_steps, _predicted(_json(run.plan))),
        charts=_charts(metrics),
        manifest=manifest,
        histogram=_histogram(manifest),
        examples=_examples(base, tuned, _examples_wanted(config)),
        confusion=worst_classes(tuned),
        config=config,
        environment=json.dumps(_json(run.environment), indent=2),
    )
    write_whole(run.report, page)
    return run.report


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is not (yet) there."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _answers(path: Path) -> list[Answer]:
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [Answer(**{key: value for key, value in line.items() if key != "exact"}) for line in lines]


def _predicted(plan: dict[str, Any]) -> str:
    """Of the training, on rank 0; empty where nothing was predicted."""
    return f"predicted {plan['device_bytes'] / 2**30:.1f} GiB" if "device_bytes" in plan else ""


def _examples_wanted(config: str) -> int:
    """`eval.examples` of the run's config; a run that only trained has no such group."""
    group = (yaml.safe_load(config) or {}).get("eval") or {}
    return int(group.get("examples", 10))


def _tiles(
    summary: dict[str, Any], metrics: Sequence[Record], total_steps: int, predicted: str
) -> list[dict[str, str]]:
    """The figures on top of the page: what, value, and what it is compared with."""
    steps = _counted(metrics)
    tiles = []
    tuned, base = summary.get("tuned"), summary.get("base")
    if tuned and tuned["exact_match"] is not None:
        before = f"base model {base['exact_match']:.1%}" if base else ""
        tiles.append({"what": "Exact match", "value": f"{tuned['exact_match']:.1%}", "than": before})
    if tuned:
        before = f"base model {base['perplexity']:,.2f}" if base else ""
        tiles.append({"what": "Perplexity", "value": f"{tuned['perplexity']:,.2f}", "than": before})
    if steps:
        than = f"first step {steps[0]['loss']:.3f}"
        tiles.append({"what": "Training loss", "value": f"{fmean(r['loss'] for r in steps[-20:]):.3f}", "than": than})
        skipped = len(metrics) - len(steps)
        than = f"of {total_steps:,}" + (f", {skipped:,} skipped" if skipped else "")
        tiles.append({"what": "Steps", "value": f"{metrics[-1]['step']:,}", "than": than})
        speed = sum(r["tokens"] for r in steps) / sum(r["tokens"] / r["tokens_per_second"] for r in steps)
        total = sum(r["tokens"] for r in steps)
        tiles.append({"what": "Tokens per second", "value": f"{speed:,.0f}", "than": f"{total:,} tokens in all"})
    peak = max([summary.get("peak_gib", 0.0), *(r["peak_gib"] for r in steps)], default=0.0)
    if peak:
        minutes = f"{summary['seconds'] / 60:.1f} min in all" if "seconds" in summary else ""
        than = ", ".join(text for text in (predicted, minutes) if text)
        tiles.append({"what": "Peak memory", "value": f"{peak:.1f} GiB", "than": than})
    return tiles


def _counted(metrics: Sequence[Record]) -> list[Record]:
    """The steps that changed the weights: the others have no loss, or no gradient, to show."""
    return [record for record in metrics if "loss" in record and "skipped" not in record]


def _charts(metrics: Sequence[Record]) -> list[str]:
    """SVG of loss, learning rate, speed, memory and gradient norm; [] before the first step."""
    steps = _counted(metrics)
    if not steps:
        return []
    validation = [(r["step"], r["validation_loss"]) for r in metrics if r.get("validation_loss") is not None]

    def curve(key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in steps]

    return [
        charts.loss_chart(curve("loss"), validation),
        charts.line_chart(curve("lr"), "Learning rate"),
        charts.line_chart(curve("tokens_per_second"), "Tokens per second", mean=True),
        charts.line_chart(curve("peak_gib"), "Peak memory (GiB)"),
        charts.line_chart(curve("grad_norm"), "Gradient norm before clipping"),
    ]


def _histogram(manifest: dict[str, Any]) -> str:
    splits = manifest.get("splits", {})
    found = {name: split["length_histogram"] for name, split in splits.items() if split.get("length_histogram")}
    return charts.histogram_chart(found) if found else ""


def _examples(base: Sequence[Answer], tuned: Sequence[Answer], wanted: int) -> list[dict[str, Any]]:
    """Answers before and after: spread evenly over the split, so that neither luck nor we choose them."""
    answered = [a for a in tuned if a.answer is not None]
    before = {a.id: a.answer for a in base}
    stride = max(1, len(answered) // wanted) if wanted else 1
    shown = answered[::stride][:wanted]
    begin, end = _shared_ends([a.prompt for a in answered])
    return [
        {
            "id": a.id,
            "prompt": _cut(a.prompt[begin : len(a.prompt) - end].strip()),
            "reference": a.reference,
            "before": before.get(a.id),
            "after": a.answer,
            "exact": a.exact,
        }
        for a in shown
    ]


def _shared_ends(prompts: Sequence[str]) -> tuple[int, int]:
    """Characters that all prompts share at their beginning and end: the template, the system turn."""
    if len(prompts) < 2:
        return 0, 0
    begin = len(commonprefix(list(prompts)))
    shortest = min(map(len, prompts)) - begin
    end = min(len(commonprefix([p[::-1] for p in prompts])), shortest)
    return begin, end


def _cut(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} […] {text[-half:]}"
