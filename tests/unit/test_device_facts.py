"""What backends know about cards: number formats, peaks, versions, and the state of Ascend's software."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from configs.errors import DeviceError
from configs.schema.device import DeviceConfig
from configs.schema.model import Precision
from tests.contracts.fake_runtime import pretend
from train.devices import ascend
from train.devices.accelerator import text_version
from train.devices.ascend import AscendDevice, cann_version
from train.devices.cpu import CpuDevice, _peak_resident_bytes
from train.devices.cuda import CudaDevice
from train.devices.peaks import published_peak_flops
from train.devices.rocm import RocmDevice
from train.devices.table import HpuDevice, MpsDevice
from train.devices.xpu import XpuDevice


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    environment, allowed = dict(os.environ), torch.backends.cudnn.allow_tf32
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.backends.cudnn.allow_tf32 = allowed
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("card", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4, 66.9),
        ("NVIDIA H100 PCIe", 756, 51.2),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.4, 67),
        ("NVIDIA H200 NVL", 835.5, 60),
        ("NVIDIA GH200 480GB", 989.4, 66.9),
        ("NVIDIA H800", 989.4, 66.9),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA GeForce RTX 3090", 71, 35.6),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("NVIDIA B200", 2250, 75),
        ("AMD Instinct MI300X", 1307.4, 163.4),
        ("AMD Instinct MI250X", 191.5, 23.95),
        ("Intel(R) Data Center GPU Max 1550", 832, 52.4),
        # Near a listed card, and another one.
        ("NVIDIA A10G", None, None),
        ("NVIDIA A1000", None, None),
        ("NVIDIA L40", None, None),
        ("NVIDIA H100", None, None),
        ("NVIDIA GB200", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("AMD Instinct MI250X / MI250", None, None),
        ("Ascend910B3", None, None),
    ],
)
def test_a_peak_is_that_of_the_very_card(card: str, bf16: float | None, fp32: float | None):
    for dtype, peak in {torch.bfloat16: bf16, torch.float32: fp32}.items():
        assert published_peak_flops(card, dtype) == (None if peak is None else pytest.approx(peak * 1e12))
    assert published_peak_flops(card, torch.float16) is None


def test_a_stack_of_a_card_has_its_share_of_the_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = pretend(XpuDevice, monkeypatch, tmp_path)
    device = XpuDevice(DeviceConfig())
    assert device.peak_flops(torch.bfloat16) is None
    fake.card = "Intel(R) Data Center GPU Max 1550"
    assert device.peak_flops(torch.bfloat16) == 416e12
    fake.properties.gpu_eu_count = 1024
    assert device.peak_flops(torch.bfloat16) == 832e12


@pytest.mark.parametrize(
    ("architecture", "fast"),
    [("gfx90a:sramecc+:xnack-", True), ("gfx942", True), ("gfx950", True), ("gfx1100", True), ("gfx1201", True)]
    + [("gfx906", False), ("gfx1030", False)],
)
def test_bf16_of_amd_cards_goes_by_the_architecture(
    architecture: str, fast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    fake = pretend(RocmDevice, monkeypatch, tmp_path)
    fake.properties.gcnArchName = architecture
    device = RocmDevice(DeviceConfig())
    assert (torch.bfloat16 in device.fast_dtypes()) is fast and device.supports(torch.bfloat16)


def test_whether_bf16_works_is_known_without_a_tensor_on_the_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A card may take one process only, and that is not the one which starts the workers."""
    fake = pretend(CudaDevice, monkeypatch, tmp_path)

    def older_card(including_emulation: bool) -> bool:
        assert not including_emulation, "torch would try it out"
        return False

    fake.is_bf16_supported = older_card
    device = CudaDevice(DeviceConfig())
    assert device.fast_dtypes() == (torch.float32,) and device.supports(torch.bfloat16)


@pytest.mark.parametrize("backend", [AscendDevice, MpsDevice])
def test_bf16_goes_by_what_the_runtime_says(backend: type[CudaDevice], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = pretend(backend, monkeypatch, tmp_path)
    assert backend(DeviceConfig()).fast_dtypes()[0] == torch.bfloat16
    fake.bf16 = False
    device = backend(DeviceConfig())
    assert device.fast_dtypes() == (torch.float32,) and not device.supports(torch.bfloat16)


def test_fp32_is_fp32_and_the_same_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(CudaDevice, monkeypatch, tmp_path)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cudnn.allow_tf32 = True
    CudaDevice(DeviceConfig(deterministic=False)).activate(0)
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    CudaDevice(DeviceConfig()).activate(0)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    CudaDevice(DeviceConfig()).activate(0)
    assert CudaDevice(DeviceConfig()).variables()["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder)",
    ],
)
def test_the_driver_s_version_is_read_from_the_kernel(line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr("train.devices.cuda.Path", lambda name: tmp_path / "version")
    assert CudaDevice(DeviceConfig()).versions()["driver"] == "550.54.15"
    assert text_version("driver", tmp_path / "absent", ".*") == {}


def test_cann_s_version_is_found_in_either_of_its_files(tmp_path: Path):
    assert cann_version({}) == cann_version({"ASCEND_HOME_PATH": str(tmp_path)}) == {}
    (tmp_path / "version.cfg").write_text("# version: 1.0\nruntime_running_version=[7.3.0.1.231:8.0.RC3]\n")
    assert cann_version({"ASCEND_HOME_PATH": str(tmp_path)}) == {"cann": "8.0.RC3"}
    (tmp_path / "x86_64-linux").mkdir()
    info = "package_name=Ascend-cann-toolkit\nversion=8.2.RC1\ninnerversion=V100R001\n"
    (tmp_path / "x86_64-linux/ascend_toolkit_install.info").write_text(info)
    assert cann_version({"ASCEND_TOOLKIT_HOME": str(tmp_path)}) == {"cann": "8.2.RC1"}


def test_ascend_is_not_there_where_its_software_is_not_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(AscendDevice, monkeypatch, tmp_path)
    device = AscendDevice(DeviceConfig())
    assert device.availability().ok

    monkeypatch.setattr(ascend, "version", lambda name: "2.12.0.post1")
    assert "torch_npu 2.12.0.post1 does not match torch" in device.availability().reason
    monkeypatch.setattr(ascend, "version", lambda name: torch.__version__.partition("+")[0])

    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert "ASCEND_HOME_PATH is not set; source CANN's set_env.sh" in device.availability().reason
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))

    monkeypatch.setitem(sys.modules, "torch_npu.contrib.transfer_to_npu", ModuleType("transfer_to_npu"))
    assert "rewrites torch.cuda for every library" in device.availability().reason


def test_collectives_that_a_package_of_their_own_brings_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(HpuDevice, monkeypatch, tmp_path)
    device, package = HpuDevice(DeviceConfig()), "habana_frameworks.torch.distributed.hccl"
    device.check(2, Precision.auto)
    monkeypatch.setitem(sys.modules, package, None)  # cannot be imported
    device.check(1, Precision.auto)
    with pytest.raises(DeviceError, match=f"nproc: 2 processes, but {package} does not load"):
        device.check(2, Precision.auto)
    with pytest.raises(DeviceError, match=f"device=hpu: {package} does not load"):
        device.activate(0)


def test_a_peak_of_ones_own_wins_for_bf16_alone():
    device = CpuDevice(DeviceConfig(peak_tflops=2.5))
    assert device.peak_flops(torch.bfloat16) == 2.5e12
    assert device.peak_flops(torch.float32) is None


@pytest.mark.skipif(sys.platform != "linux", reason="what a process was forked from counts on Linux only")
def test_a_processs_peak_is_not_that_of_its_parent():
    """getrusage would say of a small worker what its large parent held."""
    held = torch.ones(600 * 2**20, dtype=torch.uint8)
    code = "from train.devices.cpu import _peak_resident_bytes as peak; print(peak())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < held.nbytes < _peak_resident_bytes()
