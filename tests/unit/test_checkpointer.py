"""Checkpoints behind the steps, in one process: what is saved when, what a full disk does, which ones stay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import train.checkpoint.checkpointer as checkpointer
import train.checkpoint.files as files
import train.checkpoint.host_memory as host_memory
import train.checkpoint.save as saving
import train.checkpoint.snapshot as snapshot
from configs.errors import NoRoomError, OutOfMemoryError, StorageError
from configs.schema.optim import AdamWConfig
from configs.schema.outputs import BestBy, CheckpointConfig, OnFullDisk, SaveMode, Storage
from tests.unit.checkpoint_kit import WORLD, MomentumConfig, NAdamConfig, all_tensors, engine, state, steps
from train.checkpoint.checkpointer import Checkpointer
from train.checkpoint.layout import CheckpointReader, rank_file
from train.checkpoint.restore import restore
from train.checkpoint.retention import Retention, latest, surplus
from train.checkpoint.room import RESERVE, expected_bytes, memory_holds
from train.checkpoint.save import save


def saver(built, folder: Path, *, notes: list[str] | None = None, **settings) -> Checkpointer:
    cfg = CheckpointConfig(**({"mode": SaveMode.asynchronous} | settings))
    note = (lambda text: None) if notes is None else notes.append
    return Checkpointer(built, folder, cfg, WORLD, storage=Storage.shared, run_id="r", note=note)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Gate:
    """Holds the writer before its first byte until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        write = saving.write_safetensors

        def held(*arguments: object) -> str:
            self.reached.set()
            assert self.opened.wait(30)
            return write(*arguments)

        monkeypatch.setattr(saving, "write_safetensors", held)


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_the_moment_of_the_save_though_the_steps_go_on(tmp_path, gate, monkeypatch, dtype):
    monkeypatch.setattr(snapshot, "CHUNK", 64)  # tensors lie across blocks
    built = engine(dtype=dtype, width=7)
    steps(built, 0, 2)
    behind = saver(built, tmp_path / "behind")
    then, moment = all_tensors(built), state(2)
    generator = torch.get_rng_state()
    behind.save(moment, {"loss": 1.5, "validation_loss": float("nan")})
    assert gate.reached.wait(30) and behind.finished() == [] and behind.fault() is None
    steps(built, 2, 3)
    moment.step, moment.extra["note"] = 5, "changed"
    torch.rand(3)
    assert names(tmp_path / "behind") == ["step-00000002.partial"]
    gate.opened.set()
    behind.wait()
    [path] = behind.finished()
    assert behind.finished() == []
    assert any(not torch.equal(tensor, then[key]) for key, tensor in all_tensors(built).items())
    with CheckpointReader(path) as reader:
        assert (reader.state, reader.run_id, reader.metrics) == (state(2), "r", {"loss": 1.5})
        assert torch.equal(reader.rng_states(0)["torch"], generator)
    other = engine(dtype=dtype, width=7, seed=9)
    restore(other, path, WORLD)
    assert all(torch.equal(tensor, then[key]) for key, tensor in all_tensors(other).items())
    # An asynchronous save and one that the steps wait for write the same bytes.
    restore(other, path, WORLD)
    direct = save(other, tmp_path / "direct", state(2), WORLD, run_id="r", metrics={"loss": 1.5})
    assert {f.name: f.read_bytes() for f in path.iterdir()} == {f.name: f.read_bytes() for f in direct.iterdir()}


def test_the_next_save_waits_for_the_one_under_way_and_uses_its_memory_again(tmp_path, gate):
    built = engine()
    steps(built, 0, 1)
    behind = saver(built, tmp_path, keep_last=0)
    behind.save(state(1), {})
    second = threading.Thread(target=behind.save, args=(state(2), {}))
    second.start()
    second.join(0.3)
    assert second.is_alive() and names(tmp_path) == ["step-00000001.partial"]
    held = behind._copy._blocks[0].data_ptr()
    gate.opened.set()
    second.join(30)
    behind.wait()
    assert [path.name for path in behind.finished()] == ["step-00000001", "step-00000002"]
    assert behind._copy._blocks[0].data_ptr() == held


def test_a_writers_fault_comes_up_at_the_next_step_and_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    built = engine()
    behind = saver(built, tmp_path, on_full_disk=OnFullDisk.go_on)  # which this is not
    behind.save(state(1), {})
    behind.wait()

    def broken(file) -> None:
        raise OSError(5, "Input/output error", file.name)

    monkeypatch.setattr(files, "sync", broken)
    behind.save(state(2), {})
    behind._writer.join()
    assert [path.name for path in behind.finished()] == ["step-00000001"]
    assert isinstance(behind.fault(), StorageError)
    with pytest.raises(StorageError, match=r"step-00000002\.partial/rank00000\.safetensors: cannot be written: Input/"):
        behind.wait()
    assert names(tmp_path) == ["step-00000001"]
    behind.wait()  # told once
    behind.close()


def test_a_bug_in_the_writer_is_a_fault_too(tmp_path, monkeypatch):
    behind = saver(engine(), tmp_path)
    monkeypatch.setattr(saving, "index_json", lambda *args, **kwargs: 1 / 0)
    behind.save(state(1), {})
    behind._writer.join()
    assert behind.fault() is not None
    with pytest.raises(ZeroDivisionError):
        behind.wait()
    assert names(tmp_path) == []


def test_closing_waits_a_little_and_leaves_nothing_under_its_final_name(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(checkpointer, "CLOSE_SECONDS", 0.1)
    behind = saver(engine(), tmp_path)
    behind.save(state(1), {})
    behind.close()
    assert names(tmp_path) == ["step-00000001.partial"]


# ---- where memory is short


def test_auto_waits_for_saves_where_memory_does_not_hold_the_copy_and_says_so_once(tmp_path, monkeypatch):
    built, notes = engine(), []
    behind = saver(built, tmp_path, notes=notes, mode=SaveMode.auto)
    monkeypatch.setattr(checkpointer, "available_bytes", lambda: 100)
    for step in (1, 2):
        behind.save(state(step), {})
        assert behind._writer is None and [path.name for path in behind.finished()] == [f"step-{step:08d}"]
    assert len(notes) == 1 and "memory does not hold" in notes[0]
    monkeypatch.setattr(checkpointer, "available_bytes", lambda: 10**9)
    behind.save(state(3), {})
    assert behind._writer is not None
    behind.wait()
    assert behind._copy.capacity > 0
    last = saver(built, tmp_path / "last", mode=SaveMode.auto, every=0)
    last.save(state(3), {})
    assert last._writer is None, "no step could go on behind the only save, which is at the end"


def test_a_copy_that_memory_does_not_hold_is_refused_before_the_kernel_kills(tmp_path, monkeypatch):
    behind = saver(engine(), tmp_path, mode=SaveMode.asynchronous)
    monkeypatch.setattr(checkpointer, "available_bytes", lambda: 100)
    with pytest.raises(OutOfMemoryError, match=r"checkpoint\.mode=asynchronous: free host memory does not hold"):
        behind.save(state(1), {})
    assert names(tmp_path) == []


def test_memory_is_that_of_all_ranks_of_a_machine():
    def ranks(*sizes: tuple[bool, int, int]) -> list[dict[str, object]]:
        return [{"leads_node": leads, "copy": copy, "memory": memory} for leads, copy, memory in sizes]

    assert memory_holds(ranks((True, 40, 100), (False, 40, 100)))
    assert not memory_holds(ranks((True, 40, 100), (False, 41, 100)))
    assert memory_holds(ranks((True, 80, 100), (True, 80, 100)))
    assert not memory_holds(ranks((True, 1, 100), (True, 80, 99)))


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container_is_what_its_limits_leave(tmp_path, monkeypatch, version):
    limit, used, cache = host_memory.LIMIT_FILES[2 - version]
    root = tmp_path / ("memory" if version == 1 else "")
    for group, bound in (("pod", "5000"), ("pod/box", "max" if version == 2 else str(2**62))):
        (root / group).mkdir(parents=True)
        (root / group / limit).write_text(bound)
        (root / group / used).write_text("3000\n")
        (root / group / "memory.stat").write_text(f"anon 7\n{cache} 500\n")
    listing = tmp_path / "cgroup"
    listing.write_text("9:memory:/pod/box\n3:cpu:/else\n" if version == 1 else "0::/pod/box\n")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    left = host_memory._left_by_limits(host_memory._groups(listing))
    assert min(left) == 2500
    assert host_memory._left_by_limits(host_memory._groups(tmp_path / "none")) == []
    assert 0 < host_memory.available_bytes() < 2**60


# ---- where the disk is full


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A real file system of 40 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        assert "CI" not in os.environ, f"CI must be able to mount: {done.stderr.decode()}"
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


WIDE = 60_000
"""A checkpoint of some 3.6 MiB."""


def leave_free(disk: Path, size: int) -> Path:
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - size)
    return ballast


def test_no_step_is_taken_where_the_next_checkpoint_would_not_fit(small_disk):
    built = engine(width=WIDE)
    expected = expected_bytes(built)
    behind = saver(built, small_disk / "checkpoints")
    behind.require_room()
    leave_free(small_disk, RESERVE + expected // 2)
    with pytest.raises(NoRoomError, match=r"next checkpoint needs 2.\.. MiB, and 1.\.. MiB are free"):
        behind.require_room()
    leave_free(small_disk, RESERVE + 2 * expected)
    behind.require_room()
    steps(built, 0, 1)
    path = save(built, small_disk / "checkpoints", state(1), WORLD)
    # Known before the optimizer had any state; generators are in the reserve.
    assert abs(expected - (path / rank_file(0)).stat().st_size) < RESERVE / 100


@pytest.mark.parametrize(("optim", "kept"), [(AdamWConfig(), 2), (MomentumConfig(), 1), (NAdamConfig(), 2)])
def test_state_of_any_optimizer_is_counted_before_its_first_step(optim, kept):
    assert expected_bytes(engine(optim, width=1000)) // (4 * 7001) == 1 + kept


@pytest.mark.parametrize("mode", [SaveMode.asynchronous, SaveMode.synchronous])
@pytest.mark.parametrize("policy", list(OnFullDisk))
def test_the_disk_fills_in_the_middle_of_a_save(small_disk, monkeypatch, mode, policy):
    folder, notes = small_disk / "checkpoints", []
    built = engine(width=WIDE)
    steps(built, 0, 1)
    behind = saver(built, folder, notes=notes, mode=mode, on_full_disk=policy, keep_last=0)
    behind.save(state(1), {})
    behind.wait()
    good = all_tensors(built)
    room = saving.require_room

    def then_somebody_fills_it(place: Path, needed: int) -> None:
        room(place, needed)
        leave_free(small_disk, needed // 2)

    monkeypatch.setattr(saving, "require_room", then_somebody_fills_it)
    steps(built, 1, 1)
    if policy is OnFullDisk.stop:
        with pytest.raises(NoRoomError, match=r"step-00000002\.partial: the disk is full: No space"):
            behind.save(state(2), {})
            behind.wait()
    else:
        behind.save(state(2), {})
        behind.wait()
        assert behind.fault() is None and len(notes) == 1 and "not saved, the run goes on" in notes[0]
        with pytest.raises(NoRoomError):
            behind.wait(last=True)  # nobody will try again
    assert names(folder) == ["step-00000001"], "the torn save has been taken away"
    other = engine(width=WIDE, seed=9)
    assert restore(other, latest(folder), WORLD) == state(1)
    assert all(torch.equal(tensor, good[key]) for key, tensor in all_tensors(other).items())
    (small_disk / "ballast").unlink()
    monkeypatch.setattr(saving, "require_room", room)
    behind.save(state(3), {})
    behind.wait(last=True)
    assert [path.name for path in behind.finished()] == ["step-00000001", "step-00000003"]


# ---- what stays


@pytest.mark.parametrize(
    ("settings", "newest", "gone"),
    [
        ({"keep_last": 2}, 60, {10, 20, 30, 40}),
        ({"keep_last": 0}, 60, set()),
        ({"keep_last": 1, "keep_every": 20}, 60, {10, 30, 50}),
        ({"keep_last": 1, "keep_best": 2}, 60, {10, 30, 50}),
        ({"keep_last": 2, "keep_best": 1, "keep_every": 30}, 60, {10, 40}),
        ({"keep_last": 2}, 30, {10, 40, 50, 60}),
        ({"keep_last": 0}, 50, {60}),
        ({"keep_last": 9}, 60, set()),
    ],
)
def test_which_checkpoints_go(settings, newest, gone):
    figures = {10: 0.9, 20: 0.1, 30: None, 40: 0.2, 50: float("nan"), 60: 0.8}
    assert surplus(figures, newest, CheckpointConfig(**settings)) == gone


def test_the_best_stay_through_a_resume_and_damage(tmp_path):
    built = engine()
    losses = {1: 0.5, 2: 0.1, 3: 0.2, 4: 0.9}
    for step, loss in losses.items():
        save(built, tmp_path, state(step), WORLD, metrics={"loss": loss})
    (tmp_path / "step-00000003" / "index.json").write_text("{")
    damaged = tmp_path / "step-00000004" / "index.json"
    damaged.write_text(damaged.read_text().replace("0.9}", f"{10**400}}}"))
    retention = Retention(tmp_path, CheckpointConfig(keep_last=1, keep_best=1, best_by=BestBy.loss))
    newest = save(built, tmp_path, state(5), WORLD, metrics={"loss": 0.7})
    gone = retention.after(newest, {"loss": 0.7})
    assert [path.name for path in gone] == ["step-00000001", "step-00000003", "step-00000004"]
    assert names(tmp_path) == ["step-00000002", "step-00000005"]
    shutil.rmtree(tmp_path / "step-00000002")  # by the user
    newest = save(built, tmp_path, state(6), WORLD)
    assert [path.name for path in retention.after(newest, {})] == []
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_a_run_that_went_back_does_not_find_its_former_future(tmp_path):
    built, notes = engine(), []
    for step in (1, 2, 3):
        save(built, tmp_path, state(step), WORLD)
    behind = saver(built, tmp_path, notes=notes, keep_last=0)
    behind.save(state(2), {})
    behind.wait()
    assert latest(tmp_path).name == "step-00000002" and "step-00000003" in notes[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003.set-aside"], "keep_last=0 keeps all"


def test_what_a_kill_in_a_removal_leaves_is_no_checkpoint_and_goes_at_the_next_start(tmp_path, monkeypatch):
    built = engine()
    for step in (1, 2):
        save(built, tmp_path, state(step), WORLD)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda *args, **kwargs: sys.exit("killed"))
        with pytest.raises(SystemExit):
            files.discard(tmp_path / "step-00000001")
    assert latest(tmp_path).name == "step-00000002" and len(names(tmp_path)) == 2
    (tmp_path / "step-00000003.partial").mkdir()
    saver(built, tmp_path).require_room()
    assert names(tmp_path) == ["step-00000002"]
