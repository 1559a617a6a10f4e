"""The three data sets, made of the same sample records, and the steps that all contestants take.

- ``short``: the records as they are, cut at 512 tokens.
- ``prompts``: long prompts and short answers, about a tenth of the tokens supervised.
- ``long``: several records as turns of one conversation, cut at 2048 tokens.

The steps are those of crosstune's own plan, so that it runs as it always does and the others take its batches.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.speed.machine import BUILD, Bench, Figures, run
from train.data.plan import BatchPlan
from train.data.prepared import PreparedData, PreparedSplit

CACHE = BUILD / "cache"
TEST_FRACTION = 0.1
"""Held out for the bench of evaluation."""
SMOLLM2 = CACHE / "models" / "smollm2-135m-instruct"


@dataclass(frozen=True)
class DataSet:
    """Records, prepared; and how a step is cut from them."""

    name: str
    file: Path
    max_length: int
    batch_tokens: int
    split: PreparedSplit
    folder: Path

    def words(self) -> list[str]:
        """Of crosstune's command."""
        return [*_words(self.file, self.max_length), f"batch_tokens={self.batch_tokens}"]

    def steps(self, count: int) -> list[list[dict[str, Any]]]:
        """Samples of the first steps, as the contestants read them."""
        plan = BatchPlan(self.split.lengths, seed=0, batch_tokens=self.batch_tokens)
        return [[sample_of(self.split, int(i)) for i in plan.samples(step)] for step in range(count)]


def model_of(bench: Bench) -> Path:
    """Folder of the model: the one asked for, or SmolLM2-135M, converted once."""
    if bench.model:
        return bench.model.resolve()
    if not SMOLLM2.is_dir():
        _crosstune(bench, ["prep", "model=smollm2_135m", f"cache_dir={CACHE}", *_words(records(bench), 512)])
    return SMOLLM2


def data_set(bench: Bench, name: str) -> DataSet:
    """Writes the records and prepares them, both once."""
    folder, model = BUILD / "data", model_of(bench)
    folder.mkdir(parents=True, exist_ok=True)
    make, max_length, samples = {"short": (_short, 512, 8), "prompts": (_prompts, 512, 8), "long": (_long, 2048, 2)}[
        name
    ]
    rows = make(json.loads(records(bench).read_text(encoding="utf-8")))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    tag = hashlib.sha256(f"{text}{max_length}{model}".encode()).hexdigest()[:8]
    file, prepared = folder / f"{name}-{tag}.jsonl", folder / f"{name}-{tag}"
    if not (prepared / "manifest.json").is_file():
        shutil.rmtree(prepared, ignore_errors=True)
        file.write_text(text, encoding="utf-8")
        words = [f"model.path={model}", *_words(file, max_length), f"out={prepared}"]
        _crosstune(bench, ["prep", *words])
    split = PreparedData.open(prepared).split("train")
    samples = min(samples, 3) if bench.quick else samples
    return DataSet(name, file, max_length, samples * round(float(split.lengths.mean())), split, prepared)


def facts(steps: list[list[dict[str, Any]]]) -> Figures:
    """Of the steps that are timed: tokens, the share that is supervised, and the mean length a token is in."""
    lengths = np.array([len(sample["ids"]) for step in steps for sample in step])
    learned = sum(end - start for step in steps for sample in step for start, end in sample["spans"])
    return {
        "samples": len(lengths),
        "tokens": int(lengths.sum()),
        "supervised_tokens": learned,
        "supervised_share": round(learned / float(lengths.sum()), 3),
        "mean_length": round(float((lengths**2).sum() / lengths.sum()), 1),
    }


def _words(file: Path, max_length: int) -> list[str]:
    cut = [f"max_length={max_length}", "too_long=truncate_right"]
    return [f"dataset.path={file}", *cut, f"dataset.test_fraction={TEST_FRACTION}"]


def _crosstune(bench: Bench, words: list[str]) -> None:
    command = [sys.executable, "-P", "-m", "launchers.cli", *words]
    run(command, bench.environment(bench.threads, ours=True))


def sample_of(split: PreparedSplit, index: int) -> dict[str, Any]:
    sample = split[index]
    return {"ids": sample.input_ids.tolist(), "spans": sample.spans.tolist()}


def records(bench: Bench) -> Path:
    """Alpaca rows: those asked for, or made-up ones with lengths like those of instructions that people write."""
    if bench.data:
        return bench.data.resolve()
    path = BUILD / "data" / "made-up.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = random.Random(0)
        words = "apache mit bsd gpl quick brown fox lazy dog licence which over jumps, therefore. Answer: never".split()
        sizes = [(rng.randint(5, 20), max(1, int(rng.lognormvariate(4.3, 0.8)))) for _ in range(1000)]
        texts = [(" ".join(rng.choices(words, k=a)), " ".join(rng.choices(words, k=b))) for a, b in sizes]
        path.write_text(json.dumps([{"instruction": q, "input": "", "output": a} for q, a in texts]), encoding="utf-8")
    return path


def _short(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [dict(row) for row in rows]


def _prompts(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Answers of other records as the context, then a record's question; its answer is cut to a tenth of the whole."""
    made = []
    for i, row in enumerate(rows):
        context, at = "", i
        while len(context) < 1400:
            at = (at + 1) % len(rows)
            context += rows[at]["output"] + "\n"
        question = f"{context[:1400]}\n\n{row['instruction'][:200]}"
        made.append({"instruction": question, "input": "", "output": row["output"][:180]})
    return made


def _long(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each conversation begins at another record and goes on until 2048 tokens are surely full."""
    made = []
    for first in range(0, len(rows), 4):
        turns: list[dict[str, str]] = []
        at, size = first, 0
        while size < 12_000:
            row = rows[at % len(rows)]
            question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
            size += len(question) + len(row["output"])
            at += 1
        made.append({"messages": turns})
    return made
