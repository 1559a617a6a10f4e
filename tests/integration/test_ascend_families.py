"""Every family takes a step on a pretended NPU: the real torch_npu API over a pretended CANN, not a card.

It shows that no layer of the family asks for something that torch_npu does not know or that lives on another device,
and that the step is that of the CPU. The card's own rounding and speed it cannot show (`test_ascend_road.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.schema.optim import OptimConfig
from configs.schema.sharding import PlainConfig
from configs.schema.tuning import FullConfig
from tests.cells import ASCEND, FAMILIES
from tests.distributed.layouts import DEVICE, DEVICE_VARIABLE, launch, start
from tests.tiny_families import build
from train.engine.base import World
from train.engine.plain import PlainEngine
from train.models.families import family_of
from train.tuning.full import FullTuning

QUICK = ("qwen3_5", "deepseek_v4", "minimax_m2")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]


def step(name: str, world: World) -> dict[str, torch.Tensor]:
    """Loss and gradients of two rows of 70 tokens, by name."""
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (2, 70))
    model = build(name).train()
    FullTuning(FullConfig()).apply(model, family_of(model.config))
    optim = OptimConfig(_target_="torch.optim.SGD", max_grad_norm=0.0)
    engine = PlainEngine(PlainConfig(), model, optim=optim, device=DEVICE, world=world, working_dtype=torch.float32)
    ids = ids.to(DEVICE.torch_device)
    loss = engine.forward(input_ids=ids, labels=ids, use_cache=False).loss
    engine.backward(loss, last=True)
    found = {n: p.grad.detach().cpu().clone() for n, p in engine.trained.items()}
    places = {p.grad.device.type for p in engine.trained.values()}
    assert places == {DEVICE.torch_device.type}, places
    engine.step(1e-3)
    engine.close()
    return found | {"loss": loss.detach().cpu()[None]}


def worker(out: Path, names: list[str]) -> None:
    """The only process on the NPU."""
    world = start()
    for name in names:
        try:
            save_file(step(name, world), out / f"{name}.safetensors")
        except Exception as error:  # the other families' figures are wanted all the same
            (out / f"{name}.txt").write_text(repr(error))
    world.close()


@pytest.fixture(scope="module")
def on_npu(standin, request, tmp_path_factory):
    """Folder with what the NPU made of each family that a test asks for."""
    out = tmp_path_factory.mktemp("npu")
    names = [item.callspec.params["name"] for item in request.session.items if item.fspath == request.node.fspath]
    launch(__name__, 1, standin.environment() | {DEVICE_VARIABLE: "ascend"}, out=str(out), names=names)
    return out


@pytest.mark.cell(ASCEND)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_the_npu_is_that_of_the_cpu(on_npu, name):
    file = on_npu / f"{name}.safetensors"
    assert file.exists(), (on_npu / f"{name}.txt").read_text()
    there, here = load_file(file), step(name, World())
    assert there.keys() == here.keys()
    assert float(there["loss"]) == pytest.approx(float(here["loss"]), rel=1e-6)
    whole = torch.stack([g.norm() for g in here.values()]).norm()
    for part, gradient in here.items():
        assert (there[part] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * whole, part


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    worker(Path(arguments["out"]), arguments["names"])
