"""`crosstune doctor`: what it answers and what it finds, on this machine and on the stand-in for Ascend."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.errors import DeviceError
from configs.schema.device import AscendConfig, DeviceConfig, KernelChoice
from configs.schema.doctor import DoctorConfig
from launchers.doctor import findings
from launchers.doctor.look import look_at
from launchers.doctor.page import show
from tests.command import crosstune
from tests.standin import StandinKit
from train.devices.ascend_environment import plan
from train.devices.cpu import CpuDevice


def report_of(text: str) -> dict[str, Any]:
    """The report in the output of ``--json``; whatever else was printed stands before it."""
    report: dict[str, Any] = json.loads(text.splitlines()[-1])
    return report


def said(report: dict[str, Any], level: str) -> str:
    """All findings of a level with their remedies."""
    return "\n".join(f"{each['what']} -> {each['remedy']}" for each in report["findings"] if each["level"] == level)


def plugin(folder: Path, body: str) -> dict[str, str]:
    """Environment in which there is a torch_npu with that body."""
    (folder / "torch_npu").mkdir()
    (folder / "torch_npu/__init__.py").write_text(body)
    return {"PYTHONPATH": str(folder)}


def test_auto_says_what_it_took_and_why_nothing_else_even_where_a_plugin_takes_its_process_down(tmp_path):
    environment = plugin(tmp_path, "import os; os.abort()") | {"HCCL_BUFFSIZE": "0"}
    report = report_of(crosstune("doctor", "--json", code=2, **environment))
    # A run would stop for that one before it chose the CPU, and for nothing else: CANN's absence is no fault of it.
    assert report["device"] == "cpu" and said(report, "missing").startswith("HCCL_BUFFSIZE: '0'")
    assert len(said(report, "missing").splitlines()) == 1
    answers = report["answers"]
    assert answers["torch_device"] == "cpu" and answers["backend"] == "gloo" and answers["deepspeed"] == "cpu"
    assert answers["dtypes"]["fp32"] == "fast" and answers["memory_total_bytes"] > answers["memory_free_bytes"] > 0
    assert set(answers["kernels"]) == {"attention", "rms_norm", "rotary", "swiglu"}
    assert {"python", "torch", "transformers", "deepspeed", "peft"} <= report["versions"].keys()
    why = {record["name"]: record["reason"] for record in report["passed_over"]}
    assert "took its process down (SIGABRT)" in why["ascend"]
    assert why["mlu"] == "no torch_mlu" and "built without CUDA" in why["cuda"] and "ROCm" in why["rocm"]


def test_a_device_that_is_not_there_and_a_misspelt_variable_are_told_with_the_remedy():
    out = crosstune("doctor", "device=ascend", code=2, COLUMNS="100", HCCL_DETERMINISITIC="true", HCCL_BUFFSIZE="120")
    assert "device=ascend  a run would not start" in out and "Traceback" not in out and "\x1b" not in out
    assert re.search(r"missing +ascend cannot be used: torch_npu is not installed\n +-> pip install torch_npu==\d", out)
    assert re.search(r"missing +HCCL_DETERMINISITIC: no such variable.*\n +-> did you mean HCCL_DETERMINISTIC\?", out)
    assert re.search(r"missing +CANN's environment is not set.*\n +-> .*set_env.sh", out)
    assert re.search(r"HCCL_BUFFSIZE +120 +\(environment\)", out)
    assert re.search(r"HCCL_CONNECT_TIMEOUT +600 +\(default\)", out)
    assert max(map(len, out.splitlines())) <= 100


def test_ready_on_the_standin(standin: StandinKit):
    report = report_of(standin.crosstune("doctor", "device=ascend", "--json", "device.buffer_mib=64"))
    answers = report["answers"]
    assert report["exit_code"] == 0 and said(report, "missing") == ""
    assert (answers["torch_device"], answers["backend"], answers["count"]) == ("npu:0", "hccl", 2)
    assert answers["dtypes"] == {"bf16": "fast", "fp32": "fast"} and answers["memory_total_bytes"] == 64 * 2**30
    assert answers["multiplies"] and set(answers["kernels"].values()) == {""}, "all ops agree with plain torch"
    assert "pretended device" in said(report, "note") and "not run by crosstune's makers" in said(report, "note")
    assert "torch_npu 2.13.0 matches torch 2.13.0" in said(report, "ok")
    settings = {each["variable"]: (each["value"], each["from"]) for each in report["settings"]}
    assert settings["HCCL_BUFFSIZE"] == ("64", "config") and settings["TASK_QUEUE_ENABLE"] == ("2", "default")
    assert settings["ASCEND_HOME_PATH"][1] == "environment"


def test_every_fault_of_a_request_is_found_at_once_on_the_standin(standin: StandinKit, monkeypatch):
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "0,5")
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "60")
    monkeypatch.setenv("HCCL_EXEC_TIMEOT", "600")
    monkeypatch.setenv("HCCL_NEWER_THAN_US", "1")
    words = ["doctor", "device=ascend", "--json", "nproc=3", "model.precision=bf16", "device.swiglu_kernel=device"]
    report = report_of(standin.crosstune(*words, code=2, soc="Ascend910PremiumA"))
    missing = said(report, "missing")
    for part in (
        "'0,5' names 2 NPUs, but the runtime finds 1",
        "bf16 does not work",
        "HCCL_CONNECT_TIMEOUT: '60' (allowed: a whole number from 120 to 7,200",
        "did you mean HCCL_EXEC_TIMEOUT?",
        "device.swiglu_kernel=device, but it cannot be used",
    ):
        assert part in missing
    assert "HCCL_NEWER_THAN_US" in said(report, "note") and "HCCL_NEWER_THAN_US" not in missing
    assert report["answers"]["dtypes"]["bf16"] == "no"


@pytest.mark.slow
def test_no_device_at_all_on_the_standin(standin: StandinKit):
    report = report_of(standin.crosstune("doctor", "device=ascend", "--json", code=2, devices=0))
    assert "ascend cannot be used: no NPU is visible -> see npu-smi info" in said(report, "missing")


RECORDER = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch_npu" and sys._getframe(1).f_code.co_name != "find_spec":
            with open(os.environ["SEEN"], "a") as file:
                file.write(f"{os.environ.get('RANK')} {os.environ.get('HCCL_BUFFSIZE')}\\n")
sys.meta_path.insert(0, Watch())
"""


@pytest.mark.slow
def test_workers_have_our_values_when_torch_npu_is_loaded(standin: StandinKit, tmp_path, tiny_job):
    """Two workers under torchrun: the variable stands in each of them before the plugin is looked for."""
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    environment = standin.environment() | {"SEEN": str(tmp_path / "seen")}
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    crosstune("train", *tiny_job, "device=ascend", "nproc=2", "device.buffer_mib=64", **environment)
    assert set((tmp_path / "seen").read_text().splitlines()) == {"None 64", "0 64", "1 64"}


@pytest.fixture
def tiny_job(tmp_path: Path) -> list[str]:
    """Words of a training of two steps."""
    from tests.command import write_uneven_records
    from tests.tiny import save_tiny_model

    return [
        f"model.path={save_tiny_model(tmp_path / 'model')}",
        f"dataset.path={write_uneven_records(tmp_path / 'data.jsonl')}",
        *("dataset.license=CC0-1.0", "model.precision=fp32", "batch_tokens=400", "max_length=320"),
        *("micro_batch_tokens=400", "max_steps=2", f"run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"),
    ]


def test_what_cann_lacks_is_told_without_loading_anything(tmp_path, monkeypatch):
    cfg = DoctorConfig(device=AscendConfig(_target_="train.devices.ascend.AscendDevice"))

    def found(**environment: str) -> str:
        settings = plan(cfg.device, environment)  # type: ignore[arg-type]
        return "\n".join(f"{e.level} {e.what} {e.remedy}" for e in findings.of_ascend(settings, cfg, environment))

    monkeypatch.setattr(findings, "SET_ENV", (str(tmp_path / "set_env.sh"),))
    assert "install CANN" in found()
    (tmp_path / "set_env.sh").touch()
    assert f"missing CANN's environment is not set: no ASCEND_HOME_PATH source {tmp_path}/set_env.sh" in found()
    assert "holds no CANN" in found(ASCEND_HOME_PATH=str(tmp_path))
    (tmp_path / "lib64").mkdir()
    assert f"ok CANN in {tmp_path}" in found(ASCEND_HOME_PATH=str(tmp_path))
    many = {f"HCCL_SITE_{number}": "1" for number in range(30)}
    assert "and 22 more" in found(**many), "dozens of unknown names are one line"


@pytest.mark.parametrize(
    ("ours", "installed", "level"),
    [("2.13.0+cpu", "2.13.0", "ok"), ("2.13.0", "2.13.0.post2", "ok"), ("2.13.0", "2.13.1", "note")],
)
def test_torch_and_its_plugin_belong_together(monkeypatch, ours, installed, level):
    monkeypatch.setattr(findings, "versions_of", lambda names: {"torch": ours, "torch_npu": installed})
    (finding,) = findings._versions_of_torch_npu()
    assert finding.level == level and installed in finding.what


RECORD: dict[str, Any] = {
    **{"name": "ascend", "available": True, "reason": "8 x Ascend910B3", "proven": False, "deepspeed": None},
    **{"versions": {}, "variable": "ASCEND_RT_VISIBLE_DEVICES", "faults": [], "torch_device": "npu:0"},
    **{"backend": "hccl", "count": 8, "dtypes": {"bf16": "fast", "fp32": "works"}, "kernels_dtype": "bfloat16"},
    **{"memory_free_bytes": 60 * 2**30, "memory_total_bytes": 64 * 2**30, "peak_flops_bf16": 353e12},
    **{"kernels": {"attention": "", "rms_norm": "", "swiglu": "values are off"}, "multiplies": True},
}


def test_the_page_is_readable_at_a_glance(monkeypatch):
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    out = io.StringIO()
    report = {
        **{"device": "ascend", "answers": RECORD, "passed_over": [], "versions": {"python": "3.11", "torch": "2.13.0"}},
        "settings": [{"variable": "HCCL_BUFFSIZE", "value": "64", "from": "config"}],
        "findings": [vars(findings.Finding("ok", "fine")), vars(findings.Finding("missing", "a [part]", "get it"))],
        "exit_code": 2,
    }
    show(report, Console(file=out, width=100))
    assert out.getvalue() == (
        "device=ascend  a run would not start\n"
        "  found        8 x Ascend910B3\n"
        "  torch device npu:0, collectives by hccl\n"
        "  devices      8 visible; ASCEND_RT_VISIBLE_DEVICES is not set\n"
        "  formats      bf16 fast; fp32 works, slowly\n"
        "  memory       64.0 GiB, 60.0 GiB free\n"
        "  peak         353 TFLOP/s in bf16, dense\n"
        "  DeepSpeed    no class for this device: sharding=plain only\n"
        "  kernels      attention, rms_norm: the device's own, compared in bfloat16 just now\n"
        "               swiglu: plain torch (values are off)\n"
        "  versions     python 3.11; torch 2.13.0\n"
        "\n"
        "settings  as a run would have them, and where each comes from\n"
        "  HCCL_BUFFSIZE  64  (config)\n"
        "\n"
        "findings\n"
        "  missing      a [part]\n"
        "               -> get it\n"
        "  ok           fine\n"
    )


def test_findings_of_a_record():
    cfg = DoctorConfig(nproc=9, device=AscendConfig(_target_="x", swiglu_kernel=KernelChoice.device))
    fault = {"where": "nproc", "found": "9 processes", "allowed": "1 to 8", "remedy": "lower nproc"}
    found = {each.what: each for each in findings.of_look({**RECORD, "faults": [fault]}, cfg)}
    assert found["nproc: 9 processes (allowed: 1 to 8)"].level == "missing"
    assert found["device.swiglu_kernel=device, but it cannot be used: values are off"].level == "missing"
    assert found["DeepSpeed knows no ascend: sharding=zero1, zero2 and zero3 stop"].level == "note"
    assert found["ascend was not run by crosstune's makers"].level == "note"
    (wrong,) = (each for each in findings.of_look({**RECORD, "multiplies": False}, cfg) if "came out" in each.what)
    assert wrong.level == "missing"


def test_a_device_that_fails_in_use_or_whose_settings_are_refused_is_told(monkeypatch):
    cfg = DoctorConfig(device=DeviceConfig(_target_="train.devices.cpu.CpuDevice"))
    refused = CpuDevice(cfg.device)
    monkeypatch.setattr(refused, "availability", raises(DeviceError("device.allocator", "'x'", allowed="y")))
    record = look_at(refused, cfg)
    assert not record["available"]
    assert [each.what for each in findings.of_look(record, cfg)][1] == "device.allocator: 'x' (allowed: y)"
    broken = CpuDevice(cfg.device)
    monkeypatch.setattr(broken, "activate", raises(RuntimeError("driver is gone\nand more")))
    (fault,) = look_at(broken, cfg)["faults"]
    assert (fault["where"], fault["found"]) == ("device=cpu", "does not answer: RuntimeError: driver is gone")


def raises(error: Exception) -> Callable[..., Any]:
    """A function that only raises."""

    def function(*arguments: object) -> Any:
        raise error

    return function
