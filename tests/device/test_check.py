"""The script that proves a machine, on the machine that there is always: the CPU; and that it notices what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.schema.device import DeviceConfig
from tests.device.board import FAILED, OK, Result, received, table
from tests.device.numerics import numerics
from train.devices.cpu import CpuDevice

SCRIPT = Path(__file__).with_name("check.py")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_cpu_is_proven(tmp_path):
    command = [sys.executable, str(SCRIPT), "device=cpu", "quick=true", "--json", str(tmp_path / "cpu.json")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())
    names = [result["name"] for result in found["results"]]
    assert found["ok"] and {"lora zero3 fp32, resumed", "all_reduce float32", "speed full fp32"} <= set(names)
    assert {"crosstune run, export and eval", "kill -9 and crosstune resume"} <= set(names)


def test_wrong_arithmetic_is_noticed(monkeypatch):
    """A matrix product in reduced precision, as some devices make by default, fails its check and no other."""
    product = torch.Tensor.__matmul__

    def reduced(a, b):
        return product(a.bfloat16(), b.bfloat16()).float() if a.dtype == torch.float32 else product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", reduced)
    found = {result.name: result.verdict for result in numerics(CpuDevice(DeviceConfig()))}
    assert found["matmul float32"] == FAILED
    assert {verdict for name, verdict in found.items() if name != "matmul float32"} == {OK}


def test_an_unknown_word_ends_it_with_what_is_allowed(tmp_path):
    done = subprocess.run([sys.executable, str(SCRIPT), "devise=cuda"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "devise=cuda: not understood" in done.stderr and "device=NAME" in done.stderr


def test_results_travel_and_failures_stand_last(capsys):
    results = [Result("a", FAILED, "off", {"error": 0.5}), Result("b", OK, "equal")]
    results[0].emit()
    assert received(capsys.readouterr().out) == results[0]
    assert received("a library's own words") is None
    assert table(results).splitlines()[-2].startswith(FAILED) and table(results).endswith("1 ok, 0 skipped, 1 FAILED")
