"""Whole runs of a tiny model through `train.run.train`, and whether two of them did the same, bit by bit.

Everything that has a position or a state is on: dropout, a mixture of two sources shown an uneven number of times in
epochs of about four steps, packing, accumulation, a warm-up, the validation loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from configs.compose import compose
from configs.schema.roots import TrainConfig
from tests.tiny import samples_of, save_tiny_model, write_prepared
from train.checkpoint.retention import latest
from train.run import train
from train.run_folder import RunFolder

STEPS = 6
TIMINGS = ("tokens_per_second", "peak_gib")
"""Figures of metrics.jsonl that are of the machine."""
LOCAL = ("run_id", "files")
"""Parts of an index that are not of the state; the files are compared themselves."""


@dataclass(frozen=True)
class Home:
    """A model and prepared data."""

    model: Path
    data: Path

    @classmethod
    def make(cls, folder: Path) -> Home:
        """The model and data, always the same, in `folder`."""
        model = save_tiny_model(folder / "model", num_hidden_layers=2, attention_dropout=0.1)
        lengths = {"train": (24, 31, 18, 40, 27), "more": (22, 35, 29), "validation": (20, 5, 41)}
        splits = {name: samples_of(lengths[name], vocab_size=290, seed=i) for i, name in enumerate(lengths)}
        data = write_prepared(folder / "data", splits)
        manifest = json.loads((data / "manifest.json").read_text())
        [second] = manifest["splits"].pop("more")["shards"]
        manifest["splits"]["train"]["shards"].append(second | {"source": "more"})
        manifest["mix"] = {"tiny": {"epochs": 1}, "more": {"epochs": 2.5}}
        (data / "manifest.json").write_text(json.dumps(manifest))
        return cls(model, data)


@dataclass(frozen=True)
class Setting:
    """What differs between the runs of a matrix."""

    sharding: str
    tuning: str
    ranks: int
    more: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join(
            [self.sharding, self.tuning, f"x{self.ranks}", *(word.rpartition("=")[2] for word in self.more)]
        )

    def config(self, home: Home, run_dir: Path) -> TrainConfig:
        """That of `crosstune train`."""
        paths = [f"model.path={home.model}", f"dataset.path={home.data}", f"run_dir={run_dir}"]
        sizes = ["batch_tokens=100", "micro_batch_tokens=50", "max_length=50", f"max_steps={STEPS}", "eval_every=2"]
        steps = ["optim.lr=0.01", "schedule=linear", "schedule.warmup_steps=3", "checkpoint.every=1"]
        how = ["device=cpu", "model.precision=fp32", f"nproc={self.ranks}", f"sharding={self.sharding}"]
        dropout = ["tuning.dropout=0.2"] if self.tuning == "lora" else []
        words = [*paths, *sizes, *steps, *how, f"tuning={self.tuning}", *dropout, *self.more]
        cfg: TrainConfig = compose("train", words)
        return cfg


def train_rank(cfg: TrainConfig, home: Home, run_dir: Path, resume: bool) -> None:
    """One rank of `crosstune train` or `crosstune resume`."""
    train(cfg, model_dir=home.model, prepared=home.data, run_dir=run_dir, resume=resume)


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what is of the machine."""
    lines = [json.loads(line) for line in RunFolder(run_dir).metrics.read_text().splitlines()]
    return [{key: line[key] for key in line if key not in TIMINGS} for line in lines]


def must_be_the_same(reference: Path, other: Path) -> None:
    """Two runs have the same history, weights, optimizer state and generators, bit by bit, and the same folders."""
    steps = [line["step"] for line in metrics_of(other)]
    assert steps == list(range(1, STEPS + 1)), f"{other}: steps {steps} in metrics.jsonl"
    assert metrics_of(other) == metrics_of(reference), f"{other}: metrics.jsonl"
    folders = [sorted(path.name for path in RunFolder(run).checkpoints.iterdir()) for run in (reference, other)]
    assert folders[0] == folders[1], f"{other}: checkpoints"
    a, b = (latest(RunFolder(run).checkpoints) for run in (reference, other))
    indices = [json.loads((path / "index.json").read_text()) for path in (a, b)]
    stripped = [{key: index[key] for key in index if key not in LOCAL} for index in indices]
    assert stripped[0] == stripped[1], f"{other}: index"
    found = [
        difference for file in sorted(indices[0]["files"]) for difference in tensor_differences(a / file, b / file)
    ]
    assert not found, f"{other}: " + "; ".join(found[:8])


def tensor_differences(a: Path, b: Path) -> Iterable[str]:
    """Names of tensors that two files do not both have, with the same bits."""
    with safe_open(a, "pt") as first, safe_open(b, "pt") as second:
        names = [set(first.keys()), set(second.keys())]
        yield from (f"{name} in one only" for name in sorted(names[0] ^ names[1]))
        for name in sorted(names[0] & names[1]):
            if not torch.equal(first.get_tensor(name).view(torch.uint8), second.get_tensor(name).view(torch.uint8)):
                yield name
