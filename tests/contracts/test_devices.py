"""Every backend answers the device layer's questions; what is not here says what is missing."""

from __future__ import annotations

import os

import pytest
import torch

from configs.errors import DeviceError
from configs.schema.device import DeviceConfig
from train.devices.ascend import AscendDevice
from train.devices.auto import ORDER, AutoDevice, _say_once
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.devices.cuda import CudaDevice

BACKENDS = [CpuDevice, CudaDevice, AscendDevice]


def test_auto_knows_every_backend():
    assert set(ORDER) == set(BACKENDS)


@pytest.fixture(autouse=True)
def keep_environment(monkeypatch):
    for key in ("DS_ACCELERATOR", "LOCAL_SIZE"):
        monkeypatch.setenv(key, os.environ.get(key, ""))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_works_or_says_what_is_missing(backend: type[Device]):
    device = backend(DeviceConfig())
    found = device.availability()
    assert found.reason
    if not found.ok:
        with pytest.raises(DeviceError, match=f"device={device.name}") as raised:
            device.activate(0)
        assert found.reason in str(raised.value) and "device=auto" in str(raised.value)
        return
    device.activate(0)
    assert os.environ["DS_ACCELERATOR"] == device.deepspeed_accelerator
    assert device.count() >= 1
    assert torch.float32 in device.fast_dtypes() and device.supports(torch.float32)
    device.seed(5)
    state = device.rng_state()
    first = torch.rand(3, device=device.torch_device)
    if state is None:
        device.seed(5)
    else:
        device.set_rng_state(state)
    assert torch.equal(first, torch.rand(3, device=device.torch_device))
    held = torch.ones(1 << 22, device=device.torch_device)
    device.synchronize()
    assert device.peak_memory_bytes() >= held.numel() * 4
    assert device.describe()["name"] == device.name


def test_auto_takes_the_first_available_and_says_what_the_others_lack(caplog):
    _say_once.cache_clear()
    with caplog.at_level("INFO"):
        device = AutoDevice(DeviceConfig())
    first = next(b for b in ORDER if b(DeviceConfig()).availability().ok)
    assert type(device) is first
    for passed_over in ORDER[: ORDER.index(first)]:
        assert passed_over.name in caplog.text


def test_threads_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    CpuDevice(DeviceConfig()).activate(0)
    assert torch.get_num_threads() == 1
    CpuDevice(DeviceConfig(threads=2)).activate(0)
    assert torch.get_num_threads() == 2
