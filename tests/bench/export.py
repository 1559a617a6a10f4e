"""What a streamed export costs: peak memory and seconds, beside peft's merge_and_unload and save_pretrained.

python -m tests.bench.export [GB of the model for the ratio] [GB of the one that is streamed only; 0: none] [folder]

Random Llama-shaped models in bf16, in several files, with a LoRA adapter on all projections; each way in a process of
its own, in turn, so that what else the machine does meets both. Seconds are without imports. Nothing here is a limit.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.compose import build, compose, save_resolved
from configs.schema.device import DeviceConfig
from configs.schema.optim import AdamWConfig
from configs.schema.outputs import ExportConfig
from configs.schema.sharding import PlainConfig
from train.checkpoint.layout import TrainerState
from train.checkpoint.save import save
from train.devices.cpu import CpuDevice
from train.engine.base import World
from train.engine.plain import PlainEngine
from train.export.layout import skeleton
from train.export.run import export
from train.export.tensors import Planned, write_model
from train.models.families import family_of
from train.run_folder import RunFolder, RunRecord, sha256_of
from train.tuning.base import Tuning

ROUNDS = 3
SHARD_GIB = 0.5
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 8}
VOCABULARY = 64_000
MIB = 2**20


def main(ratio_gb: float = 0.4, big_gb: float = 0.0, folder: str | None = None) -> None:
    """Prints peak memory and time of both ways, and of streaming alone for a large model."""
    with tempfile.TemporaryDirectory(dir=folder or ".", prefix=".bench-") as scratch:
        run, size = random_run(Path(scratch) / "ratio", ratio_gb)
        found: dict[str, list[tuple[float, float]]] = {"streamed": [], "merge_and_unload": []}
        for _ in range(ROUNDS):
            for way in found:
                found[way].append(_measured(way, run))
        _report(size, found)
        shutil.rmtree(Path(scratch) / "ratio")
        if big_gb:
            run, size = random_run(Path(scratch) / "big", big_gb)
            seconds, peak = _measured("streamed", run)
            print(
                f"export: {size / 1e9:.1f} GB streamed: {seconds:.1f} s ({size / 1e6 / seconds:.0f} MB/s), peak "
                f"{peak:.0f} MiB, ratio of memory to model {peak * MIB / size:.3f}"
            )


def _report(size: int, found: dict[str, list[tuple[float, float]]]) -> None:
    median = {way: [statistics.median(each) for each in zip(*runs, strict=True)] for way, runs in found.items()}
    for way, (seconds, peak) in median.items():
        all_seconds = ", ".join(f"{s:.1f}" for s, _ in found[way])
        print(f"export: {size / 1e9:.2f} GB, {way}: {seconds:.1f} s ({all_seconds}), peak {peak:.0f} MiB")
    seconds, peak = (median["streamed"][i] / median["merge_and_unload"][i] for i in (0, 1))
    print(f"export: streamed / merge_and_unload: time {seconds:.2f}, peak memory {peak:.2f}")


def _measured(way: str, run: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one way in a fresh process; its output is removed again."""
    command = [sys.executable, "-m", "tests.bench.export", way, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(run / "out")
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def _streamed(run: Path) -> None:
    export(RunFolder(run), ExportConfig(adapter=False, shard_gib=SHARD_GIB), out=run / "out", on_note=lambda _: None)


def _merged(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, run / "adapter").merge_and_unload()
    merged.save_pretrained(run / "out", max_shard_size=int(SHARD_GIB * 2**30))


def random_run(folder: Path, gigabytes: float) -> tuple[Path, int]:
    """A run of a model of that size, with its adapter in peft's format too, and the bytes of the model's weights."""
    run = RunFolder(folder)
    (run.path / "model").mkdir(parents=True)
    size = _write_base(run.path / "model", gigabytes)
    typed = [f"model.path={run.path / 'model'}", f"dataset.path={folder}", f"run_dir={folder}", "device=cpu"]
    cfg = compose("train", [*typed, "tuning=lora", "model.precision=bf16", "max_steps=1"])
    save_resolved(cfg, run.resolved)
    hashes = {p.name: sha256_of(p) for p in (run.path / "model").iterdir()}
    record = RunRecord(str(run.path / "model"), hashes, str(folder), "", "bf16", "PlainEngine", 1, "lora", "0", 1)
    run.write_record(record)
    module = _random_adapter(cfg, run.path / "model")
    device = CpuDevice(DeviceConfig())
    world = World()
    engine = PlainEngine(
        PlainConfig(), module, optim=AdamWConfig(), device=device, world=world, working_dtype=torch.float32
    )
    save(engine, run.checkpoints, TrainerState(1, epoch=0, samples_seen=1, tokens_seen=1, seed=0), world)
    made = export(run, ExportConfig(merged=False), out=folder / "adapters", on_note=lambda _: None).adapter
    assert made is not None
    made.rename(folder / "adapter")
    return folder, size


def _write_base(folder: Path, gigabytes: float) -> int:
    """Streams random bf16 weights of as many layers as fit."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def planned(layers: int) -> list[Planned]:
        config = LlamaConfig(**WIDE, num_hidden_layers=layers, vocab_size=VOCABULARY, dtype="bfloat16")
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        with torch.device("meta"):
            shapes = {name: tuple(t.shape) for name, t in LlamaForCausalLM(config).state_dict().items()}
        return [Planned(n, s, torch.bfloat16, lambda s=s: _random(s)) for n, s in shapes.items()]  # type: ignore[misc]

    one, two = (sum(t.num_bytes for t in planned(layers)) for layers in (1, 2))
    tensors = planned(max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1))
    write_model(folder, tensors, int(SHARD_GIB * 2**30))
    return sum(t.num_bytes for t in tensors)


def _random(shape: tuple[int, ...]) -> torch.Tensor:
    """Random rows over and over: the bytes must only not be all alike."""
    rows = torch.randn(min(shape[0], 64), *shape[1:]).mul_(0.02).bfloat16()
    return rows.repeat(-(-shape[0] // rows.shape[0]), *(1 for _ in shape[1:]))[: shape[0]]


def _random_adapter(cfg: Any, base: Path) -> nn.Module:
    """A module with nothing but the adapter's parameters, by their names."""
    model = skeleton(base)
    with torch.device("meta"):
        adapted = build(cfg.tuning, Tuning).apply(model, family_of(model.config, trust_remote_code=False))
    root = nn.Module()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            *path, own = name.split(".")
            at = root
            for part in path:
                if part not in at._modules:
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_parameter(own, nn.Parameter(torch.randn(parameter.shape) * 0.02))
    return root


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("streamed", "merge_and_unload"):
        import peft  # noqa: F401  # imports are not timed
        import transformers.models.llama.modeling_llama  # noqa: F401

        way, run_folder = sys.argv[1], Path(sys.argv[2])
        began = time.perf_counter()
        (_streamed if way == "streamed" else _merged)(run_folder)
        taken = time.perf_counter() - began
        print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
    else:
        main(*(float(a) for a in sys.argv[1:3]), *sys.argv[3:4])  # type: ignore[arg-type]
