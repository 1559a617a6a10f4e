"""Guards of a run: steps that are not finite, loss spikes, ranks that disagree, and what readers make of such runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from configs.errors import CheckpointError, RunFailedError
from configs.schema.roots import TrainConfig
from tests.command import final_weights, metrics_of
from tests.distributed.forks import in_ranks
from tests.tiny import samples_of, save_tiny_model, write_prepared
from tests.unit.tiny_run import LENGTHS
from train.checkpoint.layout import CheckpointReader, TrainerState, step_folder
from train.data.sampler import StepSampler
from train.devices.cpu import CpuDevice
from train.engine.base import init_world
from train.guard.agreement import must_agree
from train.guard.nonfinite import NonFinite
from train.guard.rollback import Rollback
from train.guard.spikes import SpikeDetector
from train.objectives.causal_lm import CausalLM
from train.observe.report import write_report
from train.run import train
from train.run_folder import RunFolder


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    write_prepared(home / "data", {"train": samples_of(LENGTHS, vocab_size=290)})
    return home


def config(home: Path, *overrides: str) -> TrainConfig:
    paths = [f"model.path={home / 'model'}", f"dataset.path={home / 'data'}", "device=cpu", "model.precision=fp32"]
    sizes = ["max_steps=4", "batch_tokens=120", "micro_batch_tokens=50", "max_length=50", "optim.lr=0.01"]
    return compose("train", [*paths, *sizes, "device.threads=1", "checkpoint.mode=synchronous", *overrides])


def run(home: Path, folder: Path, *overrides: str, resume: bool = False) -> RunFolder:
    folder.mkdir(exist_ok=True)
    cfg = config(home, *overrides)
    train(cfg, model_dir=home / "model", prepared=home / "data", run_dir=folder, resume=resume)
    return RunFolder(folder)


def poison(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Puts `by` around the loss of this rank's first micro-batch with samples of each of the steps (from 1)."""
    todo: list[int] = []
    step, loss_sum = StepSampler.step, CausalLM.loss_sum

    def watched_step(self, number):
        todo[:] = [number + 1]
        return step(self, number)

    def poisoned(self, forward, batch):
        loss = loss_sum(self, forward, batch)
        if todo and todo[0] in steps and batch.num_targets:
            todo.clear()
            return by(loss)
        return loss

    monkeypatch.setattr(StepSampler, "step", watched_step)
    monkeypatch.setattr(CausalLM, "loss_sum", poisoned)


def infinite(loss: torch.Tensor) -> torch.Tensor:
    """Not finite, though its gradient is: the norm alone would not tell."""
    return loss + math.inf


def in_spirit(lines: list[dict]) -> list[dict]:
    """What of metrics.jsonl must be the same in two runs."""
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_gib")} for line in lines]


# --- not finite


def rank_with_a_bad_sample(home: str, folder: str, sharding: str) -> None:
    """One of two ranks, of which rank 1 alone meets a loss that is not finite, at steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            poison(patch, (2, 4), infinite)
        given = (f"sharding={sharding}", "nproc=2", "checkpoint.every=1", "checkpoint.keep_last=0")
        with pytest.raises(RunFailedError) as raised:
            run(Path(home), Path(folder), *given, "guard.nonfinite_limit=2")
    shown = str(raised.value)
    assert "step 4: loss inf, not finite, for the 2. time: samples sample:" in shown and "(rank 1 on " in shown, shown
    assert f"token ids in {folder}/nonfinite/step-00000004.json" in shown


@pytest.mark.distributed
@pytest.mark.parametrize(
    "sharding", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zero2", "zero3"))]
)
def test_a_loss_that_is_not_finite_on_one_rank_changes_no_weight_on_any(home, tmp_path, sharding):
    in_ranks(rank_with_a_bad_sample, 2, str(home), str(tmp_path / "run"), sharding, seconds=120)
    folder = RunFolder(tmp_path / "run")
    readers = [CheckpointReader(step_folder(folder.checkpoints, step)) for step in (1, 2, 3)]
    before, skipped, after = ({(n, k): r.read(n, k) for n in r.params for k in r.params[n].kinds} for r in readers)
    assert before.keys() == skipped.keys() and all(torch.equal(before[key], skipped[key]) for key in before)
    assert any(not torch.equal(skipped[key], after[key]) for key in skipped)
    lines = [(line["loss"] is None, line["grad_norm"] is None, line.get("skipped")) for line in metrics_of(folder.path)]
    assert lines == [(False, False, None), (True, True, "nonfinite"), (False, False, None)]

    kept = json.loads((folder.path / "nonfinite/step-00000002.json").read_text())
    assert [rank["rank"] for rank in kept["ranks"]] == [1] and kept["loss"] == "inf"
    (batch,) = kept["ranks"][0]["micro_batches"]
    own = {s.id: s.input_ids.tolist() for s in samples_of(LENGTHS, vocab_size=290)}
    assert batch["loss"] == "inf" and all(own[s["id"]] == s["input_ids"] for s in batch["samples"])


def test_the_count_goes_on_after_a_resume_and_a_gradient_alone_is_enough(home, tmp_path, monkeypatch):
    def bad_gradient(loss: torch.Tensor) -> torch.Tensor:
        return loss + torch.sqrt(loss - loss.detach())  # adds 0; its gradient is infinite

    poison(monkeypatch, (2, 4), bad_gradient)
    folder = run(home, tmp_path / "run", "max_steps=3", "guard.nonfinite_limit=2")
    assert [line.get("skipped") for line in metrics_of(folder.path)] == [None, "nonfinite", None]
    assert metrics_of(folder.path)[1]["loss"] > 0 and metrics_of(folder.path)[1]["grad_norm"] is None
    with pytest.raises(RunFailedError, match="step 4: gradient norm .*for the 2. time") as ended:
        run(home, tmp_path / "run", "max_steps=5", "guard.nonfinite_limit=2", resume=True)
    assert "guard.nonfinite_limit=N, also added to a resume" in str(ended.value.remedy), "it would end there again"


def test_a_batch_that_cannot_be_kept_ends_no_run_and_says_so(home, tmp_path, monkeypatch, capfd):
    poison(monkeypatch, (2,), infinite)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/nonfinite").write_text("in the way")
    run(home, tmp_path / "run")
    assert "step 2 skipped, loss inf (1 of guard.nonfinite_limit=3)" in (shown := capfd.readouterr().err)
    assert "cannot be written" in shown


# --- spikes


def test_what_counts_as_a_spike():
    state, detector = TrainerState(0, 0, 0, 0, 0), SpikeDetector(6.0, 8)
    assert detector.spike(state, 2.0) is None
    assert detector.spike(state, 90.0) is None, "too few to compare with"
    for loss in (2.1, 1.9, 2.0, 2.2, 1.8, 2.1, 1.9, 2.0):
        assert detector.spike(state, loss) is None
    assert state.extra["losses"] == [2.1, 1.9, 2.0, 2.2, 1.8, 2.1, 1.9, 2.0]
    # Median 2.0, median deviation 0.1: a robust standard deviation is 0.14826.
    assert detector.spike(state, 2.0 + 5.9 * 0.14826) is None
    state.extra["losses"] = [2.1, 1.9, 2.0, 2.2, 1.8, 2.1, 1.9, 2.0]
    found = detector.spike(state, 2.0 + 6.1 * 0.14826)
    assert found is not None and found.zscore == pytest.approx(6.1) and found.median == 2.0
    assert len(state.extra["losses"]) == 8 and max(state.extra["losses"]) == 2.2, "a spike is not remembered"
    assert detector.spike(state, -50.0) is None, "only upwards"
    state.extra["losses"] = [2.0] * 8
    assert detector.spike(state, 2.1) is None, "five percent up, after losses that hardly differ"
    assert SpikeDetector(0, 8).spike(unwatched := TrainerState(0, 0, 0, 0, 0), 1e9) is None and not unwatched.extra


SPIKY = (
    *("max_steps=10", "guard.spike_zscore=20", "guard.spike_window=8", "checkpoint.every=2", "tuning.dropout=0.1"),
    "optim.lr=1e-4",
)


def spiked(loss: torch.Tensor) -> torch.Tensor:
    return loss * 50


@pytest.fixture(scope="module")
def without_those_steps(home, tmp_path_factory) -> RunFolder:
    """The run whose data of steps 6 and 7 were never there."""
    folder = tmp_path_factory.mktemp("never")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollback, "skipped", {6, 7})
        return run(home, folder, *SPIKY)


def same_run(a: RunFolder, b: RunFolder) -> None:
    assert in_spirit(metrics_of(a.path)) == in_spirit(metrics_of(b.path))
    one, other = final_weights(a.path), final_weights(b.path)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_after_a_spike_the_run_is_as_if_those_data_had_not_been_there(home, tmp_path, monkeypatch, without_those_steps):
    poison(monkeypatch, (7,), spiked)
    folder = run(home, tmp_path / "run", *SPIKY)
    same_run(folder, without_those_steps)
    lines = metrics_of(folder.path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["step"] for line in lines if line.get("skipped") == "spike" and line["loss"] is None] == [6, 7]
    ledger = json.loads((folder.path / "guard.json").read_text())
    (rollback,) = ledger["rollbacks"]
    assert ledger["skipped_steps"] == [6, 7] and ledger["pending"] is None
    # Not to the checkpoint of step 6, which has learned from step 6.
    assert rollback["to_step"] == 4 and rollback["zscore"] > 20 and rollback["step"] == 7


def two_ranks(home: str, folder: str, sharding: str, skipped: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if skipped:
            patch.setattr(Rollback, "skipped", set(skipped))
        else:
            poison(patch, (6,), spiked)
        run(Path(home), Path(folder), *SPIKY, "nproc=2", f"sharding={sharding}", "checkpoint.every=0")


def test_a_run_resumed_at_its_beginning_leaves_its_only_checkpoint_alone(home, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, (1,), lambda loss: (_ for _ in ()).throw(InterruptedError("killed")))
        with pytest.raises(InterruptedError):
            run(home, tmp_path / "run", *SPIKY, "max_steps=1")
    seal = step_folder(tmp_path / "run/checkpoints", 0) / "COMPLETE"
    before = seal.stat().st_ino
    run(home, tmp_path / "run", *SPIKY, "max_steps=1", resume=True)
    assert seal.stat().st_ino == before


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("sharding", ["plain", "zero2", "zero3", "zero3_offload"])
def test_two_ranks_go_back_to_the_very_beginning(home, tmp_path, sharding):
    in_ranks(two_ranks, 2, str(home), str(tmp_path / "run"), sharding, [], seconds=200)
    in_ranks(two_ranks, 2, str(home), str(tmp_path / "never"), sharding, [5, 6], seconds=200)
    same_run(RunFolder(tmp_path / "run"), RunFolder(tmp_path / "never"))
    assert json.loads((tmp_path / "run/guard.json").read_text())["rollbacks"][0]["to_step"] == 0


@pytest.mark.parametrize("cut", ["before the way back", "half way back"])
def test_a_crash_on_the_way_back_forgets_nothing(home, tmp_path, monkeypatch, without_those_steps, cut):
    poison(monkeypatch, (7,), spiked)
    crash = (Rollback, "go") if cut == "before the way back" else ("train.guard.rollback.restore_latest",)
    with monkeypatch.context() as patch:
        patch.setattr(*crash, lambda *args, **kwargs: (_ for _ in ()).throw(InterruptedError("killed")))
        with pytest.raises(InterruptedError):
            run(home, tmp_path / "run", *SPIKY)
    same_run(run(home, tmp_path / "run", *SPIKY, resume=True), without_those_steps)


def test_too_many_spikes_end_the_run(home, tmp_path, monkeypatch):
    poison(monkeypatch, (6, 9), spiked)
    with pytest.raises(RunFailedError, match=r"step 9: loss .* after guard.spike_limit=1 roll-backs"):
        run(home, tmp_path / "run", *SPIKY, "guard.spike_limit=1")


def test_a_ledger_that_is_damaged_is_told_and_one_of_another_run_does_not_count(home, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/guard.json").write_text('{"run_id": "1", "skipped_steps": [2], "rollbacks": [], "pending": null}')
    assert all("skipped" not in line for line in metrics_of(run(home, tmp_path / "a", "max_steps=2").path))
    for content in ("{", '{"run_id": "1", "skipped_steps": [-2], "rollbacks": [], "pending": null}', "[" * 9999):
        (tmp_path / "a/guard.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"guard.json: damaged"):
            run(home, tmp_path / "a", "max_steps=3", resume=True)


# --- agreement


class Engine:
    """What a comparison looks at."""

    def __init__(self, world) -> None:
        torch.manual_seed(0)
        self.world = world
        self.module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2).bfloat16())
        self.module[0].weight.requires_grad_(False)

    def weights(self):
        return self.module.named_parameters()


def rank_of_three() -> None:
    cfg = compose("train", ["model.path=/m", "dataset.path=/d", "device=cpu", "device.threads=1"]).device
    device = CpuDevice(cfg)
    device.activate(0)
    world = init_world(device)
    engine = Engine(world)
    must_agree(engine, 1)
    sound = [parameter.detach().clone() for parameter in engine.module.parameters()]
    for at, odd in ((0, 2), (3, 0)):  # a frozen fp32 weight, a bf16 bias; the lowest bit of one element
        with torch.no_grad():
            parameter = list(engine.module.parameters())[at]
            if world.rank == odd:
                bits = parameter.view(torch.int32 if parameter.dtype == torch.float32 else torch.int16)
                bits.view(-1)[1] ^= 1
        with pytest.raises(RunFailedError) as raised:
            must_agree(engine, 7)
        name = ("0.weight", "0.bias", "1.weight", "1.bias")[at]
        assert f"step 7: weights that all ranks should share differ: {name}: rank {odd} on " in str(raised.value)
        assert "against 2 others" in str(raised.value)
        for parameter, value in zip(engine.module.parameters(), sound, strict=True):
            parameter.data.copy_(value)
    with torch.no_grad():
        engine.module[0].bias += world.rank
    with pytest.raises(RunFailedError, match=r"0.bias: no majority among the 3 ranks"):
        must_agree(engine, 8)
    world.close()


@pytest.mark.distributed
def test_one_bit_on_one_rank_is_named():
    in_ranks(rank_of_three, 3, seconds=60)


def test_no_checkpoint_is_made_of_weights_that_differ(home, tmp_path, monkeypatch):
    def at_odds(engine, step):
        if step == 3:
            raise RunFailedError(f"step {step}", "differ")

    monkeypatch.setattr("train.loop.must_agree", at_odds)
    with pytest.raises(RunFailedError):
        run(home, tmp_path / "run", "guard.agreement_every=100", "checkpoint.every=1", "checkpoint.keep_last=0")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


# --- readers


def test_the_report_of_a_run_in_which_steps_were_skipped(home, tmp_path, monkeypatch):
    monkeypatch.setattr(Rollback, "skipped", {1, 4})
    poison(monkeypatch, (2,), infinite)
    folder = run(home, tmp_path / "run", "max_steps=4")
    assert [line.get("skipped") for line in metrics_of(folder.path)] == ["spike", "nonfinite", None, "spike"]
    assert "of 4, 3 skipped" in write_report(folder).read_text()
    folder.metrics.write_text("".join(folder.metrics.read_text().splitlines(keepends=True)[:2]))
    write_report(folder)  # not one step with a loss


def test_the_limit_counts_every_rank_and_shows_few_samples(tmp_path):
    """A batch of many samples does not fill the screen."""
    from train.data.sampler import GlobalStep
    from train.engine.base import World

    samples = samples_of([3] * 40, vocab_size=50)
    guard = NonFinite(tmp_path, 9, World(), samples)  # type: ignore[arg-type]  # a list serves as a split
    step = GlobalStep(torch.arange(40).numpy(), 120, 40, [tuple((i,) for i in range(40))])
    line = guard.skip(TrainerState(5, 0, 0, 0, 0), step, [math.nan], math.nan, math.nan)
    assert "sample:4 and 35 more (rank 0 on " in line and len(line) < 500
