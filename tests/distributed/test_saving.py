"""Saving over two ranks: one rank's fault is everybody's, and each machine may have a disk of its own.

One start of the ranks serves all cases. Ranks take each other for machines where LOCAL_RANK is 0 on both.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import train.checkpoint.checkpointer as checkpointer
import train.checkpoint.files as files
import train.checkpoint.save as saving
import train.checkpoint.storage as storage
from configs.errors import ConfigError, CrosstuneError, NoRoomError, StorageError
from configs.schema.optim import AdamWConfig
from configs.schema.outputs import CheckpointConfig, OnFullDisk, SaveMode, Storage
from tests.distributed.forks import in_ranks
from tests.distributed.layouts import build, run_step, start
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import TrainerState, checkpoints
from train.checkpoint.restore import restore
from train.checkpoint.retention import latest
from train.engine.base import Engine, World

pytestmark = pytest.mark.distributed


def state(step: int) -> TrainerState:
    return TrainerState(step, epoch=0, samples_seen=7 * step, tokens_seen=99, seed=3)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def raised(work: Callable[[], object], kind: type[CrosstuneError]) -> CrosstuneError:
    with pytest.raises(kind) as caught:
        work()
    return caught.value


class Case:
    """An engine that has stepped, a folder for each case, and which of two machines this rank is."""

    def __init__(self, engine: Engine, world: World, home: Path) -> None:
        self.engine, self.world, self.home = engine, world, home
        self.other = 1 - world.rank

    def saver(self, folder: Path, *, own_disk: bool = False, **settings) -> Checkpointer:
        world = replace(self.world, local_rank=0) if own_disk else self.world
        cfg = CheckpointConfig(**({"mode": SaveMode.asynchronous, "keep_last": 0} | settings))
        kind = Storage.per_node if own_disk else Storage.shared
        made = Checkpointer(self.engine, folder, cfg, world, storage=kind, run_id="r", note=lambda text: None)
        made.save(state(1), {})
        made.wait()
        return made


def a_full_disk_of_one_rank_ends_the_save_on_all(case: Case, folder: Path, patch: pytest.MonkeyPatch) -> None:
    behind = case.saver(folder)
    sync = files.sync

    def full(file) -> None:
        if case.world.rank == 1 and file.name.endswith(".safetensors"):
            time.sleep(0.5)  # the other rank has long written its own
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with patch.context() as fault:
        fault.setattr(files, "sync", full)
        behind.save(state(2), {})
        error = raised(behind.wait, NoRoomError)
        assert "the disk is full" in error.found and ("(rank 1 on " in error.found) == (case.world.rank == 0)
        assert names(folder) == ["step-00000001"]
        behind.cfg.on_full_disk = OnFullDisk.go_on
        behind.save(state(2), {})
        behind.wait()
    behind.save(state(3), {})
    behind.wait(last=True)
    case.world.barrier()
    assert names(folder) == ["step-00000001", "step-00000003"]


def each_machine_keeps_its_own_pieces_beside_the_same_index(case: Case, home: Path, patch: pytest.MonkeyPatch) -> None:
    folder = home / f"disk{case.world.rank}"
    case.saver(folder, own_disk=True)
    case.world.barrier()
    path = folder / "step-00000001"
    assert names(path) == ["COMPLETE", "index.json", f"rank0000{case.world.rank}.safetensors"]
    index = (path / "index.json").read_bytes()
    assert index == (home / f"disk{case.other}" / path.name / "index.json").read_bytes()
    files = json.loads(index)["files"]
    assert [files[name]["node"] for name in sorted(files)] == [0, 1] and all(facts["host"] for facts in files.values())
    # Brought together, the pieces are a checkpoint as any.
    case.world.barrier()  # both have looked at theirs
    if case.world.rank == 0:
        (home / "disk1" / path.name / "rank00001.safetensors").rename(path / "rank00001.safetensors")
    case.world.barrier()
    assert restore(case.engine, home / "disk0" / path.name, case.world) == state(1)


def no_machine_has_a_newer_checkpoint_than_another(case: Case, home: Path, patch: pytest.MonkeyPatch) -> None:
    folder = home / f"disk{case.world.rank}"
    behind = case.saver(folder, own_disk=True)

    def broken(partial: Path, final: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(final))

    with patch.context() as fault:
        if case.world.rank == 1:
            fault.setattr(saving, "_rename", broken)
        behind.save(state(2), {})
        raised(behind.wait, StorageError)
    assert names(folder) == ["step-00000001"], "rank 0 had renamed its folder already"


def a_full_disk_of_one_machine_stops_all_before_the_first_step(
    case: Case, home: Path, patch: pytest.MonkeyPatch
) -> None:
    behind = case.saver(home / f"disk{case.world.rank}", own_disk=True)
    with patch.context() as fault:
        if case.world.rank == 1:
            fault.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        error = raised(behind.require_room, NoRoomError)
    assert "disk1" in error.where and "0.0 MiB are free" in error.found
    behind.require_room()


def machines_that_see_one_folder_do_not_clear_each_others_work(
    case: Case, folder: Path, patch: pytest.MonkeyPatch
) -> None:
    behind = case.saver(folder, own_disk=True)
    assert behind._site.owner == 0
    case.world.barrier()
    assert names(folder) == ["step-00000001"]
    assert restore(case.engine, latest(folder), case.world) == state(1)
    behind.save(state(2), {})
    behind.wait()

    def listed(folder: Path) -> list[Path]:
        found = checkpoints(folder)
        time.sleep(0.5)  # whoever else lists them sees them too
        return found

    patch.setattr(checkpointer, "checkpoints", listed)
    behind.discard_after(1)
    case.world.barrier()
    assert names(folder) == ["step-00000001"]


def storage_is_found_out(case: Case, home: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage, "LOOK_SECONDS", 0.5)
    notes: list[str] = []
    apart, world = home / f"disk{case.world.rank}", replace(case.world, local_rank=0)
    assert storage.resolve_storage(Storage.auto, home / "one", case.world, notes.append) is Storage.shared
    assert notes == []
    assert storage.resolve_storage(Storage.auto, apart, world, notes.append) is Storage.per_node
    assert "rank 1 on " in notes[0]
    error = raised(lambda: storage.resolve_storage(Storage.shared, apart, world, notes.append), ConfigError)
    assert "disk0" in error.found or "disk1" in error.found
    raised(lambda: storage.resolve_storage(Storage.auto, apart, case.world, notes.append), StorageError)
    case.world.barrier()
    assert names(apart) == names(home / "one") == []
    if case.world.rank == 1:
        (home / "file").write_text("")
    case.world.barrier()
    odd = home / ("file" if case.world.rank == 1 else "fine") / "checkpoints"
    raised(lambda: storage.resolve_storage(Storage.auto, odd, case.world, notes.append), StorageError)


def a_rank_ends_though_the_other_never_writes(case: Case, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """The last case: no collective of the background group works after it."""
    patch.setattr(checkpointer, "CLOSE_SECONDS", 0.5)
    behind = case.saver(folder)
    if case.world.rank == 1:
        patch.setattr(saving, "_write_share", lambda *args: time.sleep(600))
    behind.save(state(2), {})
    began = time.monotonic()
    behind.close()
    assert time.monotonic() - began < 5
    assert names(folder) == ["step-00000001", "step-00000002.partial"]


CASES = (
    a_full_disk_of_one_rank_ends_the_save_on_all,
    each_machine_keeps_its_own_pieces_beside_the_same_index,
    no_machine_has_a_newer_checkpoint_than_another,
    a_full_disk_of_one_machine_stops_all_before_the_first_step,
    machines_that_see_one_folder_do_not_clear_each_others_work,
    storage_is_found_out,
    a_rank_ends_though_the_other_never_writes,
)


def work(home: str) -> None:
    world = start()
    engine = build("plain", AdamWConfig(), world, lora=True)
    run_step(engine, 0, 0.01)
    for each in CASES:
        print(each.__name__, flush=True)
        folder = Path(home) / each.__name__
        with pytest.MonkeyPatch.context() as patch:
            each(Case(engine, world, folder), folder, patch)
        world.barrier()
        print(f"passed: {each.__name__}", flush=True)
    world.close()


def test_saving_over_two_ranks(tmp_path):
    in_ranks(work, 2, str(tmp_path), seconds=400)
