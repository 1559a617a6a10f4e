"""Checkpoints of machines that share no file system: found, brought together, or named as missing.

Two ranks pretend to be two machines: each has a folder, a host name and the local rank 0 of its own.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import CheckpointError
from configs.schema.optim import AdamWConfig
from configs.schema.outputs import Storage
from tests.distributed.forks import in_ranks
from tests.distributed.layouts import build, run_step, start
from train.checkpoint import transfer
from train.checkpoint.layout import SET_ASIDE, TrainerState, rank_file
from train.checkpoint.restore import restore_latest
from train.checkpoint.save import save
from train.engine.base import Engine, World
from train.run_folder import sha256_of

pytestmark = pytest.mark.distributed

OLD, NEW = "step-00000001", "step-00000003"


class Machines:
    """Both machines' part in each case; a case's folders are copies, so that it may break them."""

    def __init__(self, out: Path, world: World) -> None:
        self.out, self.world = out, replace(world, local_rank=0)
        self.engines = {name: build(name, AdamWConfig(), self.world, lora=False) for name in ("zero3", "plain")}
        self.told: dict[str, dict[str, object]] = {}
        for step in (1, 2, 3):
            run_step(self.engines["zero3"], step, 0.01)
            state = TrainerState(step, epoch=0, samples_seen=7, tokens_seen=9, seed=1)
            save(
                self.engines["zero3"],
                self.saved,
                state,
                self.world,
                storage=Storage.per_node,
                run_id="mine",
                metrics={},
            )
        self.expected = tensors(self.engines["zero3"])

    @property
    def saved(self) -> Path:
        return self.out / f"machine-{self.world.rank}" / "checkpoints"

    def case(
        self,
        name: str,
        engine: str = "zero3",
        *,
        machine: int | None = None,
        spoil: Callable[[Path], None] = lambda f: None,
    ) -> None:
        """Restores from a copy of one machine's folder after `spoil`; notes what came of it."""
        folder = self.out / name / f"machine-{self.world.rank}" / "checkpoints"
        shutil.copytree(self.out / f"machine-{self.world.rank if machine is None else machine}" / "checkpoints", folder)
        spoil(folder)
        notes: list[str] = []
        built = self.engines[engine]
        with torch.no_grad():
            for fragment in built.fragments(owned=False):
                for kind in fragment.kinds:
                    fragment.view(kind).normal_()
        before = tensors(built)
        told: dict[str, object] = {"notes": notes}
        try:
            state = restore_latest(
                built, folder, self.world, storage=Storage.per_node, run_id="mine", note=notes.append
            )
            told |= {"step": state.step, "loaded": self._as_saved(built)}
        except CheckpointError as error:
            told |= {"where": error.where, "found": error.found, "remedy": error.remedy}
            told["untouched"] = all(torch.equal(tensor, before[key]) for key, tensor in tensors(built).items())
        told["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        self.told[name] = told

    def _as_saved(self, built: Engine) -> bool:
        """Every value that zero3 saved from this rank lies where this engine has it, however it cuts the parameters."""
        own = {(name, kind): (offset, tensor) for (name, kind, offset), tensor in tensors(built).items()}
        for (name, kind, offset), saved in self.expected.items():
            at, tensor = own[name, kind]
            if not torch.equal(tensor[offset - at :][: len(saved)], saved):
                return False
        return True


def tensors(engine: Engine) -> dict[tuple[str, str, int], torch.Tensor]:
    return {(f.name, kind, f.offset): f.view(kind).clone() for f in engine.fragments(owned=False) for kind in f.kinds}


def both_machines(out: Path) -> None:
    world = start()
    socket.gethostname = lambda: f"host-{world.rank}"
    transfer.CHUNK_BYTES = 1000
    machines, rank = Machines(out, world), world.rank
    machines.case("same")
    machines.case("exchanged", machine=1 - rank)
    machines.case("whole", "plain")
    machines.case("blank", spoil=lambda f: empty(f) if rank == 1 else lend(machines, f))
    machines.case("lost", spoil=lambda f: empty(f) if rank == 1 else lend(machines, f, OLD))
    machines.case("flipped", spoil=lambda f: flip(f / NEW / rank_file(0)) if rank == 0 else None)
    machines.case(
        "arrives_flipped", machine=1 - rank, spoil=lambda f: flip(f / NEW / rank_file(1)) if rank == 0 else None
    )
    machines.case("cut", spoil=lambda f: cut(f / NEW / rank_file(1)) if rank == 1 else None)
    machines.case("half_renamed", spoil=lambda f: (f / NEW).rename(f / f"{NEW}.partial") if rank == 1 else None)
    machines.case("two_attempts", spoil=lambda f: other_index(f / NEW) if rank == 1 else None)
    machines.case("aside", spoil=lambda f: (f / NEW).rename(f / (NEW + SET_ASIDE)))
    (out / f"told-{rank}.json").write_text(json.dumps(machines.told))
    world.close()


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def lend(machines: Machines, folder: Path, *steps: str) -> None:
    """The first machine has the second's files, too."""
    for step in steps or (OLD, "step-00000002", NEW):
        source = machines.out / "machine-1" / "checkpoints" / step / rank_file(1)
        shutil.copy(source, folder / step)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def other_index(path: Path) -> None:
    """As another attempt might have left it: whole in itself."""
    content = (path / "index.json").read_bytes().replace(b'"tokens_seen": 9', b'"tokens_seen": 8')
    (path / "index.json").write_bytes(content)
    (path / "COMPLETE").write_text(sha256_of(path / "index.json"))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    out = tmp_path_factory.mktemp("machines")
    in_ranks(both_machines, 2, out, seconds=120)
    return [json.loads((out / f"told-{rank}.json").read_text()) for rank in (0, 1)]


def of_both(told, case):
    return [told[rank][case] for rank in (0, 1)]


def files_of(told, step):
    return [file.removeprefix(f"{step}/") for file in told["files"] if file.startswith(f"{step}/rank")]


def test_each_machine_keeps_and_reads_what_its_ranks_own(told):
    for rank, one in enumerate(of_both(told, "same")):
        assert one["step"] == 3 and one["loaded"]
        assert files_of(one, NEW) == [rank_file(rank)]
        assert not any("on their way" in note for note in one["notes"])
        assert f"{NEW}: of 2 files host-0 rank00000; host-1 rank00001" in one["notes"]


@pytest.mark.parametrize("case", ["exchanged", "whole", "blank"])
def test_pieces_travel_to_where_they_are_needed(told, case):
    for rank, one in enumerate(of_both(told, case)):
        assert one["step"] == 3 and one["loaded"], one
        assert rank_file(rank) in files_of(one, NEW)
        assert any("on their way" in note for note in one["notes"])
        assert not [file for file in one["files"] if file.endswith(transfer.INCOMING)]
    if case == "blank":  # no more than what it needs
        assert files_of(of_both(told, case)[1], NEW) == [rank_file(1)]


def test_a_piece_that_is_nowhere_is_named_with_the_host_that_wrote_it_and_a_whole_checkpoint_offered(told):
    for one in of_both(told, "lost"):
        assert one["where"].endswith(f"{NEW}/{rank_file(1)}") and one["untouched"]
        assert "is missing on all 2 machines; host host-1 wrote rank00001" in one["found"]
        assert f"{OLD} of the same run is complete" in one["remedy"] and "mv " in one["remedy"]


@pytest.mark.parametrize("case, culprit", [("flipped", rank_file(0)), ("arrives_flipped", rank_file(1))])
def test_a_damaged_piece_stops_every_rank(told, case, culprit):
    for one in of_both(told, case):
        assert one["where"].endswith(f"{NEW}/{culprit}") and one["untouched"]
        assert "does not match its SHA-256" in one["found"]
    assert files_of(of_both(told, "arrives_flipped")[1], NEW) == [rank_file(0)], "nothing damaged was taken over"


def test_a_file_that_was_cut_is_not_had(told):
    for one in of_both(told, "cut"):
        assert "bytes instead of" in one["found"] and "on host-1" in one["found"]


def test_a_save_cut_off_between_two_renames_is_ended(told):
    for one in of_both(told, "half_renamed"):
        assert one["step"] == 3 and one["loaded"]
        assert not [file for file in one["files"] if ".partial" in file]


def test_indices_of_two_attempts_under_one_name_are_refused(told):
    for one in of_both(told, "two_attempts"):
        assert "differs between host-0 and host-1" in one["found"] and one["untouched"]


def test_one_set_aside_no_longer_counts(told):
    assert [one["step"] for one in of_both(told, "aside")] == [2, 2]
