"""Saved under any engine at any number of ranks, resumed under any other: nothing of the training state is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch

from configs.schema.optim import AdamWConfig
from tests.distributed.forks import in_ranks
from tests.distributed.layouts import ENGINES, MORE_ENGINES, build, must_lie_on_device, run_step, start
from train.checkpoint.layout import CheckpointReader, TrainerState
from train.checkpoint.restore import restore
from train.checkpoint.save import save
from train.engine.base import Engine, World

pytestmark = pytest.mark.distributed

SAVED, END = 2, 4
"""Steps before the save, and those of the uninterrupted run."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIM = AdamWConfig(lr=5e-3, weight_decay=0.1, max_grad_norm=1.0)


def lr_at(step: int) -> float:
    """A warm-up, so that every step's rate matters."""
    return OPTIM.lr * min(1.0, (step + 1) / 5)


def train(engine: Engine, first: int, last: int, micro_batches: int) -> list[float]:
    return [run_step(engine, step, lr_at(step), micro_batches)[0] for step in range(first, last)]


def trainer_state(step: int) -> TrainerState:
    return TrainerState(step, epoch=0, samples_seen=7 * step, tokens_seen=109 * step, seed=5, extra={"a": [1, None]})


def run_name(dtype: str, tuning: str, dropout: float, name: str, ranks: int) -> str:
    return f"{dtype}-{tuning}-{'dropout' if dropout else 'exact'}-{name}-x{ranks}"


def layouts(plan: dict, world: World) -> product:
    return product([plan["dtype"]], [plan["tuning"]], plan["dropouts"], plan[f"x{world.size}"])


def make(plan: dict, dropout: float, name: str, world: World, scramble: bool) -> Engine:
    torch.manual_seed(7 + 100 * scramble + world.rank)
    how = {"lora": plan["tuning"] == "lora", "dtype": DTYPES[plan["dtype"]], "experts": plan["experts"]}
    engine = build(name, OPTIM, world, scramble=scramble, dropout=dropout, **how)
    torch.manual_seed(11 + 100 * scramble + world.rank)
    return engine


def save_all(plan: dict, out: Path, world: World) -> None:
    """Trains every layout of this world size without interruption, saving on the way and at the end."""
    losses = {}
    for dtype, tuning, dropout, name in layouts(plan, world):
        engine = make(plan, dropout, name, world, scramble=False)
        run = run_name(dtype, tuning, dropout, name, world.size)
        train(engine, 0, SAVED, plan["micro_batches"])
        save(engine, out / run, trainer_state(SAVED), world)
        losses[run] = train(engine, SAVED, END, plan["micro_batches"])
        save(engine, out / run, trainer_state(END), world)
        engine.close()
    if world.rank == 0:
        (out / f"saved-x{world.size}.json").write_text(json.dumps(losses))


def resume_all(plan: dict, out: Path, world: World) -> None:
    """Resumes every saved run under every layout of this world size; one engine takes its sources in turn."""
    uninterrupted = {}
    world.barrier()
    for file in sorted(out.glob("saved-x*.json")):
        uninterrupted |= json.loads(file.read_text())
    faults, resumed = [], 0
    for dtype, tuning, dropout, name in layouts(plan, world):
        engine = make(plan, dropout, name, world, scramble=True)
        own = run_name(dtype, tuning, dropout, name, world.size)
        sources = [own] if dropout else [run for run in uninterrupted if run.startswith(f"{dtype}-{tuning}-exact-")]
        others = [source for source in sources if source != own]
        losses_of = others if plan["all_losses"] else others[len(own) % max(1, len(others)) :][:1]
        for source in sources:
            expected = uninterrupted[source] if source in [own, *losses_of] else []
            faults += resume_one(engine, out, source, own, expected, plan["micro_batches"])
            resumed += 1
        must_lie_on_device(engine)
        engine.close()
    if world.rank == 0:
        (out / f"resumed-x{world.size}.json").write_text(json.dumps({"resumed": resumed, "faults": faults}))


def resume_one(
    engine: Engine, out: Path, source: str, own: str, expected: list[float], micro_batches: int
) -> list[str]:
    """What `own` lost of what `source` saved; if losses are expected, also what its next steps do otherwise."""
    again = out / f"again-{source}-under-{own}"
    state = restore(engine, out / source / f"step-{SAVED:08d}", engine.world)
    save(engine, again, state, engine.world)
    losses = train(engine, SAVED, SAVED + len(expected), micro_batches)
    if source == own:
        save(engine, again, trainer_state(END), engine.world)
    if engine.world.rank:
        return []
    faults = [f"right after the load: {what}" for what in differences(out / source, again, SAVED)]
    if source == own:
        faults += [f"at the end: {what}" for what in differences(out / source, again, END)]
        faults += [] if losses == expected else [f"losses {losses}, expected {expected}"]
    tolerance = 1e-5 if engine.working_dtype == torch.float32 else 5e-4  # the last bit of bf16 may round another way
    if losses != pytest.approx(expected, rel=tolerance):
        faults.append(f"losses {losses}, expected nearly {expected}")
    shutil.rmtree(again)
    return [f"{again.name}: {fault}" for fault in faults]


def differences(first: Path, again: Path, step: int) -> list[str]:
    folder = f"step-{step:08d}"
    with CheckpointReader(first / folder, verify=False) as a, CheckpointReader(again / folder) as b:
        if list(a.params) != list(b.params) or a.state != b.state:
            return ["names or trainer state"]
        found = []
        for name, entry in a.params.items():
            if entry.step != step or entry.scalars != b.params[name].scalars or entry.kinds != b.params[name].kinds:
                found.append(f"{name}: step count or kinds")
            if sorted(entry.kinds) != ["exp_avg", "exp_avg_sq", "master"]:
                found.append(f"{name}: kinds {entry.kinds}")
            for kind in entry.kinds:
                if not torch.equal(a.read(name, kind), b.read(name, kind)):
                    found.append(f"{name}: {kind}")
        return found[:4]


def folder_of(plan: dict) -> str:
    return f"{plan['dtype']}-{plan['tuning']}"


def worker(out: Path, plans: list[dict], tasks: list[str]) -> None:
    world = start()
    run_tasks(world, out, plans, tasks)
    world.close()


def run_tasks(world: World, out: Path, plans: list[dict], tasks: list[str]) -> None:
    for plan, task in product(plans, tasks):
        folder = out / folder_of(plan)
        folder.mkdir(exist_ok=True)
        if f"x{world.size}" in plan:
            {"save": save_all, "resume": resume_all}[task](plan, folder, world)


def run_matrix(out: Path, plans: list[dict]) -> None:
    """Runs the engines ``x<ranks>`` at each number of ranks, each resuming what any of the same plan saved."""
    *fewer, most = sorted(set().union(*map(sizes, plans)))
    for ranks in fewer:
        in_ranks(worker, ranks, out, plans, ["save"], seconds=3000)
    in_ranks(worker, most, out, plans, ["save", "resume"], seconds=3000)
    for ranks in fewer:
        in_ranks(worker, ranks, out, plans, ["resume"], seconds=3000)
    must_have_resumed(out, plans)


def sizes(plan: dict) -> list[int]:
    return [int(key[1:]) for key in plan if key.startswith("x")]


def must_have_resumed(out: Path, plans: list[dict]) -> None:
    """Every layout of every plan was resumed under every other, and nothing was lost."""
    for plan in plans:
        results = [json.loads((out / folder_of(plan) / f"resumed-x{ranks}.json").read_text()) for ranks in sizes(plan)]
        faults = sum((result["faults"] for result in results), [])
        assert not faults, "\n".join(faults[:20])
        count = sum(len(plan[f"x{ranks}"]) for ranks in sizes(plan))
        assert sum(result["resumed"] for result in results) == count**2 + (count if any(plan["dropouts"]) else 0)


def plan_of(tuning: str, dtype: str = "fp32", dropouts: Sequence[float] = (0.0,), **names: Sequence[str]) -> dict:
    """Layouts that resume each other. All loads are compared bit by bit; steps follow on a layout's own and one other.

    `WHOLE` takes steps after each.
    """
    plan = {"dtype": dtype, "tuning": tuning, "dropouts": list(dropouts), "all_losses": False, "micro_batches": 1}
    return plan | {"experts": 0} | names


WHOLE = {"all_losses": True, "micro_batches": 2}


def test_saved_under_one_engine_resumed_under_another(tmp_path):
    """LoRA under each engine; bf16, full tuning, and generators that go on under dropout, under fewer."""
    run_matrix(
        tmp_path,
        [
            plan_of("lora", x1=["plain", "zero3"], x2=list(ENGINES), x4=["zero3"]),
            plan_of("full", dropouts=[0.0, 0.2], x1=["plain"], x2=["zero2", "zero3"]),
            plan_of("lora", "bf16", x1=["plain"], x2=["zero1", "zero2", "zero3"]),
        ],
    )


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_whole_matrix(tmp_path, dtype, tuning):
    names = [*ENGINES, *MORE_ENGINES]
    plan = plan_of(tuning, dtype, dropouts=[0.0, 0.2], x1=names, x2=names, x4=names)
    run_matrix(tmp_path, [plan | WHOLE])
