"""What the plan says of ZeRO's tensors beside what DeepSpeed really holds on two ranks."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch

from configs.compose import build, compose
from tests.distributed.forks import in_ranks
from tests.tiny_families import VOCABULARY, save
from train.data.plan import RowKind
from train.plan import tape as part
from train.plan.model import Model
from train.plan.predict import Data, Predictor
from train.plan.zero_engines import Stage3, script_of

pytestmark = pytest.mark.distributed

WITHIN = 0.1
CLOSE = 0.02
"""Of tensors that stay; what a plan without parts in fp32 is off by more than."""
ADAPTED = ["tuning=lora", "tuning.targets=[routed_experts]", "tuning.rank=16"]


def config(home: Path, precision: str, sharding: str, zero: dict[str, int], tuning: list[str]):
    given = ",".join(f"{key}:{value}" for key, value in zero.items())
    keys = [f"+sharding.deepspeed={{zero_optimization:{{{given}}}}}"] if zero else []
    words = [f"model.path={home / 'model'}", "dataset.path=x", "device=cpu", f"model.precision={precision}"]
    return compose("train", [*words, *tuning, "packing=off", f"sharding={sharding}", *keys])


def planned(home: Path, *words):
    cfg = config(home, *words)
    dtype = torch.bfloat16 if words[0] == "bf16" else torch.float32
    return Predictor(
        cfg,
        Model(cfg, home / "model"),
        dtype=dtype,
        on_cpu=True,
        kind=RowKind.padded,
        world=2,
        data=Data(),
        base_bytes=lambda: 0,
    )


def tensors_alive() -> int:
    """Bytes of every tensor's storage, each once."""
    gc.collect()
    found = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in found}
    return sum(storages.values())


def rank(home: Path, *words) -> None:
    """Two steps; writes what is gathered at the most, and what lives beyond what was there before."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    from tests.distributed.layouts import DEVICE, start
    from train.models.families import family_of
    from train.models.load import load_config
    from train.objectives.base import Objective
    from train.run import make_engine

    world, cfg = start(), config(home, *words)
    family = family_of(load_config(home / "model"))
    before = tensors_alive()
    objective = build(cfg.objective, Objective)
    engine = make_engine(cfg, home / "model", family, RowKind.padded, DEVICE, world, lambda text: None, objective)
    gathered, large = [0], [p for p in engine.module.parameters() if not getattr(p, "ds_persist", True)]
    fetch = PartitionedParameterCoordinator._fetch_sub_module_impl

    def watched(self, *args):
        fetch(self, *args)
        gathered.append(sum(p.ds_numel for p in large if p.ds_status != ZeroParamStatus.NOT_AVAILABLE))

    PartitionedParameterCoordinator._fetch_sub_module_impl = watched
    engine.module.train()
    for _ in range(2):
        ids = torch.randint(3, VOCABULARY - 20, (2, 24))
        engine.backward(engine.forward(input_ids=ids, use_cache=False).logits.float().square().mean(), last=True)
        engine.step(1e-3)
    del ids
    figures = {"gathered": max(gathered), "held": tensors_alive() - before}
    if world.rank == 0:
        (home / "figures.json").write_text(json.dumps(figures))
    engine.close()


def measured(home: Path, *words) -> dict[str, int]:
    in_ranks(rank, 2, home, *words, seconds=240)
    return json.loads((home / "figures.json").read_text())


SMALL = {"stage3_param_persistence_threshold": 500}


@pytest.mark.parametrize(
    ("name", "prefetch", "max_live", "reuse"),
    [
        ("glm4_moe", 0, 10**9, 1),
        ("glm4_moe-experts", 0, 10**9, 1),
        ("glm4_moe", 1000, 10**9, 1),
        ("minimax_m2", 3000, 60000, 10000),
        pytest.param("glm4_moe", 5000, 30000, 20000, marks=pytest.mark.slow),
        pytest.param("deepseek_v4", 3000, 60000, 10000, marks=pytest.mark.slow),
        pytest.param("llama", 500, 40000, 1, marks=pytest.mark.slow),
    ],
)
def test_as_much_is_gathered_as_planned(tmp_path, name, prefetch, max_live, reuse):
    """Whole layers of experts, and what runs ahead of them."""
    name, _, adapted = name.partition("-")
    save(name, tmp_path / "model")
    zero = SMALL | {
        "stage3_prefetch_bucket_size": prefetch,
        "stage3_max_live_parameters": max_live,
        "stage3_max_reuse_distance": reuse,
    }
    words = ("fp32", "zero3", zero, ADAPTED if adapted else ["tuning=full"])
    script = script_of(planned(tmp_path, *words)._setting())
    assert isinstance(script, Stage3)
    assert script.gathered().large == pytest.approx(measured(tmp_path, *words)["gathered"], rel=WITHIN)


@pytest.mark.parametrize(
    ("name", "sharding"),
    [
        ("deepseek_v4", "zero2"),
        ("deepseek_v4", "zero3"),
        pytest.param("deepseek_v4", "zero1", marks=pytest.mark.slow),
        pytest.param("bailing_hybrid", "zero3", marks=pytest.mark.slow),
        pytest.param("glm4_moe", "zero3", marks=pytest.mark.slow),
    ],
)
def test_as_much_is_held_as_planned(tmp_path, name, sharding):
    """In bf16: masters and state of what is spread, and parts in fp32 whole with gradients and state of their own."""
    save(name, tmp_path / "model")
    zero = {"reduce_bucket_size": 100_000} | (SMALL if sharding == "zero3" else {})
    words = ("bf16", sharding, zero, ["tuning=full"])
    made = planned(tmp_path, *words)._setting()
    script_of(made).write(passes=1, steps=2)
    held = made.device.parts_after(len(made.device.events) - 1)
    del held[part.COPY]  # nothing is saved here
    found = measured(tmp_path, *words)["held"]
    assert held.total() == pytest.approx(found, rel=CLOSE), held
