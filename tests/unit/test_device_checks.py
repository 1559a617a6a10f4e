"""What a device refuses before anything slow starts, and what `device=auto` takes."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from configs.compose import compose
from configs.errors import CrosstuneError, DeviceError
from configs.schema.device import DeviceConfig
from configs.schema.model import Precision
from launchers.accelerator import check_processes, device_of_one
from tests.contracts.fake_runtime import pretend
from train.checkpoint.rng import rng_states, set_rng_states
from train.devices.accelerator import UNLOADABLE
from train.devices.ascend import AscendDevice
from train.devices.auto import ORDER, AutoDevice, _say_once
from train.devices.base import Device
from train.devices.cpu import CpuDevice
from train.devices.cuda import CudaDevice
from train.devices.rocm import RocmDevice
from train.devices.table import MluDevice, MpsDevice, MusaDevice, SdaaDevice
from train.devices.xpu import XpuDevice
from train.evaluate.models import compute_dtype


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    environment = dict(os.environ)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    _say_once.cache_clear()
    yield
    os.environ.clear()
    os.environ.update(environment)
    if UNLOADABLE.pop("torch_mlu", None):
        del sys.modules["torch_mlu"]


VISIBLE: list[tuple[type[Device], dict[str, str], int, str | None]] = [
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": "1, 0"}, 2, None),
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": "GPU-8f2a1c,MIG-3/1/0"}, 2, None),
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": "0,7"}, 1, "'0,7' names 2 cards, but the runtime finds 1 of them"),
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": "0, 0"}, 0, "'0, 0' names 0 twice"),
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": "gpu0"}, 2, "'gpu0': 'gpu0' names no card, and what follows it is not read"),
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": ""}, 0, "'' hides every card"),
    (CudaDevice, {"CUDA_VISIBLE_DEVICES": "-1"}, 0, "'-1' hides every card"),
    (AscendDevice, {"ASCEND_RT_VISIBLE_DEVICES": "0,1"}, 2, None),
    (AscendDevice, {"ASCEND_RT_VISIBLE_DEVICES": "0,9"}, 1, "'0,9' names 2 NPUs, but the runtime finds 1 of them"),
    (AscendDevice, {"ASCEND_RT_VISIBLE_DEVICES": "0, 1"}, 1, "'0, 1': ' 1' names no NPU"),
    (AscendDevice, {"ASCEND_RT_VISIBLE_DEVICES": "0-1"}, 1, "'0-1': '0-1' names no NPU"),
    (RocmDevice, {"HIP_VISIBLE_DEVICES": "0,1", "ROCR_VISIBLE_DEVICES": "0,1,2,3"}, 2, None),
    (RocmDevice, {"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, 3, "'0,1,2,3' names 4 cards, but the runtime finds 3"),
    (RocmDevice, {"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, 1, "means the same here, is '0'"),
    (XpuDevice, {"ZE_AFFINITY_MASK": "0.1,1.0"}, 2, None),
    (XpuDevice, {"ZE_AFFINITY_MASK": "0.0,0.1"}, 1, None),
    (XpuDevice, {"ZE_AFFINITY_MASK": "0.0,3.1"}, 1, "'0.0,3.1' names 2 cards, but the runtime finds 1"),
    (XpuDevice, {"ZE_AFFINITY_MASK": "0:1"}, 1, "'0:1' names no card"),
    (MluDevice, {"MLU_VISIBLE_DEVICES": "0,1,2"}, 2, "names 3 cards, but the runtime finds 2"),
]


@pytest.mark.parametrize(("backend", "variables", "counted", "problem"), VISIBLE)
def test_a_visible_devices_variable_that_names_what_is_not_there(
    backend: type[Device],
    variables: dict[str, str],
    counted: int,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    pretend(backend, monkeypatch, tmp_path, cards=counted)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device = backend(DeviceConfig())
    if problem is None:
        device.check(1, Precision.auto)
    elif counted and backend is not AscendDevice:
        with pytest.raises(DeviceError) as raised:
            device.check(counted, Precision.auto)
        assert problem in str(raised.value) and device.lister in str(raised.value)  # type: ignore[attr-defined]
    else:
        problems = [f"{name}: {text}" for name, text in device.visible_problems(counted)]  # type: ignore[attr-defined]
        assert problem in "; ".join(problems)
        if backend is CudaDevice:
            assert problems[0] in device.availability().reason


def test_every_fault_is_shown_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = pretend(MusaDevice, monkeypatch, tmp_path)
    monkeypatch.setattr(MusaDevice, "supports", lambda self, dtype: dtype == torch.float32)
    monkeypatch.setattr(dist, "is_backend_available", lambda name: False)
    cfg = compose(
        "train",
        ["model.path=m", "dataset.path=d", "device=musa", "nproc=3", "sharding=zero3", "model.precision=bf16"],
    )
    with pytest.raises(CrosstuneError) as raised:
        check_processes(cfg)
    message = str(raised.value)
    assert "nproc: 3 processes, but 2 musa devices are visible" in message
    assert "has no mccl collectives" in message
    assert "model.precision: bf16 does not work on device musa here" in message and "fp32, auto" in message
    assert "sharding: ZeRO stage 3, but DeepSpeed has no class for device=musa" in message
    assert os.environ["DS_ACCELERATOR"] == "cpu" and "set_device" not in fake.calls


def test_a_run_that_began_in_bf16_does_not_go_on_where_that_does_not_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    fake = pretend(MluDevice, monkeypatch, tmp_path)
    fake.bf16 = False
    cfg = compose("train", ["model.path=m", "dataset.path=d", "device=mlu"])
    check_processes(cfg)
    with pytest.raises(DeviceError, match="bf16 does not work on device mlu here"):
        check_processes(cfg, began_in="bf16")
    whole = compose("run", ["model.path=m", "dataset.path=d", "device=mlu", "eval.precision=bf16"])
    with pytest.raises(DeviceError, match="eval.precision: bf16 does not work on device mlu here"):
        check_processes(whole)  # before it trains


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "4 processes, but 2 mlu devices"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "2"}, "3 processes, but 2 mlu devices"),
        ({"WORLD_SIZE": "8", "LOCAL_RANK": "1"}, None),
    ],
)
def test_a_worker_of_an_outer_launcher_looks_at_its_own_machine(
    variables: dict[str, str], found: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pretend(MluDevice, monkeypatch, tmp_path)
    os.environ.update(variables)
    cfg = compose("train", ["model.path=m", "dataset.path=d", "device=mlu"])
    if found is None:
        check_processes(cfg)
    else:
        with pytest.raises(DeviceError, match=found):
            check_processes(cfg)


def test_a_process_that_is_shown_one_device_takes_it_whatever_its_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As under srun; a worker of torchrun sees what the others see, and would share it with them."""
    fake = pretend(MluDevice, monkeypatch, tmp_path, cards=1)
    os.environ.update({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"})
    cfg = compose("train", ["model.path=m", "dataset.path=d", "device=mlu"])
    check_processes(cfg)
    device = MluDevice(DeviceConfig())
    device.activate(3)
    assert device.index == fake.current == 0
    os.environ["TORCHELASTIC_RUN_ID"] = "none"
    with pytest.raises(DeviceError, match="4 processes, but 1 mlu devices are visible"):
        check_processes(cfg)
    with pytest.raises(DeviceError, match="process 3 of this machine has no card"):
        device.activate(3)


def test_evaluation_looks_before_it_loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(CudaDevice, monkeypatch, tmp_path, cards=1)
    cfg = compose("eval", ["run_dir=r", "device=cuda"]).device
    assert device_of_one(cfg).name == "cuda" and os.environ["DS_ACCELERATOR"] == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(DeviceError, match="names 2 cards"):
        device_of_one(cfg)


def test_evaluation_of_bf16_weights_where_bf16_does_not_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = pretend(MluDevice, monkeypatch, tmp_path)
    assert compute_dtype(torch.bfloat16, MluDevice(DeviceConfig())) == torch.bfloat16
    fake.bf16 = False
    assert compute_dtype(torch.bfloat16, MluDevice(DeviceConfig())) == torch.float32
    with pytest.raises(DeviceError, match=r"eval\.precision: bf16 does not work on device mlu"):
        compute_dtype(torch.bfloat16, MluDevice(DeviceConfig()), Precision.bf16)


def test_evaluation_on_a_cpu_is_in_fp32_unless_asked_otherwise():
    cpu = CpuDevice(DeviceConfig())
    assert compute_dtype(torch.bfloat16, cpu) == compute_dtype(torch.bfloat16, cpu, Precision.fp32) == torch.float32
    assert compute_dtype(torch.float32, cpu, Precision.bf16) == torch.bfloat16


def test_a_build_for_the_other_maker_says_which_device_it_has(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert CudaDevice(DeviceConfig()).availability().reason.endswith("is a ROCm build: device=rocm")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert RocmDevice(DeviceConfig()).availability().reason.endswith("is a CUDA build: device=cuda")


def test_processes_without_collectives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pretend(XpuDevice, monkeypatch, tmp_path)
    monkeypatch.setattr(dist, "is_backend_available", lambda name: name != "xccl")
    with pytest.raises(DeviceError, match="2 processes, but torch .* has no xccl collectives"):
        XpuDevice(DeviceConfig()).check(2, Precision.auto)
    pretend(MpsDevice, monkeypatch, tmp_path, cards=1)
    with pytest.raises(DeviceError, match="2 processes, but device=mps has no collectives"):
        MpsDevice(DeviceConfig()).check(2, Precision.auto)


def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that half loads: it has put itself into torch before its library is missed."""
    package = tmp_path / "torch_mlu"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch, types\nimport torch_mlu.inner\ntorch.mlu = types.ModuleType('mlu')\n"
        "raise OSError('libcnrt.so: cannot open shared object file\\nand a second line')\n"
    )
    (package / "inner.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_plugin_that_does_not_load_is_a_reason_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    broken(tmp_path, monkeypatch)
    with caplog.at_level("INFO"):
        taken = AutoDevice(DeviceConfig())
    assert taken.name == next(b for b in ORDER if b(DeviceConfig()).availability().ok).name != "mlu"
    assert "mlu: torch_mlu does not load (OSError: libcnrt.so: cannot open shared object file)" in caplog.text
    assert "second line" not in caplog.text
    # None counts as not installed: transformers and accelerate would import it again, and fail with it.
    assert not hasattr(torch, "mlu") and "torch_mlu.inner" not in sys.modules and sys.modules["torch_mlu"] is None
    assert importlib.util.find_spec("torch_mlu") is None
    taken.activate(0)
    taken.seed(3)


def test_a_plugin_that_loads_but_is_broken_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    fake = pretend(MluDevice, monkeypatch, tmp_path)
    del fake.is_available
    with caplog.at_level("INFO"):
        assert AutoDevice(DeviceConfig()).name != "mlu"
    assert "mlu: no card is visible; is_available" in caplog.text


def test_a_plugin_that_fails_with_torch_changed_for_good_stops_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken(tmp_path, monkeypatch)
    names = iter(["privateuseone", "mlu"])  # as if the plugin had registered itself with torch
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: next(names))
    with pytest.raises(DeviceError, match="torch_mlu: failed while it loaded, and has changed torch already") as raised:
        AutoDevice(DeviceConfig())
    assert "libcnrt.so" in str(raised.value) and "device=cpu" in str(raised.value)
    for name in ("torch_mlu", "torch_mlu.inner"):
        sys.modules.pop(name, None)
    delattr(torch, "mlu")


def test_auto_imports_no_plugin_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def never(plugin: str, torch_type: str) -> str | None:
        raise AssertionError(f"{plugin} is imported")

    monkeypatch.setattr("train.devices.accelerator.load_plugin", never)
    monkeypatch.setitem(sys.modules, "torch_npu", None)  # counts as not installed
    with caplog.at_level("INFO"):
        AutoDevice(DeviceConfig())
    named = caplog.text.partition("not installed: ")[2]
    plugins = {plugin for backend in ORDER if (plugin := getattr(backend, "plugin", None))}
    assert len(plugins) == 6 and all(plugin in named for plugin in plugins)


def test_auto_takes_a_plugin_before_torch_s_own_devices(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pretend(SdaaDevice, monkeypatch, tmp_path)
    pretend(CudaDevice, monkeypatch, tmp_path)
    with caplog.at_level("INFO"):
        assert AutoDevice(DeviceConfig()).name == "sdaa"
    assert "2 x Tecorigin sdaa; not run by crosstune's makers; not installed: torch_mlu" in caplog.text
    monkeypatch.setitem(sys.modules, "torch_sdaa", None)
    assert AutoDevice(DeviceConfig()).name == "cuda"


def test_a_plugin_without_a_function_of_its_row_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake = pretend(MluDevice, monkeypatch, tmp_path)
    del fake.is_bf16_supported
    with pytest.raises(DeviceError, match="torch_mlu has no is_bf16_supported"):
        MluDevice(DeviceConfig()).fast_dtypes()


def test_a_generator_of_another_kind_of_device_does_not_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Their states have the same size on some kinds, and mean something else."""
    fake = pretend(MluDevice, monkeypatch, tmp_path)
    mlu = MluDevice(DeviceConfig())
    mlu.seed(3)
    states = rng_states(mlu)
    drawn = torch.rand(3, generator=fake.generator), torch.rand(3)
    set_rng_states(states, mlu, otherwise=7)
    assert torch.equal(drawn[0], torch.rand(3, generator=fake.generator)) and torch.equal(drawn[1], torch.rand(3))

    other = pretend(SdaaDevice, monkeypatch, tmp_path)
    set_rng_states(states, SdaaDevice(DeviceConfig()), otherwise=7)
    started = torch.rand(3, generator=other.generator)
    assert torch.equal(started, torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(drawn[1], torch.rand(3))  # the host's goes on all the same
