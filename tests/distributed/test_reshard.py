"""What the reshard matrix leaves out: fused experts, and how much memory a load takes."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn

from configs.schema.optim import AdamWConfig
from tests.distributed.forks import Ranks, in_ranks
from tests.distributed.layouts import DEVICE, ENGINES, MORE_ENGINES, start
from tests.distributed.test_resume_matrix import WHOLE, plan_of, run_matrix
from train.checkpoint.index import TrainerState
from train.checkpoint.restore import restore
from train.checkpoint.save import save
from train.engine.base import Engine, World
from train.engine.plain import PlainEngine
from train.engine.zero import ZeroEngine

pytestmark = pytest.mark.distributed

SLOW = pytest.mark.slow
MIB = 2**20
M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt."""
ROWS = 2**21
"""Elements of each parameter of `Wide`: 8 MiB in fp32."""
PARAMETERS = 12


def test_experts_in_one_parameter_move_between_engines(tmp_path):
    """[experts, rows, columns] are cut anywhere, and the router sends some experts nothing."""
    run_matrix(tmp_path, [plan_of("full", experts=4, x1=["plain"], x2=["zero2", "zero3"])])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_experts_move_between_all_engines(tmp_path):
    names = [*ENGINES, *MORE_ENGINES]
    run_matrix(tmp_path, [plan_of("full", experts=4, x1=names, x2=names, x4=names) | WHOLE])


class Wide(nn.Module):
    """Parameters of equal size, so that what a load takes besides is told in parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(ROWS)) for _ in range(PARAMETERS))

    def forward(self) -> torch.Tensor:
        return torch.stack([weight[::1024].sum() for weight in self.weights]).sum()


def wide(name: str, world: World) -> Engine:
    config = (ENGINES | MORE_ENGINES)[name]
    kind = PlainEngine if name == "plain" else ZeroEngine
    optim = AdamWConfig(lr=1e-3)
    return kind(config, Wide(), optim=optim, device=DEVICE, world=world, working_dtype=torch.float32)


def save_wide(folder: Path) -> None:
    """A checkpoint with moments: three times the parameters."""
    world = start()
    engine = wide("plain", world)
    engine.backward(engine.forward(), last=True)
    engine.step(1e-3)
    save(engine, folder, TrainerState(1, 0, 0, 0, 0), world)
    world.close()


def load_wide(folder: Path, name: str, loading: Path) -> None:
    """Loads twice: the second time all that the engine holds is there, so that what grows is the load's own."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed goes back, and is seen when it is taken again
    world = start()
    engine = wide(name, world)
    path = folder / "step-00000001"
    restore(engine, path, world)
    world.barrier()
    (loading / f"{world.rank}-before").write_text(str(anonymous(psutil.Process().pid)))
    restore(engine, path, world)
    (loading / f"{world.rank}-after").touch()
    world.close()


def anonymous(pid: int) -> int:
    """Resident bytes of a process that are not pages of files."""
    memory = psutil.Process(pid).memory_info()
    return int(memory.rss - memory.shared)


GATHERED = {"plain": 0, "zero2": PARAMETERS, "zero3": 0, "zero3_offload": 0}
"""Parameters that DeepSpeed gathers at once to refresh the working weights, after a load as after each step."""


@pytest.mark.parametrize("name", ["zero2", "zero3", *(pytest.param(n, marks=SLOW) for n in ("plain", "zero3_offload"))])
def test_a_load_takes_the_memory_of_a_parameter(tmp_path, name):
    """Of 12 equal parameters with two moments each (288 MiB): at most 3 parameters' worth (24 MiB) at a time."""
    in_ranks(save_wide, 1, tmp_path)
    loading = tmp_path / "loading"
    loading.mkdir()
    ranks = Ranks(load_wide, 2, tmp_path, name, loading, logs=loading, environment={})
    highest = {pid: 0 for pid in ranks.pids}
    order = list(highest)
    while any(ranks.pids) and not all((loading / f"{rank}-after").exists() for rank in range(2)):
        for rank, pid in enumerate(order):
            if (loading / f"{rank}-before").exists():
                highest[pid] = max(highest[pid], anonymous(pid))
        time.sleep(0.001)
    codes = ranks.wait(60)
    ranks.kill()
    assert codes == [0, 0], ranks.output()
    extra = [highest[pid] - int((loading / f"{rank}-before").read_text()) for rank, pid in enumerate(order)]
    print(f"{name}: {[round(value / MIB, 1) for value in extra]} MiB besides, of {PARAMETERS * 3 * 8} MiB loaded")
    assert max(extra) <= (3 + GATHERED[name]) * ROWS * 4, extra
