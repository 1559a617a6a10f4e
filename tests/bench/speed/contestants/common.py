"""What the contestants share. Needs torch only: it is imported by an interpreter that does not have crosstune."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import torch

Sample = dict[str, Any]
"""``ids``: token ids; ``spans``: half-open ranges of indices that are supervised."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""What ``attention+mlp`` is on a Llama; the same for all contestants."""


def spec() -> dict[str, Any]:
    """The JSON file named by the first argument."""
    found: dict[str, Any] = json.loads(open(sys.argv[1], encoding="utf-8").read())
    torch.set_num_threads(found["threads"])
    return found


def labels(sample: Sample) -> list[int]:
    """-100 where nothing is learned. By spans, never by the pad id, which is the end token here."""
    given = [-100] * len(sample["ids"])
    for start, end in sample["spans"]:
        given[start:end] = sample["ids"][start:end]
    return given


def padded(samples: list[Sample], pad_id: int) -> dict[str, torch.Tensor]:
    """``[b x t]`` input_ids, attention_mask and labels, padded on the right to the batch's longest."""
    width = max(len(sample["ids"]) for sample in samples)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        ids, room = sample["ids"], width - len(sample["ids"])
        rows["input_ids"].append(ids + [pad_id] * room)
        rows["attention_mask"].append([1] * len(ids) + [0] * room)
        rows["labels"].append(labels(sample) + [-100] * room)
    return {name: torch.tensor(values) for name, values in rows.items()}


def peak_rss_gib() -> float:
    """Largest resident set of this process so far, as crosstune measures its own.

    Linux's getrusage counts what the process was forked from, even after exec; it is in KiB, macOS's in bytes.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / 2**30 if sys.platform == "darwin" else float(peak) / 2**20


def answer(**figures: Any) -> None:
    """The last line on standard output."""
    print(json.dumps(figures | {"ended_at": time.time(), "threads": torch.get_num_threads()}), flush=True)
