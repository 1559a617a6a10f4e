"""`crosstune export` of a merged model against peft's `merge_and_unload` and `save_pretrained`, from start to end."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tests.bench.export import random_run
from tests.bench.speed import data, ours
from tests.bench.speed.machine import BUILD, SCRIPTS, Bench, Failed, Figures, calm, run
from tests.bench.speed.tree import measured
from train.run_folder import RunFolder

FOLDER = BUILD / "runs" / "speed-export"
RANDOM_GB = 1.0
"""So large that starting does not hide the work."""
SHARD_GIB = 0.5
CROSSTUNE, PEFT = "crosstune export", "peft merge_and_unload"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-16}
"""Of the larger of the two values that are added: both ways may round in other places and order."""


@dataclass(frozen=True)
class Case:
    """A run, and its adapter in peft's format."""

    name: str
    run: Path
    model: Path
    adapter: Path
    tokenizer: bool
    """Whether the model's folder has one."""

    @property
    def bytes(self) -> int:
        """Of the base's weights."""
        return sum(path.stat().st_size for path in self.model.glob("*.safetensors"))


def exporting(bench: Bench) -> list[Figures]:
    """Rounds of both ways for a small model that was trained and a larger one of random weights."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    found = []
    for make in (trained,) if bench.quick else (trained, of_random_weights):
        try:
            found.append(compare(bench, make(bench)))
        except Failed as fault:  # no figures of what is not the same
            print(f"  export, {make.__name__}: left out: {fault}", flush=True)
    shutil.rmtree(FOLDER)
    return found


def trained(bench: Bench) -> Case:
    """Two steps of LoRA, with so large a rate that what bf16 rounds away is little of the update."""
    model, found = data.model_of(bench), data.data_set(bench, "short")
    folder = FOLDER / "trained"
    asked = [f"model.path={model}", *found.words(), *ours.COMMON, *ours.LORA, "max_steps=2", "optim.lr=0.01"]
    environment = bench.environment(bench.threads, ours=True)
    crosstune = [sys.executable, "-P", "-m", "launchers.cli"]
    run([*crosstune, "train", *asked, f"run_dir={folder}"], environment)
    run([*crosstune, "export", f"run_dir={folder}", "export.merged=false", f"out={FOLDER / 'made'}"], environment)
    return Case("trained", folder, model, FOLDER / "made" / "adapter", tokenizer=True)


def of_random_weights(bench: Bench) -> Case:
    """A Llama whose weights and adapter are random."""
    folder, _ = random_run(FOLDER / "random", RANDOM_GB)
    return Case("random weights", folder, folder / "model", folder / "adapter", tokenizer=False)


def compare(bench: Bench, case: Case) -> Figures:
    """Seconds and memory of both; what they wrote is compared in the first round."""
    dtype = DTYPES[RunFolder(case.run).read_record().precision]  # that the base had while it trained
    made = {name: FOLDER / ("ours" if name == CROSSTUNE else "theirs") for name in (CROSSTUNE, PEFT)}
    runs: dict[str, list[Figures]] = defaultdict(list)
    alike: Figures = {}
    for number in range(bench.rounds):
        for name, out in made.items():
            shutil.rmtree(out, ignore_errors=True)
            runs[name].append(_ours(bench, case, out) if name == CROSSTUNE else _peft(bench, case, dtype, out))
        if number == 0:
            alike = likeness(case.model, made[CROSSTUNE] / "merged", made[PEFT])
    table = {
        name: {
            "seconds": round(statistics.median(one["seconds"] for one in calm(each)), 2),
            "cpu_seconds": round(statistics.median(one["cpu_seconds"] for one in calm(each)), 2),
            "largest_gib": round(max(one["largest_gib"] for one in each), 2),
            "others_cores": max(one["others_cores"] for one in calm(each)),
        }
        for name, each in runs.items()
    }
    ratios = {key: round(table[PEFT][key] / table[CROSSTUNE][key], 2) for key in table[PEFT] if key != "others_cores"}
    for name, figures in table.items():
        print(f"  export, {case.name}, base of {case.bytes / 1e9:.2f} GB, in {dtype}, {name}: {figures}", flush=True)
    print(f"  export, {case.name}: peft / crosstune {ratios}, {alike}", flush=True)
    about = {"what": case.name, "base_gb": round(case.bytes / 1e9, 2), "dtype": dtype, "alike": alike}
    return about | {"table": table, "peft_over_crosstune": ratios}


def likeness(base: Path, ours: Path, theirs: Path) -> Figures:
    """How the tensors of two merged models agree: the share of equal values, and of values that training moved.

    Raises:
        Failed: names, shapes or number formats differ, a value differs by more than rounding, or nothing was merged.
    """
    files = [_places(folder) for folder in (base, ours, theirs)]
    if set(files[1]) != set(files[2]):
        raise Failed(f"other tensors: {sorted(set(files[1]) ^ set(files[2]))[:3]}")
    equal = moved = count = 0
    for name in files[1]:
        before, mine, other = (_tensor(places[name], name) for places in files)
        before = before.to(mine.dtype)
        if (mine.shape, mine.dtype) != (other.shape, other.dtype):
            raise Failed(f"{name}: {mine.dtype} {list(mine.shape)} to {other.dtype} {list(other.shape)}")
        equal, moved, count = (
            equal + int((mine == other).sum()),
            moved + int((mine != before).sum()),
            count + mine.numel(),
        )
        update = (mine.float() - before.float()).abs()
        bound = ROUNDING[mine.dtype] * torch.maximum(before.float().abs(), update) + torch.finfo(torch.bfloat16).tiny
        if not bool(((mine.float() - other.float()).abs() <= bound).all()):
            raise Failed(f"{name} differs by more than rounding")
    if not moved:
        raise Failed("nothing was merged")
    return {"equal_values": round(equal / count, 4), "moved_values": round(moved / count, 4)}


def _places(folder: Path) -> dict[str, Path]:
    """Tensor -> its file."""
    found = dict[str, Path]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
        return tensor


def _ours(bench: Bench, case: Case, out: Path) -> Figures:
    asked = [f"run_dir={case.run}", "export.adapter=false", f"out={out}"]
    words = ["-P", "-m", "launchers.cli", "export", *asked, f"export.shard_gib={SHARD_GIB}"]
    return measured([sys.executable, *words], bench.environment(bench.threads, ours=True))


def _peft(bench: Bench, case: Case, dtype: str, out: Path) -> Figures:
    spec = {"model": str(case.model), "adapter": str(case.adapter), "out": str(out), "tokenizer": case.tokenizer}
    path = BUILD / "spec.json"
    how = {"dtype": dtype, "shard_bytes": int(SHARD_GIB * 2**30), "threads": bench.threads}
    path.write_text(json.dumps(spec | how), encoding="utf-8")
    words = [sys.executable, str(SCRIPTS / "library_export.py"), str(path)]
    return measured(words, bench.environment(bench.threads, ours=False))
