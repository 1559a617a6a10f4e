"""A run survives SIGKILL at any moment, bit by bit: at random ones, and before every single operation on its folder."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
import torch

from configs.schema.optim import AdamWConfig
from configs.schema.outputs import CheckpointConfig, SaveMode, Storage
from tests.distributed.forks import Ranks
from tests.distributed.killing import Aim, Struck, Victim, plan_kills, uninterrupted
from tests.distributed.layouts import build, run_step, start
from tests.distributed.tiny_training import Home, Setting, must_be_the_same
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.index import TrainerState
from train.checkpoint.layout import CheckpointReader, checkpoints
from train.checkpoint.restore import restore

pytestmark = pytest.mark.distributed

SEED = 5
ASYNCHRONOUS, SYNCHRONOUS = ("checkpoint.mode=asynchronous",), ("checkpoint.mode=synchronous",)
SHORT = [
    Setting("zero3", "lora", 2, ASYNCHRONOUS),
    Setting("zero1", "full", 2, SYNCHRONOUS),
    Setting("plain", "lora", 1, ASYNCHRONOUS),
]
WHOLE = [
    Setting(sharding, tuning, ranks, (ASYNCHRONOUS, SYNCHRONOUS)[i % 3 == 2])
    for i, (sharding, tuning, ranks) in enumerate(
        product(["plain", "zero1", "zero2", "zero3"], ["lora", "full"], [1, 2])
    )
]


def kill_and_compare(folder: Path, settings: Sequence[Setting], count: int) -> list[Struck]:
    """Kills each setting's run three times, in turn until there are `count` kills and each was hit; each run must end
    the same. (A run may end before it is hit.)"""
    rng = random.Random(SEED)
    home, struck = Home.make(folder), []
    for i, setting in enumerate(settings):
        reference = folder / f"{i}-{setting}-uninterrupted"
        victim = Victim(setting, home, folder / f"{i}-{setting}-killed", uninterrupted(setting, home, reference))
        for kill in plan_kills(rng, [Aim.start if i % 2 else Aim.anywhere, Aim.save, Aim.save], setting.ranks):
            if blow := victim.strike(kill):
                print(blow, flush=True)
                struck.append(blow)
        victim.finish()
        must_be_the_same(reference, victim.run_dir)
        if len(struck) >= count and {blow.setting for blow in struck} == set(map(str, settings)):
            break
    return struck


def inside_a_save(struck: Sequence[Struck]) -> int:
    return sum(blow.kill.aim is Aim.save and bool(blow.torn) for blow in struck)


def test_a_killed_run_ends_as_if_nothing_had_been(tmp_path):
    struck = kill_and_compare(tmp_path, SHORT, count=8)
    assert len(struck) >= 7 and inside_a_save(struck) >= 4, "\n".join(map(str, struck))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fifty_kills(tmp_path):
    """Over every engine, tuning and number of ranks; two of three kills are aimed inside a save."""
    struck = kill_and_compare(tmp_path, [*WHOLE, *WHOLE], count=50)
    print(f"{len(struck)} kills, {inside_a_save(struck)} of them inside a save")
    assert {blow.setting for blow in struck} == set(map(str, WHOLE))
    assert len(struck) >= 50 and inside_a_save(struck) >= 25, "\n".join(map(str, struck))


FOLDER_AT = {"open": 1, "os.mkdir": 2, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}
"""Python's audit events of operations on files, and which argument may be an open folder; of `open` it is the mode."""


def save_until(folder: Path, mode: SaveMode, last: int, die_at: int) -> None:
    """Goes on from the newest checkpoint, a save after each step; is killed before its n-th operation on files."""
    world = start()
    engine = build("plain", AdamWConfig(lr=5e-3), world, lora=True)
    found = checkpoints(folder)
    state = restore(engine, found[-1], world) if found else TrainerState(0, 0, 0, 0, 0)
    die_before(folder, die_at)
    cfg = CheckpointConfig(keep_last=1, mode=mode)
    checkpointer = Checkpointer(engine, folder, cfg, world, storage=Storage.shared, run_id="small", note=print)
    while state.step < last:
        run_step(engine, state.step, 5e-3)
        state.step += 1
        checkpointer.save(state, {})
        checkpointer.wait()
    checkpointer.close()


def die_before(folder: Path, count: int) -> None:
    """Kills this process before its n-th opening, making, renaming or removing of something in `folder`; 0: never."""
    left = [count]

    def hook(event: str, arguments: tuple) -> None:
        if event in FOLDER_AT and str(folder) in (path := whole_path(arguments[0], arguments[FOLDER_AT[event]])):
            left[0] -= 1
            if left[0] == 0:
                print(event, path, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def whole_path(path: object, folder: object) -> str:
    """`path` below the open folder that `folder` is the number of, if it is one: `rmtree` goes by such numbers."""
    inside = isinstance(folder, int) and folder >= 0
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), str(path)) if inside else str(path)


def attempt(logs: Path, folder: Path, mode: SaveMode, last: int, die_at: int = 0) -> str | None:
    """The operation before which the attempt died; None if it came to its end."""
    logs.mkdir()
    ranks = Ranks(save_until, 1, folder, mode, last, die_at, logs=logs, environment={})
    codes = ranks.wait(60)
    ranks.kill()
    told = ranks.output()
    assert codes in ([0], [-signal.SIGKILL]), f"{codes}\n{told}"
    return told.splitlines()[-1] if codes != [0] else None


def contents(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    with CheckpointReader(path) as reader:
        return {(name, kind): reader.read(name, kind) for name in reader.params for kind in reader.params[name].kinds}


def must_hold(folder: Path, steps: Sequence[int], expected: dict[int, dict], where: str) -> None:
    """The newest checkpoint is of one of `steps`, whole, and holds what the run had then."""
    newest = checkpoints(folder)[-1]
    step = CheckpointReader(newest, verify=False).state.step
    assert step in steps, f"{where}: the newest checkpoint is of step {step}"
    found = contents(newest)
    odd = [key for key in expected[step] if not torch.equal(found.get(key, torch.zeros(0)), expected[step][key])]
    assert not odd and len(found) == len(expected[step]), f"{where}: {odd[:4]}"


@pytest.mark.parametrize("mode", [SaveMode.asynchronous, pytest.param(SaveMode.synchronous, marks=pytest.mark.slow)])
def test_killed_before_each_operation_on_files(tmp_path, mode):
    """Through a save and the removal of the one before it: the newest checkpoint is whole, and the next save clears."""
    expected = {}
    for step in (1, 2, 3):
        attempt(tmp_path / f"begin-{step}", tmp_path / f"until-{step}", SaveMode.synchronous, step)
        expected[step] = contents(checkpoints(tmp_path / f"until-{step}")[-1])
    operations: list[str] = []
    seen: set[tuple[str, ...]] = set()  # what kills leave behind; going on from it is tried once
    for die_at in range(1, 200):
        folder = shutil.copytree(tmp_path / "until-1", tmp_path / f"{die_at}")
        died = attempt(tmp_path / f"logs-{die_at}-killed", folder, mode, 2, die_at)
        if died is None:
            break
        operations.append(died.replace(str(folder), ""))
        must_hold(folder, [1, 2], expected, operations[-1])
        left = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*")))
        if left in seen:
            continue
        seen.add(left)
        assert attempt(tmp_path / f"logs-{die_at}-again", folder, mode, 3) is None
        must_hold(folder, [3], expected, operations[-1])
        assert [path.name for path in folder.iterdir()] == ["step-00000003"], f"left over after {operations[-1]}"
    kinds = {operation.split()[0] for operation in operations}
    assert kinds == set(FOLDER_AT), operations
