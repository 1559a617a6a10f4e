"""Faults of a run as they are told: where they struck, what was set, what helps, how the run goes on."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from configs.compose import compose
from configs.errors import DeviceError, OutOfMemoryError, RunFailedError, WorkerLostError
from configs.schema.roots import TrainConfig
from launchers.failure import ERROR_DIR, earliest_error, leave_error, with_way_on
from launchers.torchrun import Group, _root_cause, run_workers
from tests.tiny import samples_of, save_tiny_model, write_prepared
from train.devices.cpu import CpuDevice
from train.engine.plain import PlainEngine
from train.faults import told
from train.plan.budget import recomputing
from train.run import train

HOST = "err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes."
ASKED = "Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 3.12 MiB is free."


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    write_prepared(home / "data", {"train": samples_of((20, 30, 40, 11), vocab_size=290)})
    return home


def config(home: Path, *words: str) -> TrainConfig:
    sizes = ["max_steps=3", "batch_tokens=80", "micro_batch_tokens=80", "max_length=50"]
    paths = [f"model.path={home / 'model'}", f"dataset.path={home / 'data'}"]
    return compose("train", [*paths, *sizes, "device=cpu", "model.precision=fp32", "check_packing=false", *words])


def failing(home: Path, tmp: Path, monkeypatch, where: type, name: str, error: Exception, *words: str) -> str:
    """What a run says that meets `error` when it calls a method for the second time."""
    calls, method = [], getattr(where, name)

    def second_fails(self, *args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            raise error
        return method(self, *args, **kwargs)

    # It traces a pass of its own first.
    monkeypatch.setattr("train.run.Foresight.foretell", lambda *arguments, **images: None)
    second_fails.__code__ = second_fails.__code__.replace(co_name=name)  # the frames are read by name
    monkeypatch.setattr(where, name, second_fails)
    with pytest.raises((OutOfMemoryError, DeviceError)) as raised:
        train(config(home, *words), model_dir=home / "model", prepared=home / "data", run_dir=tmp)
    return raised.value.render()


def test_memory_of_the_optimizer_is_not_blamed_on_the_batch(home, tmp_path, monkeypatch):
    error = torch.OutOfMemoryError(f"CUDA out of memory. {ASKED}")
    shown = failing(home, tmp_path, monkeypatch, PlainEngine, "step", error, "tuning=full")
    assert "out of memory in the optimizer step of step 2: 20.0 MiB more were asked for" in shown
    assert "sharding=zero2_offload, then tuning=lora" in shown and "micro_batch_tokens=80 (" not in shown


def test_memory_that_runs_out_within_a_budget_is_told_of_what_the_budget_came_to(home, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.Foresight.settle", lambda self, cfg, note, images: recomputing(cfg, 1))
    words = ("activation_budget=1GiB",)
    shown = failing(home, tmp_path, monkeypatch, PlainEngine, "backward", RuntimeError(HOST), *words)
    assert "activation_checkpointing=true" not in shown.split("remedy:")[1]


def test_memory_of_a_pass_is_first_sought_in_the_batch(home, tmp_path, monkeypatch):
    shown = failing(home, tmp_path, monkeypatch, PlainEngine, "backward", RuntimeError(HOST), "packing=off")
    assert "cpu: out of memory in the backward pass of step 2: 3.00 GiB more were asked for" in shown
    first = "micro_batch_tokens=50 (the gradients stay the same), then packing=auto (no padding), then activation_ch"
    assert f"remedy:  {first}" in shown


@pytest.mark.parametrize(
    ("error", "operator"),
    [
        (NotImplementedError("Could not run 'aten::sort' with arguments from the 'XPU' backend. This"), "aten::sort"),
        (
            NotImplementedError("The operator 'aten::sort' is not currently implemented for the MPS device"),
            "aten::sort",
        ),
        (NotImplementedError("\"cumsum\" not implemented for 'BFloat16'"), "cumsum for BFloat16"),
    ],
)
def test_an_operator_without_a_kernel_is_named(home, tmp_path, monkeypatch, error, operator):
    from transformers.models.llama.modeling_llama import LlamaMLP

    shown = failing(home, tmp_path, monkeypatch, LlamaMLP, "forward", error)
    assert f"has no kernel for {operator}, which " in shown and "layers.1.mlp (LlamaMLP), needs in the forward" in shown
    assert f"crosstune doctor portability model.path={home / 'model'} device=cpu" in shown


def test_other_errors_stay_as_they_are(home):
    with pytest.raises(RuntimeError, match="shape"), told(CpuDevice(config(home).device), config(home)):
        raise RuntimeError("shape mismatch")


def test_a_workers_fault_keeps_its_kind_and_learns_how_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv(ERROR_DIR, str(tmp_path / "errors"))
    leave_error(OutOfMemoryError("npu:1 (rank 1)", "out of memory", remedy="less"))
    error = earliest_error(tmp_path / "errors")
    assert isinstance(error, OutOfMemoryError) and error.exit_code == 3
    assert with_way_on(error, tmp_path).remedy == "less"
    for name in ("step-00000004", "step-00000008.partial"):  # the latter was about to get its name
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    assert f"less; crosstune resume {tmp_path} goes on after step 4, with what" in str(with_way_on(error, tmp_path))


REPORT = """
Failures:
[1]:
  time      : 2026-11-22_03:34:49
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -6 (pid: 4834)
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_03:34:48
  host      : localhost
  rank      : 3 (local_rank: 3)
  exitcode  : -9 (pid: 4835)
"""


def test_a_taken_port_is_told_in_place_of_torchruns_end(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(RunFailedError) as caught:
        port = server.getsockname()[1]
        run_workers(1, ["train"], tmp_path, group=Group(nodes=2, port=port))
    assert (caught.value.where, f"port {port} of " in caught.value.found) == ("master_port", True)


def test_what_else_torchrun_met_before_any_worker_is_its_last_line(tmp_path):
    lines = ["Traceback (most recent call last):", '  File "x", line 1', "torch.distributed.DistNetworkError: no route"]
    (tmp_path / "torchrun.log").write_text("\n".join(lines) + "\n")
    assert "torchrun: ended early: torch.distributed.DistNetworkError: no route" in str(_root_cause(tmp_path, None))


def test_the_rank_that_was_killed_is_told_not_the_one_that_noticed(tmp_path):
    (tmp_path / "torchrun.log").write_text(REPORT)
    error = _root_cause(tmp_path, None)
    assert isinstance(error, WorkerLostError) and "rank 3: ended by signal SIGKILL" in str(error)
    typed = RunFailedError("step 2", "not finite")
    assert _root_cause(tmp_path, typed) is typed, "a rank that knew what was wrong is believed"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert "SIGKILL, as the kernel does when memory runs out, after step 2" in str(with_way_on(error, tmp_path))
