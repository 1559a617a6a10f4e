"""Part 5: preparation, export and evaluation against the obvious library calls, with the same result.

`crosstune eval` is measured on the same held-out samples and in the same format.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from configs.schema.device import DeviceConfig
from tests.bench.speed import data
from tests.bench.speed.export import exporting
from tests.bench.speed.machine import BUILD, Bench, Failed, Figures, calm, disturbed, script
from tests.bench.speed.preparation import preparation
from tests.bench.speed.tree import measured
from train.data.prepared import PreparedData
from train.devices.cpu import CpuDevice
from train.evaluate.models import compute_dtype
from train.models.load import dtype_name

BATCH = 8
"""Samples of a padded batch of the library's."""
OURS = "crosstune eval"
SAME, ROUNDED = 1e-3, 2e-2
"""Relative differences of the perplexity, in the same format and in another."""


def part_5(bench: Bench) -> None:
    """Seconds of whole commands: preparation; export; measurements of perplexity alone and with answers."""
    cases = [(64, 4)] if bench.quick else [(0, 95), (64, 24)]
    figures: Figures = bench.report.setdefault("5", {})
    figures["preparation"] = preparation(bench)
    figures["export"] = exporting(bench)
    figures["evaluation"] = [compare(bench, longest, limit) for longest, limit in cases]


def compare(bench: Bench, max_new_tokens: int, limit: int) -> Figures:
    """Rounds of both; `max_new_tokens` of 0: perplexity only."""
    model, found = data.model_of(bench), data.data_set(bench, "short")
    split = PreparedData.open(found.folder).split("test")
    limit = min(limit, len(split))
    samples = [data.sample_of(split, i) for i in range(limit)]
    device = CpuDevice(DeviceConfig())
    fast = device.fast_dtypes()[0]
    theirs = {"transformers": dtype_name(compute_dtype(fast, device))}  # what `crosstune eval` computes in
    if dtype_name(fast) != theirs["transformers"]:
        theirs[f"transformers, {dtype_name(fast)}"] = dtype_name(fast)  # where the figures may be a little off
    spec = {"model": str(model), "samples": samples, "batch": BATCH, "max_new_tokens": max_new_tokens}
    runs: dict[str, list[Figures]] = defaultdict(list)
    for _ in range(bench.rounds):
        runs[OURS].append(_ours(bench, model, found.folder, max_new_tokens, limit))
        for name, weights in theirs.items():
            given = script(bench, "library_eval", spec | {"weights": weights})
            inner = sum(given[f"{name}_seconds"] for name in ("load", "perplexity", "generate"))
            runs[name].append(given | {"inner_seconds": inner})
    table = {
        name: {
            "seconds": round(statistics.median(one["seconds"] for one in calm(each)), 1),
            "without_imports": round(statistics.median(one["inner_seconds"] for one in calm(each)), 1),
            "perplexity": round(each[0]["perplexity"], 4),
            "generated_tokens": each[0]["generated_tokens"],
            "peak_rss_gib": round(max(one["peak_rss_gib"] for one in each), 2),
            "others_cores": [one["others_cores"] for one in each],
        }
        for name, each in runs.items()
    }
    ours = table[OURS]
    for name, weights in theirs.items():
        off = table[name]["perplexity"] / ours["perplexity"] - 1
        if abs(off) > (SAME if weights == theirs["transformers"] else ROUNDED):
            raise Failed(f"{name} finds a perplexity that is off by {off:.1%}: they do not measure the same")
    keys = ("seconds", "without_imports")
    ratios = {name: {key: round(table[name][key] / ours[key], 2) for key in keys} for name in theirs}
    what = f"perplexity and {max_new_tokens} new tokens" if max_new_tokens else "perplexity"
    for name, each in table.items():
        print(f"  {what} of {limit} samples, {name}: {each}{disturbed(runs[name])}", flush=True)
    print(f"  {what}: over crosstune's {ratios}", flush=True)
    return {"what": what, "samples": limit, "table": table, "over_crosstune": ratios}


def _ours(bench: Bench, model: Path, prepared: Path, max_new_tokens: int, limit: int) -> Figures:
    """Figures of summary.json; tokens generated are counted in the answers' text, end tokens left out."""
    out = BUILD / "runs" / "speed-eval"
    shutil.rmtree(out, ignore_errors=True)
    asked = ["eval", f"model.path={model}", f"data={prepared}", "device=cpu", f"out={out}", f"eval.limit={limit}"]
    answers = [f"eval.max_new_tokens={max_new_tokens}"] if max_new_tokens else ["eval.generate=false"]
    words = [sys.executable, "-P", "-m", "launchers.cli", *asked, *answers]
    whole = measured(words, bench.environment(bench.threads, ours=True))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = (out / "eval" / "model.jsonl").read_text(encoding="utf-8").splitlines()
    given = [json.loads(line)["answer"] for line in lines]
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in given if text)
    return {
        "seconds": whole["seconds"],
        "others_cores": whole["others_cores"],
        "inner_seconds": summary["seconds"],
        "perplexity": summary["model"]["perplexity"],
        "generated_tokens": tokens,
        "peak_rss_gib": summary["peak_gib"],
    }
