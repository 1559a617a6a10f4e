"""The worker side of `test_families.py`: every family under every kind of sharding, in one pair of processes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from configs.errors import RunFailedError
from configs.schema.optim import OptimConfig
from configs.schema.sharding import PlainConfig, ShardingConfig, ZeroConfig
from configs.schema.tuning import FullConfig, LoraConfig
from tests.distributed.layouts import DEVICE, start
from tests.tiny_families import build, save
from train.checkpoint.layout import TrainerState
from train.checkpoint.restore import restore
from train.checkpoint.save import save as save_checkpoint
from train.engine.base import Engine, World
from train.engine.needs import needs_of
from train.engine.plain import PlainEngine
from train.engine.zero import ZeroEngine
from train.guard.agreement import must_agree
from train.models.families import family_of
from train.models.load import load_model
from train.models.short_rows import always_compress
from train.tuning.full import FullTuning
from train.tuning.lora import LoraTuning

STEPS, LR, CLIP = 2, 1.0, 0.3
# Small enough that stage 3 both splits and keeps whole parameters.
STAGE3 = {"zero_optimization": {"stage3_param_persistence_threshold": 500}}
SHARDING = {
    "plain": PlainConfig(),
    "zero1": ZeroConfig(stage=1),
    "zero2": ZeroConfig(stage=2),
    "zero3": ZeroConfig(stage=3, deepspeed=STAGE3),
}
ADAPTED = {"experts": "routed_experts", "hyper": "attention+hyper_connections"}
"""Kinds with LoRA, and what it sits on."""
MICRO_BATCHES = (((2, 16), (1, 11)), ((1, 9), None))
"""Rows and tokens by micro-batch and rank; None: this rank has no sample left."""


@dataclass
class SGD(OptimConfig):
    """Its steps are as exact as the gradients; and it has a state to be saved."""

    _target_: str = "torch.optim.SGD"
    momentum: float = 0.9


@dataclass(frozen=True)
class Case:
    """One family under one kind of sharding."""

    name: str
    kind: str

    @property
    def sharding(self) -> ShardingConfig:
        return SHARDING[self.kind.partition("-")[0]]

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind.endswith("bf16") else torch.float32

    @property
    def uneven(self) -> bool:
        """Eager experts, of which each rank's tokens hit others."""
        return self.kind.endswith("uneven")

    @property
    def label(self) -> str:
        return f"{self.name}-{self.kind}"


def make(case: Case, sharding: ShardingConfig, world: World, out: Path) -> Engine:
    """The engine of a case, over a new model with the same weights each time."""
    if case.dtype == torch.bfloat16:  # as it is loaded, with parts in fp32
        model = load_model(out / f"model-{case.name}", dtype=case.dtype)
    else:
        model = build(case.name)
    if case.uneven:
        model.set_experts_implementation("eager")
    always_compress(model)
    family = family_of(model.config)
    torch.manual_seed(7)
    if targets := ADAPTED.get(case.kind.split("-")[1] if "-" in case.kind else ""):
        module = LoraTuning(LoraConfig(rank=4, targets=[targets], dropout=0.0)).apply(model, family)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
    else:
        module = FullTuning(FullConfig()).apply(model, family)
    optim = SGD(max_grad_norm=CLIP)
    cls = PlainEngine if isinstance(sharding, PlainConfig) else ZeroEngine
    needs = needs_of(module)
    module.train()
    return cls(sharding, module, optim=optim, device=DEVICE, world=world, working_dtype=case.dtype, needs=needs)


def rows_of(case: Case, step: int, micro: int, rank: int) -> tuple[torch.Tensor, float]:
    """Token ids [rows, tokens] and their weight in the loss."""
    shape = MICRO_BATCHES[micro][rank]
    if case.uneven:
        return torch.full(shape or (1, 5), 20 + 31 * rank + 7 * step), float(shape is not None)
    generator = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
    return torch.randint(3, 300, shape or (1, 5), generator=generator), float(shape is not None)


def take_step(engine: Engine, case: Case, step: int) -> dict[str, float]:
    """One global step of this engine's world, the rows of both ranks where it is alone; its loss and norm."""
    world = engine.world
    ranks = [world.rank] if world.size == 2 else [0, 1]
    supervised = sum(rows * (tokens - 1) for micro in MICRO_BATCHES for rows, tokens in filter(None, micro))
    total, passes = 0.0, [(micro, rank) for micro in range(len(MICRO_BATCHES)) for rank in ranks]
    for micro, rank in passes:
        ids, weight = rows_of(case, step, micro, rank)
        ids = ids.to(DEVICE.torch_device)
        logits = engine.forward(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss = loss * weight / supervised
        engine.backward(loss, last=(micro, rank) == passes[-1])
        total += loss.item()
    return {"loss": world.all_reduce_sum([total])[0], "norm": engine.step(LR)}


def run(case: Case, sharding: ShardingConfig, world: World, out: Path, label: str) -> None:
    """Takes the steps and saves the weights; the figures go to a file, too."""
    engine = make(case, sharding, world, out)
    before = {name: p.detach().clone() for name, p in engine.weights()} if world.size == 1 else {}
    hits = expert_hits(engine.module) if case.uneven else []
    figures: dict[str, Any] = {"steps": [take_step(engine, case, step) for step in range(STEPS)]}
    figures["hits"] = [sorted(hit) for hit in hits]
    save_checkpoint(engine, out / label, TrainerState(STEPS, 0, 0, 0, 0), world)
    if world.size == 1:
        save_file({name: before[name].float() for name in engine.trained}, out / f"{label}.before")
    if case.dtype == torch.bfloat16 and world.size == 2:
        figures |= look_at_kept(engine, case)
    engine.close()
    (out / f"{label}.{world.rank}.json").write_text(json.dumps(figures))


def look_at_kept(engine: Engine, case: Case) -> dict[str, Any]:
    """What became of the parts in fp32, of steps that are not finite, and what the comparison of ranks says."""
    tensors = [*engine.weights(), *((name, b) for name, b in engine.module.named_buffers() if b.is_floating_point())]
    found: dict[str, Any] = {"fp32": sorted({name for name, tensor in tensors if tensor.dtype == torch.float32})}
    for dtype in (torch.float32, torch.bfloat16):
        found[str(dtype)] = poisoned(engine, case, next(p for p in engine.trained.values() if p.dtype == dtype))
    must_agree(engine, STEPS)
    name, parameter = next((name, p) for name, p in engine.weights() if p.dtype == torch.float32)
    parameter.data.add_(engine.world.rank)
    try:
        must_agree(engine, STEPS)
    except RunFailedError as error:
        found["disagreement"] = name in str(error)
    return found


def poisoned(engine: Engine, case: Case, parameter: torch.Tensor) -> list[Any]:
    """A step in which one rank's gradient of one parameter is not finite: its norm, and whether nothing was stepped."""
    hook = parameter.register_hook(lambda gradient: gradient * (float("inf") if engine.world.rank else 1.0))
    kept = [f.view(kind).clone() for f in engine.fragments(owned=False) for kind in f.kinds]
    norm = take_step(engine, case, STEPS)["norm"]
    hook.remove()
    after = [f.view(kind) for f in engine.fragments(owned=False) for kind in f.kinds]
    return [repr(norm), all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))]


def resave(case: Case, source: Path, sharding: str, world: World, out: Path) -> None:
    """Restores a checkpoint under another kind of sharding, over other weights, and saves it again."""
    engine = make(case, SHARDING[sharding], world, out)
    for fragment in engine.fragments(owned=False):
        fragment.view("master").fill_(9.0)
    state = restore(engine, source / f"step-{STEPS:08d}", world)
    save_checkpoint(engine, out / f"{source.name}-under-{sharding}-x{world.size}", state, world)
    engine.close()


def resaver(out: Path, case: tuple[str, str], sources: list[str], shardings: list[str]) -> None:
    """Every source under every kind of sharding at this number of ranks."""
    world = start()
    for source in sources:
        for sharding in shardings:
            resave(Case(*case), out / source, sharding, world, out)
    world.close()


def expert_hits(module: torch.nn.Module) -> list[set[int]]:
    """Of each layer's experts, those that a token of this rank went to; filled as the model runs."""
    hits: list[set[int]] = []

    def watch(part: torch.nn.Module) -> None:
        hit: set[int] = set()
        hits.append(hit)
        part.register_forward_pre_hook(lambda _, inputs: hit.update(inputs[1].flatten().tolist()))

    for path, part in module.named_modules():
        if path.endswith(".experts"):
            watch(part)
    return hits


def worker(out: Path, cases: Iterable[tuple[str, str]]) -> None:
    """First each case in one plain process, the two taking turns; then all of them in both."""
    world = start()
    todo = [Case(*case) for case in cases]
    for case in todo:
        if case.dtype == torch.bfloat16 and world.rank == 0 and not (out / f"model-{case.name}").exists():
            save(case.name, out / f"model-{case.name}")
    world.barrier()
    alone = {}
    for case in todo:
        alone[reference_of(case)] = case
    for i, (label, case) in enumerate(alone.items()):
        if i % 2 == world.rank:
            run(case, PlainConfig(), World(), out, label)
    world.barrier()
    for case in todo:
        run(case, case.sharding, world, out, case.label)
        if case.kind == "zero2-bf16":
            resave(case, out / reference_of(case), "zero2", world, out)
            resave(case, out / case.label, "plain", world, out)
            resave(case, out / case.label, "zero3", world, out)
    world.close()


def reference_of(case: Case) -> str:
    """Name of the plain run that this case must equal."""
    return f"{case.name}-alone{case.kind.partition('-')[2]}"
