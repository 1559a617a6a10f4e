"""`prepare`, end to end, against the bare tokenizer and against `datasets.map`, in one run on the same rows.

    python -m tests.bench.preparation [--rows N] [--data alpaca.json] [--model FOLDER]

The bare tokenizer is `encode_batch` of the tokenizers library with threads of its own, on the rendered texts, nothing
else. `datasets.map` renders and tokenizes a row at a time, in one process, as it does by default, and in one a core;
loading the rows is not counted. Peak memory is that of all processes together beyond what this one had, shared pages
counted once (PSS).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from configs.compose import compose
from data_prep.pool import usable_cores
from data_prep.prepare import prepare
from data_prep.tokenizer import load_tokenizer
from tests.tiny import save_tiny_model

MAP_ROWS = 20_000
"""`datasets.map` is slow enough to be measured on fewer rows."""


def main() -> None:
    """Prints the figures and their ratios."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        model = arguments.model or save_tiny_model(tmp / "model")
        path = tmp / "rows.jsonl"
        _write_rows(path, arguments.rows, arguments.data)
        print(f"{arguments.rows:,} rows, {path.stat().st_size / 2**20:.0f} MiB, {usable_cores()} cores")
        cfg = compose("prep", [f"model.path={model}", f"dataset.path={path}", "max_length=4096", f"cache_dir={tmp}"])
        tokenizer = load_tokenizer(model)  # the libraries are imported before anything is timed
        with peak_memory() as peak:
            ours = _rate("preparation", arguments.rows, lambda: prepare(cfg, model, out=tmp / "out"))
        print(f"  peak memory of all its processes: {max(peak) / 2**20:,.0f} MiB")
        texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in _conversations(path)]
        backend = tokenizer.backend_tokenizer
        bare = _rate("bare encode_batch", len(texts), lambda: [backend.encode_batch(part) for part in _parts(texts)])
        mapped = [
            _rate(f"datasets.map, {n} processes", min(len(texts), MAP_ROWS), _mapping(path, tokenizer, tmp, n))
            for n in sorted({1, usable_cores()})
        ]
        shown = " and ".join(f"{ours / rate:.1f}" for rate in mapped)
        print(f"preparation: {ours / bare:.2f} of the bare tokenizer, {shown} times datasets.map")


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes in use by this process and its children beyond what it had, looked at each second."""
    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_full_info().pss

    def watch() -> None:
        while not done.wait(1.0):
            total = 0
            for each in [process, *process.children(recursive=True)]:
                try:
                    total += each.memory_full_info().pss
                except psutil.Error:
                    continue
            peak.append(total - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--data", type=Path, help="alpaca rows as a JSON list, repeated with a changing suffix")
    parser.add_argument("--model", type=Path, help="folder of a model; default: a tiny one, whose tokenizer is faster")
    found, _ = parser.parse_known_args()
    return found


def _write_rows(path: Path, rows: int, data: Path | None) -> None:
    """Rows of `data`, or made-up ones with as many characters as instructions of people mostly have."""
    if data is not None:
        found: list[dict[str, Any]] = json.loads(data.read_text())
    else:
        rng = random.Random(0)
        words = "apache mit bsd gpl quick brown fox lazy dog licence which over jumps, therefore. Answer: never".split()
        sizes = [(rng.randint(5, 20), int(rng.lognormvariate(4.3, 0.8))) for _ in range(1000)]
        found = [{"instruction": _text(rng, words, a), "input": "", "output": _text(rng, words, b)} for a, b in sizes]
    with path.open("w") as file:
        for i in range(rows):
            row = found[i % len(found)]
            file.write(json.dumps(row | {"output": f"{row['output']} {i}"}, ensure_ascii=False) + "\n")


def _text(rng: random.Random, words: list[str], count: int) -> str:
    return " ".join(rng.choices(words, k=max(1, count)))


def _conversations(path: Path) -> Iterator[list[dict[str, str]]]:
    with path.open() as file:
        for line in file:
            yield _turns(json.loads(line))


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    question = "\n".join(filter(None, [row["instruction"], row.get("input")]))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """So that the results of all need not be held at once."""
    return (texts[i : i + 5000] for i in range(0, len(texts), 5000))


def _rate(what: str, rows: int, work: Callable[[], object]) -> float:
    """Rows a second, printed; and the processor's time, which tells more where other work goes on."""
    started, before = time.perf_counter(), _cpu_seconds()
    work()
    rate = rows / (time.perf_counter() - started)
    print(f"  {what}: {rate:,.0f} rows/s, {1e6 * (_cpu_seconds() - before) / rows:,.0f} us of CPU a row")
    return rate


def _cpu_seconds() -> float:
    """Of this process and its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _mapping(path: Path, tokenizer: Any, tmp: Path, processes: int) -> Callable[[], object]:
    """What is timed of `datasets.map`."""
    import datasets

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    loaded = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp / "datasets"))
    rows = loaded.select(range(min(MAP_ROWS, len(loaded))))

    def tokens(row: dict[str, Any]) -> Any:
        return tokenizer(tokenizer.apply_chat_template(_turns(row), tokenize=False), add_special_tokens=False)

    return lambda: rows.map(tokens, num_proc=processes, load_from_cache_file=False)


if __name__ == "__main__":
    main()
