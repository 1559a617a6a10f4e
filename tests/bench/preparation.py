"""Rows/s of `prepare` against the bare tokenizer on the same rendered texts."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from configs.compose import compose
from data_prep.prepare import prepare
from tests.tiny import CHATML, save_tiny_model

ROWS = 20_000


def main() -> None:
    """Prints both times and their ratio."""
    words = "apache mit bsd gpl quick brown fox lazy dog licence which over jumps".split()
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(rng.choices(words, k=30)) + f" {i}", "completion": " ".join(rng.choices(words, k=20))}
        for i in range(ROWS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        model = save_tiny_model(tmp / "model")
        (tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = compose("prep", [f"model.path={model}", f"dataset.path={tmp / 'rows.jsonl'}"])
        started = time.perf_counter()
        prepare(cfg, model, out=tmp / "out")
        ours = time.perf_counter() - started
        tokenizer = AutoTokenizer.from_pretrained(model, chat_template=CHATML)
        texts = [
            f"<|im_start|>user\n{r['prompt']}<|im_end|>\n<|im_start|>assistant\n{r['completion']}<|im_end|>\n"
            for r in rows
        ]
        started = time.perf_counter()
        tokenizer(texts)
        bare = time.perf_counter() - started
    print(f"preparation: {ROWS / ours:.0f} rows/s, bare tokenizer {ROWS / bare:.0f} rows/s, ratio {bare / ours:.2f}")
