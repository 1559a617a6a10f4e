"""The indexer's loss under every way to spread a model over ranks: the same figures as on one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.schema.objective import CausalLMConfig, IndexerStage
from tests.distributed.forks import in_ranks
from tests.distributed.layouts import DEVICE, ENGINES, start
from tests.distributed.test_engines import SGD
from tests.tiny import samples_of
from tests.tiny_families import build
from train.data.collate import collate
from train.data.plan import RowKind
from train.data.sampler import GlobalStep
from train.engine.plain import PlainEngine
from train.engine.zero import ZeroEngine
from train.objectives.causal_lm import CausalLM
from train.objectives.totals import Totals

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PLACES = 4
STEPS = 3


def take_steps(out: Path, name: str, engine_name: str, stage: str, recompute: bool) -> None:
    """Three steps of seven samples, dealt to four pairs of rank and micro-batch; rank 0 writes the figures of each.

    The steps show in the figures of the next: whatever gradient is missing is missed there.
    """
    world = start()
    module = build(name, index_n_heads=32).train().requires_grad_(True)
    objective = CausalLM(CausalLMConfig(indexer_stage=IndexerStage(stage)))
    objective.choose(module, lambda text: None, on_host=True)
    if recompute:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = ENGINES[engine_name]
    engine = (PlainEngine if engine_name == "plain" else ZeroEngine)(
        config,
        module,
        optim=SGD(max_grad_norm=0),
        device=DEVICE,
        world=world,
        working_dtype=next(module.parameters()).dtype,
    )
    objective.attach(module)
    figures = []
    for number in range(STEPS):
        samples = samples_of((24, 3, 17, 5, 29, 4, 11), vocab_size=300, seed=number)
        targets = sum(int((s.spans[:, 1] - s.spans[:, 0]).sum()) for s in samples)
        totals = Totals(GlobalStep(np.arange(7), sum(len(s.input_ids) for s in samples), targets, []))
        own = PLACES // world.size
        for i in range(own):
            rows = tuple((int(j),) for j in range(world.rank * own + i, 7, PLACES))
            batch = collate(rows, samples.__getitem__, kind=RowKind.padded, device=DEVICE.torch_device)
            engine.backward(totals.add(objective.terms(engine.forward, batch)), last=i == own - 1)
        norm = engine.step(0.5)
        totals.read()
        summed = dict(zip(totals.sums, world.all_reduce_sum(list(totals.sums.values())), strict=True))
        figures.append(totals.means(summed) | {"grad_norm": norm})
    if world.rank == 0:
        out.write_text(json.dumps(figures))
    engine.close()
    world.close()


@pytest.mark.parametrize("stage", ["warmup", "sparse"])
@pytest.mark.parametrize("name", ["deepseek_v32", "glm5_next"])
def test_two_ranks_and_every_engine_train_the_indexer_as_one_does(tmp_path, name, stage):
    in_ranks(take_steps, 1, tmp_path / "one", name, "plain", stage, False)
    reference = json.loads((tmp_path / "one").read_text())
    kl = [line["indexer_kl"] for line in reference]
    assert len({round(value, 6) for value in kl}) == STEPS
    for engine, recompute in (("zero2", False), ("zero3", False), ("zero3", True)):
        out = tmp_path / f"{engine}{recompute}"
        in_ranks(take_steps, 2, out, name, engine, stage, recompute)
        for line, wanted in zip(json.loads(out.read_text()), reference, strict=True):
            assert line == pytest.approx(wanted, rel=2e-4), f"{engine}, recompute {recompute}"
