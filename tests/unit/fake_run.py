"""A run folder as a finished licence run leaves it, without a model: for pages and readers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from configs.compose import compose, save_resolved
from train.evaluate.scores import Answer, figures
from train.run_folder import RunFolder, RunRecord

LABELS = ("apache-2.0", "mit", "gpl-2.0-plus", "lgpl-2.1-plus", "bsd-new", "mpl-2.0", "epl-1.0", "gpl-3.0-plus")
_NOTICES = (
    "Licensed under the {} licence; you may not use this file except in compliance with it. See the file LICENSE.",
    "This program is free software <you> can redistribute it & modify it under the terms of {}, or (at your option) "
    "any later version.\n\nThis program is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY.",
)


def fake_run(folder: Path, *, steps: int = 200, measured: bool = True) -> RunFolder:
    """Writes everything that a report is made from."""
    run = RunFolder(folder / "licenses-demo")
    run.path.mkdir(parents=True)
    data = _prepared(folder / "data")
    run.write_record(
        RunRecord(
            model_dir="/models/SmolLM2-135M-Instruct",
            model_sha256={"config.json": "1f" * 32, "model.safetensors": "ab" * 32},
            prepared=str(data),
            manifest_sha256="cd" * 32,
            precision="bf16",
            engine="PlainEngine",
            world_size=1,
            tuning="lora",
            code_version="0.1.0",
            total_steps=200,
        )
    )
    save_resolved(compose("run", ["experiment=licenses"]), run.resolved)
    run.environment.write_text(json.dumps({"python": "3.11.7", "cores": 2, "device": {"name": "cpu"}}))
    _metrics(run.metrics, steps)
    if measured:
        _evaluation(run)
    return run


def _prepared(folder: Path) -> Path:
    folder.mkdir()
    rng = random.Random(1)
    splits = {}
    for name, rows in (("train", 2980), ("validation", 60), ("test", 373)):
        bins = dict.fromkeys(range(16, 400, 16), 0)
        for _ in range(rows):
            bins[min(384, 16 * math.ceil(rng.lognormvariate(4.5, 0.5) / 16))] += 1
        splits[name] = {
            "rows": rows,
            "tokens": 92 * rows,
            "supervised_tokens": 7 * rows,
            "max_length": 377,
            "length_histogram": {str(edge): count for edge, count in bins.items()},
            "shards": [],
        }
    manifest = {
        "format_version": 1,
        "fingerprint": "77" * 32,
        "dataset": {"name": "licenses", "license": "CC-BY-4.0"},
        "splits": splits,
        "rejects": {"total": 12, "by_reason": {"longer than max_length": 12}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def _metrics(path: Path, steps: int) -> None:
    rng = random.Random(2)
    lines = []
    for step in range(1, steps + 1):
        tokens = rng.randint(520, 600)
        lines.append(
            {
                "step": step,
                "loss": 3.4 * math.exp(-step / 25) + 0.35 + rng.gauss(0, 0.12) * math.exp(-step / 150),
                "lr": 1e-3 * min(1, step / 6) * (1 + math.cos(math.pi * step / 200)) / 2,
                "grad_norm": 4 * math.exp(-step / 40) + 0.6 + 0.2 * rng.random(),
                "tokens": tokens,
                "supervised_tokens": tokens // 12,
                "tokens_per_second": rng.gauss(410, 25),
                "peak_gib": 2.1 + 0.4 * (1 - math.exp(-step / 20)),
                "data_hash": f"{step:08x}",
            }
        )
        if step % 50 == 0:
            lines[-1]["validation_loss"] = 3.2 * math.exp(-step / 25) + 0.45
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _evaluation(run: RunFolder) -> None:
    rng = random.Random(3)
    run.eval.mkdir()
    answers: dict[str, list[Answer]] = {"base": [], "tuned": []}
    for i in range(373):
        label = LABELS[i % len(LABELS)]
        prompt = (
            "<|im_start|>system\nGive the licence expression.<|im_end|>\n<|im_start|>user\n"
            + _NOTICES[i % 2].format(label)
            + "<|im_end|>\n<|im_start|>assistant\n"
        )
        tuned = label if rng.random() < 0.6 + 0.05 * (i % len(LABELS)) else rng.choice(LABELS)
        for name, said, nll in (("base", 'The license expression is:\n\n"', 30.0), ("tuned", tuned, 1.9)):
            answers[name].append(Answer(f"rules/{label}_{i}.RULE", prompt, label, said, nll * rng.random(), 7))
    for name, given in answers.items():
        (run.eval / f"{name}.jsonl").write_text("".join(json.dumps(a.to_json()) + "\n" for a in given))
    summary = {name: figures(given) for name, given in answers.items()} | {
        "test_size": 373,
        "split": "test",
        "seconds": 612.0,
        "peak_gib": 2.9,
        "export_check": {"compared": 32, "identical": 32, "max_logit_difference": 4.1e-5},
    }
    run.summary.write_text(json.dumps(summary))
