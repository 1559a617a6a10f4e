"""Every backend answers the device layer's questions.

A backend whose device is here is asked for real, any other over a pretended runtime module; a child process asks the
real torch_npu on the stand-in (CROSSTUNE_REAL_DEVICE names the backend that must be real there).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import CrosstuneError, DeviceError
from configs.groups import CONFIG_ROOT
from configs.schema.device import AscendConfig, DeviceConfig
from configs.schema.model import Precision
from tests.contracts.fake_runtime import FakeRuntime, pretend
from train.devices.accelerator import AcceleratorDevice
from train.devices.auto import ORDER, AutoDevice, _say_once
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.devices.table import TableDevice

ROOT = Path(__file__).resolve().parents[2]
MEGABYTES = 1 << 26  # above the size up to which malloc gives out again what was freed before


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Activating a device changes the process."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


class Asked:
    """A backend's object, and what stands behind it."""

    def __init__(self, device: Device, fake: FakeRuntime | None) -> None:
        self.device, self.fake = device, fake

    def draw(self) -> torch.Tensor:
        """Random numbers of the device's generator."""
        if self.fake is None:
            return torch.rand(3, device=self.device.torch_device).cpu()
        return torch.rand(3, generator=self.fake.generator)

    def hold(self, size: int) -> object:
        """`size` bytes of the device's memory, as long as the answer lives."""
        if self.fake is None:
            return torch.ones(size // 4, device=self.device.torch_device)
        return self.fake.hold(size)


@pytest.fixture(params=ORDER, ids=lambda backend: backend.name)
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Asked:
    """Each backend, real where it is here."""
    backend: type[Device] = request.param
    device = backend(DeviceConfig())
    if device.availability().ok:
        return Asked(device, None)
    assert os.environ.get("CROSSTUNE_REAL_DEVICE") != backend.name, device.availability().reason
    return Asked(device, pretend(backend, monkeypatch, tmp_path))


def test_every_backend_has_an_option_and_a_place_in_the_order():
    named = {file.stem for file in (CONFIG_ROOT / "device").glob("*.yaml")}
    assert named == {backend.name for backend in ORDER} | {"auto", "npu"}
    assert ORDER[-1] is CpuDevice and len({backend.name for backend in ORDER}) == len(ORDER) == 11


@pytest.mark.parametrize("backend", ORDER, ids=lambda backend: backend.name)
def test_a_backend_that_is_not_here_says_what_is_missing(backend: type[Device]):
    device = backend(DeviceConfig())
    found = device.availability()
    assert found.reason
    if not found.ok:
        assert isinstance(device.versions(), dict) and isinstance(device.variables(), dict)
        with pytest.raises(DeviceError, match=f"device={device.name}") as raised:
            device.activate(0)
        assert found.reason in str(raised.value) and "device=auto" in str(raised.value)


def test_what_is_here_is_found_and_becomes_the_process_s_device(asked: Asked):
    device = asked.device
    assert device.availability().ok and device.availability().reason
    last = device.count() - 1
    assert last >= 0
    device.activate(last)
    assert device.index == last
    assert os.environ["DS_ACCELERATOR"] == (device.deepspeed_accelerator or "cpu")
    if asked.fake is not None and device.name != "mps":
        assert asked.fake.current == last
    if isinstance(device, AcceleratorDevice):
        with pytest.raises(DeviceError, match=f"process {last + 1} of this machine has no"):
            device.activate(last + 1)


def test_seeds_and_states_give_the_same_numbers_again(asked: Asked):
    device = asked.device
    device.activate(0)
    device.seed(5)
    first = asked.draw()
    state, on_host = device.rng_state(), torch.get_rng_state()
    second = asked.draw()
    assert not torch.equal(first, second)
    if state is None:
        torch.set_rng_state(on_host)
    else:
        device.set_rng_state(state)
    assert torch.equal(second, asked.draw())
    device.seed(5)
    assert torch.equal(first, asked.draw())


def test_memory_and_waiting(asked: Asked):
    device = asked.device
    device.activate(0)
    before = device.memory()
    held = asked.hold(MEGABYTES)
    device.synchronize()
    now = device.memory()
    assert now.used_bytes >= before.used_bytes + MEGABYTES * 0.9
    del held
    assert now.peak_bytes >= now.used_bytes and device.peak_memory_bytes() >= MEGABYTES
    assert now.total_bytes is None or now.total_bytes >= now.peak_bytes
    if asked.fake is not None:
        assert "synchronize" in asked.fake.calls


def test_number_formats_and_peaks(asked: Asked):
    device = asked.device
    assert torch.float32 in device.fast_dtypes() and device.supports(torch.float32)
    assert all(device.supports(dtype) for dtype in device.fast_dtypes())
    peak = device.peak_flops(torch.bfloat16)
    assert peak is None or peak > 1e9
    device.cfg.peak_tflops = 2.5
    assert device.peak_flops(torch.bfloat16) == 2.5e12


def test_what_cannot_run_is_refused_at_once(asked: Asked):
    device = asked.device
    device.check(1, Precision.auto)
    device.check(1, Precision.fp32)
    if not isinstance(device, AcceleratorDevice):
        return
    with pytest.raises(CrosstuneError, match="nproc: 99 processes"):
        device.check(99, Precision.auto)
    if isinstance(device, TableDevice) and not device.row.several_processes:
        with pytest.raises(DeviceError, match="nproc: 2 processes, but device=mps has no collectives"):
            device.check(2, Precision.auto)
    else:
        device.check(device.count(), Precision.auto)


def test_facts_for_the_records(asked: Asked):
    device = asked.device
    device.activate(0)
    facts = json.loads(json.dumps(device.describe()))
    assert facts["name"] == device.name and facts["found"] and facts["proven"] is (device.name == "cpu")
    assert all(isinstance(value, str) for value in (device.versions() | device.variables()).values())
    for name in device.kernels(torch.bfloat16):
        assert f"{name}_kernel" in DeviceConfig.__dataclass_fields__


def test_out_of_memory_is_known_by_kind_and_by_words(asked: Asked):
    device = asked.device
    assert device.is_out_of_memory(torch.OutOfMemoryError("x")) and device.is_out_of_memory(MemoryError())
    for text in device.out_of_memory_texts:
        assert device.is_out_of_memory(RuntimeError(f"first line: {text} (and more)"))
    wrapped = ValueError("while it loaded")
    wrapped.__cause__ = RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: you tried")
    assert device.is_out_of_memory(wrapped)
    assert not device.is_out_of_memory(RuntimeError("shapes do not match"))
    assert not device.is_out_of_memory(ValueError("out of memory"))
    if asked.fake is None:
        with pytest.raises(RuntimeError) as raised:
            torch.empty(1 << 50, dtype=torch.uint8, device=device.torch_device)
        assert device.is_out_of_memory(raised.value)


def test_auto_takes_the_first_available_and_says_what_the_others_lack(caplog: pytest.LogCaptureFixture):
    _say_once.cache_clear()
    with caplog.at_level("INFO"):
        device = AutoDevice(DeviceConfig())
    first = next(b for b in ORDER if b(DeviceConfig()).availability().ok)
    assert type(device) is first
    for passed_over in ORDER[: ORDER.index(first)]:
        plugin = getattr(passed_over, "plugin", None)
        assert (plugin or passed_over.name) in caplog.text


def test_threads_are_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    CpuDevice(DeviceConfig()).activate(0)
    assert torch.get_num_threads() == 1
    CpuDevice(DeviceConfig(threads=2)).activate(0)
    assert torch.get_num_threads() == 2


def test_settings_of_ascend_reach_torch_npu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from train.devices.ascend import AscendDevice

    device = AscendDevice(AscendConfig(internal_format=True, buffer_mib=120))
    if device.availability().ok:
        pytest.skip("a real torch_npu does not tell its options")
    fake = pretend(AscendDevice, monkeypatch, tmp_path)
    device.activate(1)
    assert fake.config.allow_internal_format is True and "set_compile_mode" in fake.calls
    assert device.variables()["HCCL_BUFFSIZE"] == "120"


def test_on_the_stand_in_the_real_torch_npu_answers(standin: Any):
    """These questions, and the signatures of every call into torch.npu and torch_npu."""
    files = ["tests/contracts/test_devices.py", "tests/contracts/test_device_signatures.py"]
    words = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", "[ascend] or [npu]"]
    environment = standin.environment(devices=2) | {"CROSSTUNE_REAL_DEVICE": "ascend"}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"=+ 10 passed", done.stdout) and "skipped" not in done.stdout, done.stdout[-3000:]
