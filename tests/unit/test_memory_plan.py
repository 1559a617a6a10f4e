"""The prediction of memory: what is traced, what engines take, what allocators hold, what fits."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from configs.compose import compose
from configs.errors import ConfigError, DataError, ModelError
from configs.schema.dataset import FilesDatasetConfig
from configs.schema.device import DeviceConfig
from configs.schema.plan import PlanOptions, room
from launchers.command_line import parse
from launchers.doctor.page import Page
from launchers.plan.command import Plan, _data
from launchers.plan.fit import _reason
from launchers.plan.page import _fits
from tests.tiny import save_tiny_model
from train.data.plan import RowKind
from train.devices.cpu import CpuDevice
from train.models.load import load_config
from train.ops.loss_head import CHUNK_BYTES
from train.plan import tape as part
from train.plan.allocators import MIB, caching_peak, host_peak
from train.plan.budget import EVERY, recomputing, within
from train.plan.engines import Setting, Weight, Zero
from train.plan.gathering import Gathered, Part
from train.plan.model import Model
from train.plan.outcomes import Outcomes
from train.plan.predict import BASE, Data, Predictor
from train.plan.process import Files, process_bytes
from train.plan.tape import Tape
from train.plan.trace import FREED, Pass, fullest, trace_optimizer
from train.plan.zero_engines import script_of

NOTHING = Pass([], 0, [], set())
GIB = 2**30


def adamw(shapes, foreach=False):
    return trace_optimizer(lambda named: torch.optim.AdamW([t for _, t in named]), shapes, foreach=foreach)


def setting(zero=None, world=1, size=4, weights=None, **more):
    weights = weights or [Weight("w", torch.Size((1000, 1000)), True)]
    more = {"micro_batch": NOTHING, "reserve_buckets": False} | more
    return Setting(weights=weights, size=size, world=world, zero=zero, step=adamw, **more)


def held(made: Setting) -> dict[str, int]:
    """What is there before the first pass and stays, in bytes per trained weight."""
    script_of(made).build()
    _, parts = made.device.peak()
    last = made.device.parts_after(len(made.device.events) - 1)
    return {name: round(size / 1e6) for name, size in last.items()}


def test_what_engines_hold_by_hand():
    """Bytes per weight as the papers count them: 16 with AdamW in mixed precision, less what is spread."""
    assert held(setting()) == {part.WEIGHTS: 4, part.GRADIENTS: 4}
    assert held(setting(size=2)) == {part.WEIGHTS: 2, part.MASTERS: 4, part.GRADIENTS: 4}
    assert held(setting(Zero(2), world=4)) == {part.WEIGHTS: 4, part.MASTERS: 1}
    assert held(setting(Zero(1), world=4, size=2)) == {part.WEIGHTS: 2, part.MASTERS: 1, part.GRADIENTS: 4}
    three = held(setting(Zero(3), world=4, size=2, reserve_buckets=False))
    assert three[part.MASTERS] == 1 and three[part.GRADIENTS] == 1 and round(three[part.WEIGHTS]) <= 1


def test_adamw_keeps_two_values_and_takes_two_more_for_a_moment():
    made = setting()
    script_of(made).write(passes=1, steps=2)
    _, parts = made.device.peak()
    assert [round(parts[name] / 1e6) for name in (part.STATE, part.STEP)] == [8, 8]


def test_offload_moves_masters_gradients_and_state_to_the_host():
    made = setting(Zero(2, offload=True))
    script_of(made).write(passes=1, steps=2)
    assert not {part.MASTERS, part.STATE} & set(made.device.peak()[1])
    host = made.host.peak()[1]
    assert [round(host[name] / 1e6) for name in (part.MASTERS, part.STATE, part.GRADIENTS)] == [4, 8, 4]


def test_zero3_gathers_fused_experts_whole():
    """Two tensors of one module come together, however little is prefetched; small ones are always there."""
    weights = [Weight(f"l.{i}.experts.{n}", torch.Size((8, 1000, 100)), True) for i in (0, 1) for n in "ab"]
    layers = [Part(tuple((weight.name, weight.numel) for weight in weights[i : i + 2])) for i in (0, 2)]
    norm = Weight("norm", torch.Size((64,)), True)
    modules = Part((("norm", 64),), tuple(layers))
    made = setting(Zero(3, prefetch=0, reuse=0), world=8, weights=[*weights, norm], modules=modules)
    assert script_of(made).gathered() == Gathered(2 * 800_000, 64, 2 * 800_000)
    script_of(made).write(passes=1, steps=1)
    assert any(
        made.device.parts[n] == part.GATHERED and size == 4 * (2 * 1_600_000 + 64) for n, size in made.device.events
    )


def test_a_save_keeps_its_copy_on_the_host():
    made = setting(copy=12_000_000)
    script_of(made).write(passes=1, steps=3)
    assert made.host.peak()[1][part.COPY] == 12_000_000
    for stays, most in (False, 4 + 4 + 8 + 12), (True, 4 + 4 + 8 + 12 + 8):
        tape = Tape()  # of a CPU, where device and host are one: weights, gradients, state, copy; a step's own beside
        made = setting(copy=12_000_000, copy_stays=stays, device=tape, host=tape)
        script_of(made).write(passes=1, steps=3)
        assert round(tape.peak()[0] / 1e6) == most


def test_the_caching_allocator_keeps_segments():
    """Sizes by hand after its rules: 2 MiB for small blocks, 20 MiB for middle ones, whole ones above."""
    assert caching_peak([(0, 100)]) == 2 * MIB
    assert caching_peak([(0, 3 * MIB)]) == 20 * MIB
    assert caching_peak([(0, 31 * MIB)]) == 32 * MIB
    assert caching_peak([(0, 30 * MIB), (0, FREED), (1, 16 * MIB), (2, 14 * MIB)]) == 30 * MIB, "a hole is cut in two"
    holes = [(0, 10 * MIB), (1, 10 * MIB), (0, FREED), (1, FREED), (2, 20 * MIB)]
    assert caching_peak(holes) == 40 * MIB, "two segments do not become one"


def test_the_host_is_asked():
    """What is freed is there for what comes, as far as a hole fits: never less than what lives."""
    tape = Tape()
    for _ in range(3):
        numbers = [tape.take("x", MIB) for _ in range(8)]
        tape.give(*numbers)
    found = host_peak(tape.events)
    assert found is not None and 8 * MIB <= found < 20 * MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), hidden_size=64, num_hidden_layers=4)


def predictor(folder, *words, world=1, on_cpu=True, model=None, host=None):
    cfg = compose("train", [f"model.path={folder}", "dataset.path=x", "device=cpu", "micro_batch_tokens=1024", *words])
    dtype = torch.float32 if "model.precision=fp32" in words else torch.bfloat16
    made = model or Model(cfg, folder, host)
    return Predictor(
        cfg, made, dtype=dtype, on_cpu=on_cpu, kind=RowKind.packed, world=world, data=Data(), base_bytes=lambda: 0
    )


def parts_of(folder, *words, **more):
    forecast = predictor(folder, "tuning=full", "model.precision=fp32", *words, on_cpu=False, **more).forecast()
    return forecast, forecast.parts


def test_logits_are_counted_as_the_loss_makes_them(folder):
    """In fp32: logits and their log-softmax, which becomes the gradient; never more than a chunk of them."""
    one = predictor(folder, "tuning=full", "model.precision=fp32")
    found = one.model.traced(torch.float32, one.shape, recompute=False)
    sizes = {size for number, size in found.events if number in found.wide and size > 0}
    assert one.shape.supervised * one.model.vocabulary * 4 in sizes
    _, parts = parts_of(folder)
    assert 2 * one.shape.supervised * one.model.vocabulary * 4 <= parts[part.LOGITS] < 3 * CHUNK_BYTES


def test_logits_are_those_of_a_chunk(folder, monkeypatch):
    monkeypatch.setattr("train.objectives.causal_lm.CHUNK_BYTES", 2**16)
    most = []
    for tokens in (1024, 4096):
        one = predictor(folder, "tuning=full", "model.precision=fp32", f"micro_batch_tokens={tokens}")
        found = one.model.traced(torch.float32, one.shape, recompute=False)
        held = itertools.accumulate(size for number, size in wide_events(found))
        most.append(max(held))
    assert most[0] == most[1] < 5 * 2**16


def test_a_host_scores_few_logits_of_a_chunk_at_once(folder, monkeypatch):
    monkeypatch.setattr("train.objectives.causal_lm.CHUNK_BYTES", 2**16)
    monkeypatch.setattr("train.ops.loss_head.CACHED_BYTES", 2**11)
    words = ("tuning=full", "model.precision=fp32")
    most = []
    for host in (None, CpuDevice(DeviceConfig())):
        one = predictor(folder, *words, host=host)
        found = one.model.traced(torch.float32, one.shape, recompute=False)
        most.append(max(itertools.accumulate(size for number, size in wide_events(found))))
    assert most[0] > 1.9 * 2**16 and 2**15 < most[1] < 1.5 * 2**16


def wide_events(found):
    """Those of logits and their like, a release as a negative size."""
    sizes: dict[int, int] = {}
    for number, size in found.events:
        if number in found.wide:
            yield number, size if size >= 0 else -sizes[number]
            sizes[number] = size


def test_autograds_graph_lies_in_a_hosts_memory_until_the_pass_ends(folder):
    one = predictor(folder, "tuning=full", "model.precision=fp32")
    found = one.model.traced(torch.float32, one.shape, recompute=False)
    made = {number for number, size in found.events[: found.forward_ends] if number in found.graph and size != FREED}
    assert made == found.graph and len(made) > 100
    assert not found.graph & {number for number, size in found.events if size == FREED}
    assert part.GRAPH in one.forecast().parts
    assert part.GRAPH not in predictor(folder, "tuning=full", on_cpu=False).forecast().parts, "no device holds it"


def test_files_stay_mapped_beside_what_loading_made_anew(tmp_path):
    """Two experts that become one weight: their pages stay as long as another weight of the file is mapped."""
    save_file(
        {"norm": torch.ones(256), "e.0": torch.ones(64, 64), "e.1": torch.ones(64, 64)}, tmp_path / "a.safetensors"
    )
    shapes = {"norm": torch.Size((256,)), "e": torch.Size((2, 64, 64))}
    joined, cast = Files(tmp_path, shapes, torch.float32), Files(tmp_path, shapes, torch.bfloat16)
    assert joined.mapped == 4 * 256 and 2 * 4 * 64 * 64 <= joined.beside < 2 * 4 * 64 * 64 + 500
    assert cast.mapped == cast.beside == 0, "nothing holds the file"
    assert Files(tmp_path / "none", shapes, torch.float32).beside == 0


def test_recomputation_leaves_a_layers_input(folder):
    kept, recomputed = (
        parts_of(folder, f"activation_checkpointing={word}")[1][part.ACTIVATIONS] for word in ("false", "true")
    )
    assert recomputed < kept / 2


@pytest.mark.parametrize("words", [["tuning=lora"], ["tuning=full", "activation_checkpointing=true"]])
def test_what_is_remembered_of_operators_is_what_torch_gives(folder, words, monkeypatch):
    def events():
        one = predictor(folder, *words)
        found = one.model.traced(torch.bfloat16, one.shape, recompute=one.cfg.recompute_every)
        return found, adamw([(3, 4), (5,), (3, 4)]), adamw([(3, 4), (5,)], foreach=True)

    remembered, called = events(), []
    monkeypatch.setattr(
        Outcomes, "__call__", lambda self, func, args, kwargs: called.append(1) or func(*args, **kwargs)
    )
    assert events() == remembered and len(called) > 100


def test_a_tensor_that_is_given_another_memory_is_asked_for_each_time():
    outcomes, tensors = Outcomes(), [torch.empty(2, device="meta") for _ in range(4)]
    for one, other in (tensors[:2], tensors[2:]):
        outcomes(torch.ops.aten.set_.source_Tensor, (one, other), {})
        assert one.untyped_storage()._cdata == other.untyped_storage()._cdata
        view = outcomes(torch.ops.aten._unsafe_view.default, (other, [2, 1]), {})
        assert view.untyped_storage()._cdata == other.untyped_storage()._cdata
        assert outcomes(torch.ops.aten.mul_.Tensor, (one, 2.0), {}) is one


def test_a_budget_takes_as_few_recomputed_layers_as_fit(folder):
    tried = {}

    def forecast(one):
        assert one.activation_budget is None
        words = ["activation_checkpointing=true", f"activation_checkpointing_every={one.recompute_every}"]
        tried[one.recompute_every] = found = predictor(folder, *(words if one.recompute_every else [])).forecast()
        return found

    cfg = predictor(folder, "activation_budget=1GiB").cfg

    with pytest.raises(ConfigError, match="activation_budget: 1GiB, but .* GiB are predicted with all") as raised:
        within(cfg, 2**20, forecast)
    assert list(tried) == list(EVERY) and "plan --fit" in (raised.value.remedy or "")
    sizes = [tried[every].device_bytes for every in EVERY]
    assert sizes[0] > sizes[-2] > sizes[-1]
    for size in sizes:
        chosen, found, why = within(cfg, size, forecast)
        assert found.device_bytes <= size and why.startswith("activation budget: ")
        assert chosen.recompute_every == next(each for each, other in zip(EVERY, sizes, strict=True) if other <= size)
        assert chosen == recomputing(cfg, chosen.recompute_every)


def test_a_micro_batch_is_no_larger_than_a_ranks_share_of_the_step(folder):
    assert predictor(folder, "batch_tokens=1024", "max_length=128", world=4).shape.tokens == 256
    assert predictor(folder, "batch_tokens=99999", "max_length=128").shape.tokens == 1024
    assert fullest(RowKind.single, 1024, 300, 1.0).tokens == 300
    assert fullest(RowKind.packed, 1024, 300, 0.5).supervised == 512


def test_what_cannot_be_traced_is_said_and_estimated(folder):
    class Asks(nn.Module):
        def forward(self, x):
            return x * float(x.sum().item())

    one = predictor(folder, "tuning=full", "model.precision=fp32")
    module = one.module
    module.model.layers[0].mlp = Asks()
    forecast = one.forecast()
    assert forecast.parts[part.ACTIVATIONS] > 0
    assert len(forecast.unknown) == 1 and "estimated as 34 bytes" in forecast.unknown[0]


class Asks(torch.optim.SGD):
    def step(self, closure=None):
        float(self.param_groups[0]["params"][0].detach().sum())


class Talks(torch.optim.SGD):
    def step(self, closure=None):
        pytest.fail("rank 0 alone would wait for the others for ever")


@pytest.mark.parametrize(("kind", "world"), [(Asks, 1), (Talks, 2)])
def test_an_optimizer_that_cannot_be_traced_is_estimated(folder, kind, world):
    one = predictor(folder, "tuning=full", "model.precision=fp32", "optim=sgd", world=world)
    one.cfg = replace(one.cfg, optim=replace(one.cfg.optim, _target_=f"{__name__}.{kind.__name__}"))
    forecast = one.forecast()
    assert forecast.parts[part.STATE] == 2 * 4 * one.trained_numel
    assert len(forecast.unknown) == 1 and "two numbers in fp32 a weight" in forecast.unknown[0]
    if kind is Talks:
        assert process_bytes(one.cfg, torch.float32) > 0


def test_rows_that_are_filled_up_are_traced_so(folder):
    one = predictor(folder, "batch_tokens=1000", "max_length=128")
    assert one.shape.tokens == 1000
    one = predictor(folder, "batch_tokens=1000", "max_length=128")
    one.row_step = 64
    assert one.shape.tokens == 1024


def test_disk_and_communication(folder):
    forecast, _ = parts_of(folder, "sharding=zero3", world=4)
    trained = sum(p.numel() for p in predictor(folder, "tuning=full", "model.precision=fp32").module.parameters())
    assert forecast.checkpoint_bytes == 12 * trained
    gathered = forecast.sent_bytes["weights, gathered forward and backward"]
    assert gathered == int(2 * 4 * trained * 3 / 4), "once forward, once backward; a rank has a quarter already"


def test_room_is_read():
    assert room("64GiB x 8") == (64 * GIB, 8)
    assert room("80GB*2") == (80 * 10**9, 2)
    assert room("24g") == (24 * GIB, None)
    for wrong in ("", "x 8", "64", "64GiB x 0", "lots"):
        with pytest.raises(ConfigError):
            room(wrong)


def test_fit_needs_no_quotes():
    for text in ("64GiB x 8", "64GiB x8", "64 GiB x 8", "64GiBx 8", "64g *8", "64GiB X 8", "64GiB"):
        words = parse(["plan", "model.path=m", "--fit", *text.split(), "nproc=2"]).words
        assert words == ["model.path=m", f"fit={text}", "nproc=2"]
        assert room(text) == room(text.replace(" ", ""))
    assert compose("plan", ["dataset.path=d", "model.path=m", "fit=64 GiB x8"]).fit == "64 GiB x8"


def test_processes_that_only_fit_names_are_on_one_machine():
    forecast: Any = SimpleNamespace(device_bytes=2, host_bytes=3)
    for fit, nproc, nodes, each in (
        *((None, 1, 8, 1), (None, 4, 2, 4), ("64GiB", 1, 1, 1)),
        *(("64GiB x 8", 1, 1, 8), ("64GiB x 8", 4, 1, 4), ("64GiB x 2", 4, 1, 2), ("64GiB x 9", 1, 2, 5)),
    ):
        cfg: Any = SimpleNamespace(fit=fit, nproc=nproc, plan=PlanOptions(nodes=nodes))
        for on_cpu, size in ((True, 2), (False, 3)):
            made = Plan(cfg, device=ANY, on_cpu=on_cpu, model=ANY, data=Data(), notes=[])
            assert (made.on_a_machine, made.on_host(forecast)) == (each, each * size)


def test_what_is_offloaded_is_told_beside_what_fits():
    line = {"fits": True, "precision": "bf16", "micro_batch_tokens": 1, "needs_bytes": GIB}
    line |= {"activation_checkpointing": False, "machine_host_bytes": 96 * GIB}
    lines = [line | {"sharding": name} for name in ("zero3", "zero3_offload")]
    out = io.StringIO()
    _fits(Page(Console(file=out, width=200)), {"fits": lines, "on_cpu": False}, "64GiB")
    said = " ".join(out.getvalue().split())
    assert said.count("host memory") == 1 and said.endswith("1.0 GiB, and 96.00 GiB of a machine's host memory")


def test_only_a_manifest_of_ours_says_what_is_learned(tmp_path):
    cfg: Any = SimpleNamespace(dataset=FilesDatasetConfig(path=str(tmp_path)), plan=PlanOptions())
    train = {"max_length": 77, "tokens": 100, "supervised_tokens": 25}
    ours = {"format_version": 2, "fingerprint": "f", "kind": "samples", "splits": {"train": train}}
    for content in ({"files": []}, [], {"splits": {"train": []}}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        notes: list[str] = []
        assert _data(cfg, notes) == Data(1.0, None) and len(notes) == 1, "raw records, as a run takes them"
    (tmp_path / "manifest.json").write_text(json.dumps(ours))
    assert _data(cfg, notes := []) == Data(0.25, 77) and not notes
    (tmp_path / "manifest.json").write_text(json.dumps(ours | {"format_version": 1}))
    with pytest.raises(DataError, match="format 1"):
        _data(cfg, [])


def test_the_reason_is_what_a_setting_can_change_or_what_is_too_large_by_itself():
    parts = {BASE: 9 * GIB, "reserve": 5 * GIB, "activations": 4 * GIB, "weights": 2 * GIB}
    assert _reason(parts, {BASE, "reserve"}, 10 * GIB) == "activations alone takes 4.0 GiB"
    assert _reason(parts, {BASE, "reserve"}, 8 * GIB) == f"{BASE} alone exceeds it: 9.0 GiB"


def test_what_a_user_meant_by_teraflops_or_by_a_hidden_size_is_told(folder, tmp_path):
    with pytest.raises(ConfigError, match="plan.flops=312e12 for 312 TFLOP/s"):
        PlanOptions(flops=312)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 97, "num_attention_heads": 7}))
    with pytest.raises(ModelError, match="hidden size .97. is not a multiple"):
        load_config(tmp_path)
