"""`crosstune prep` against `datasets.map`, from start to end, on the same rows and with the same result."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.bench.speed import data
from tests.bench.speed.machine import BUILD, SCRIPTS, Bench, Failed, Figures, calm
from tests.bench.speed.tree import measured
from train.data.prepared import PreparedData

ROWS, QUICK_ROWS = 30_000, 2_000
MAX_LENGTH = 512
FOLDER = BUILD / "runs" / "speed-prepare"


@dataclass(frozen=True)
class Way:
    """One way to prepare; all with a process a core."""

    name: str
    batched: bool | None = None
    """Of `datasets.map`; None: crosstune's command."""
    in_quick: bool = True


WAYS = (
    Way("crosstune prep"),
    Way("datasets.map, batched", batched=True),
    Way("datasets.map, row by row", batched=False, in_quick=False),
)


def preparation(bench: Bench) -> Figures:
    """Rounds of all ways; what each made first is compared with crosstune's, every row of it."""
    model, count = data.model_of(bench), QUICK_ROWS if bench.quick else ROWS
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    rows = FOLDER / "rows.jsonl"
    _write(rows, json.loads(data.records(bench).read_text(encoding="utf-8")), count)
    runs: dict[str, list[Figures]] = defaultdict(list)
    tokens, alike, differing = 0, set[str](), dict[str, str]()
    for _ in range(bench.rounds):
        for way in (way for way in WAYS if way.name not in differing and (way.in_quick or not bench.quick)):
            out = FOLDER / ("ours" if way.batched is None else "theirs")
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(FOLDER / "cache", ignore_errors=True)
            try:
                runs[way.name].append(_run(bench, way, model, rows, out))
            except Failed as fault:
                print(f"  {way.name}: {fault}", flush=True)
                continue
            if way.batched is None:
                tokens = int(PreparedData.open(out).split("train").lengths.sum())
            elif way.name not in alike:
                said = difference(FOLDER / "ours", out) if tokens else "crosstune's own is not there to compare with"
                if not said:
                    alike.add(way.name)
                    continue
                differing[way.name] = said
                del runs[way.name]
                print(f"  {way.name} is left out: {said}", flush=True)
    shutil.rmtree(FOLDER)
    table = {name: _summary(each, count, tokens) for name, each in runs.items()}
    for name, figures in table.items():
        print(f"  preparation of {count:,} rows, {tokens:,} tokens, {name}: {figures}", flush=True)
    ours = table.get(WAYS[0].name)
    ratios = {
        name: {key: round(figures[key] / ours[key], 2) for key in ("seconds", "cpu_seconds", "tree_gib")}
        for name, figures in table.items()
        if ours and figures is not ours
    }
    for name, each in ratios.items():
        print(f"  {name}: {each} times crosstune's", flush=True)
    return {"rows": count, "tokens": tokens, "table": table, "over_crosstune": ratios, "left_out": differing}


def difference(ours: Path, theirs: Path) -> str:
    """What of `theirs`, saved by `datasets`, is not what crosstune prepared; empty: all is equal, in the same order.

    Rows of `theirs` of which nothing is learned are passed over: crosstune leaves them out.
    """
    from datasets import load_from_disk

    split, row = PreparedData.open(ours).split("train"), 0
    for batch in load_from_disk(str(theirs)).with_format("numpy").iter(1000):
        for given, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            ids, learned = np.asarray(given), np.asarray(labels) != -100
            if not learned.any():
                continue
            if row == len(split):
                return f"more than {row} rows"
            sample, expected = split[row], np.zeros(len(ids), bool)
            for start, end in sample.spans:
                expected[start:end] = True
            if not np.array_equal(ids, sample.input_ids):
                return f"other tokens in row {row}"
            if not np.array_equal(learned, expected):
                return f"another mask in row {row}: {learned.sum()} tokens to {expected.sum()}"
            row += 1
    return "" if row == len(split) else f"{row} rows to {len(split)}"


def _write(path: Path, found: list[dict[str, str]], count: int) -> None:
    """The records over and over, with a number in question and answer so that no two are alike."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            row = found[i % len(found)]
            given = {"instruction": f"{row['instruction']} ({i})", "input": row.get("input") or ""}
            file.write(json.dumps(given | {"output": f"{row['output']} {i}"}, ensure_ascii=False) + "\n")


def _run(bench: Bench, way: Way, model: Path, rows: Path, out: Path) -> Figures:
    environment = bench.environment(bench.threads, ours=way.batched is None)
    if way.batched is None:
        asked = [f"model.path={model}", f"dataset.path={rows}", f"max_length={MAX_LENGTH}", "too_long=truncate_right"]
        words = ["-P", "-m", "launchers.cli", "prep", *asked, f"workers={bench.threads}", f"out={out}"]
        return measured([sys.executable, *words], environment)
    spec = {"model": str(model), "rows": str(rows), "out": str(out), "cache": str(FOLDER / "cache")}
    how = {"batched": way.batched, "processes": bench.threads, "threads": bench.threads, "max_length": MAX_LENGTH}
    path = BUILD / "spec.json"
    path.write_text(json.dumps(spec | how), encoding="utf-8")
    return measured([sys.executable, str(SCRIPTS / "library_prepare.py"), str(path)], environment)


def _summary(runs: list[Figures], rows: int, tokens: int) -> Figures:
    """Medians of the calm rounds; memory is the most of any."""
    seconds, cpu = (statistics.median(each[key] for each in calm(runs)) for key in ("seconds", "cpu_seconds"))
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "rows_per_second": round(rows / seconds),
        "tokens_per_second": round(tokens / seconds),
        "largest_gib": round(max(each["largest_gib"] for each in runs), 2),
        "tree_gib": round(max(each["tree_gib"] for each in runs), 2),
        "others_cores": max(each["others_cores"] for each in calm(runs)),
    }
