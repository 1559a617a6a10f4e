"""The stand-in for Ascend: every knob, every refusal, and its cache."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.errors import CrosstuneError, DeviceError, RunFailedError, StorageError
from configs.schema.doctor import StandinConfig
from launchers.doctor.standin import build as building
from launchers.doctor.standin import compile, wheel
from tests.standin import StandinKit

PRELUDE = """
import os, re, threading, time
import torch
import torch.distributed as dist

def raised(error, pattern, call):
    try:
        call()
    except error as e:
        assert re.search(pattern, str(e)), str(e)
    else:
        raise AssertionError(f"nothing raised; expected {pattern}")
"""


def passes(standin: StandinKit, script: str, **knobs: object) -> str:
    """Output of a Python script, which must end well."""
    done = standin.run([sys.executable, "-c", PRELUDE + script], **knobs)
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- one process

ONE_PROCESS = """
# What users set stays theirs, and still nothing is queued.
assert os.environ["TASK_QUEUE_ENABLE"] == "2" and torch.npu.get_task_queue_enable() == 0
assert os.environ["OMP_NUM_THREADS"] == "1" and "DS_ACCELERATOR" not in os.environ
assert torch.npu.device_count() == 3 and torch.npu.get_device_name(2) == "Ascend910B3" and torch.npu.is_bf16_supported()

# Values and gradients are the CPU's; memory is torch_npu's.
x = torch.randn(4, 4)
for dtype in (torch.float32, torch.bfloat16):
    ours, theirs = (x.to(d, dtype, copy=True).requires_grad_() for d in ("npu", "cpu"))
    for tensor in (ours, theirs):
        q = tensor.view(1, 2, 2, 4)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).square().mean().backward()
    assert ours.grad.device.type == "npu" and ours.grad.norm() > 0
    assert (ours.grad.cpu() - theirs.grad).abs().max() < theirs.grad.abs().max() * 10 * torch.finfo(dtype).eps
y = torch.arange(6.0, device="npu:1").view(2, 3)
view = y.t()[1:]
view += 10
assert y.tolist() == [[0, 11, 12], [3, 14, 15]] and view.data_ptr() == y.data_ptr() + 4
out = torch.empty(0, device="npu:1")
torch.add(y, 1, out=out)
assert out.device == y.device and out.tolist() == (y + 1).tolist()
assert (torch.fft.fft(x.npu()).abs().cpu() - torch.fft.fft(x).abs()).abs().max() < 1e-5
# As on a card: no cast to fp64, while transformers counts its experts' tokens as int32.
assert x.npu().double().dtype == torch.float32 and x.double().npu().dtype == torch.float64
assert torch.histc(torch.tensor([0, 1, 1, 3], device="npu").int(), bins=4, min=0, max=3).tolist() == [1, 2, 0, 1]
lists = [torch.zeros(4, 4)], [x.npu()]
torch._foreach_copy_(*lists)
assert torch.equal(lists[0][0], x)

# Random numbers come from the NPU's generator alone.
host = torch.get_rng_state()
state = torch.npu.get_rng_state()
first = torch.rand(3, device="npu")
torch.npu.set_rng_state(state)
assert torch.equal(first, torch.rand(3, device="npu")) and not torch.equal(first, torch.rand(3, device="npu"))
def draw():
    for _ in range(100):
        torch.nn.functional.dropout(torch.ones(50, device="npu"))
threads = [threading.Thread(target=draw) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert torch.equal(host, torch.get_rng_state())

# Devices do not mix, but numbers and indices may come from the host.
raised(RuntimeError, "at least two devices, npu:0 and cpu", lambda: torch.ones(2, device="npu") + torch.ones(2))
raised(RuntimeError, "npu:0 and npu:1", lambda: torch.ones(2, device="npu") + torch.ones(2, device="npu:1"))
raised(RuntimeError, "npu:1 and npu:0", lambda: torch.ones(2, device="npu:1") + torch.tensor(1.0, device="npu:0"))
raised(RuntimeError, "npu:0 and cpu", lambda: torch.nn.functional.embedding(torch.tensor([0]), x.npu()))
assert (torch.ones(2, device="npu") + torch.tensor(1.0))[torch.tensor([0])].item() == 2

# Out of memory where a card is, and what is freed can be had again.
def fill():
    kept = [torch.empty(8 << 20, dtype=torch.uint8, device="npu") for _ in range(100)]
for _ in range(2):
    raised(torch.OutOfMemoryError, "NPU out of memory. Tried to allocate .*64.00 MiB total", fill)
    torch.npu.empty_cache()
raised(torch.OutOfMemoryError, "NPU out of memory", lambda: torch.zeros(65 << 20, dtype=torch.uint8, device="npu"))
big = torch.ones(9 << 20, dtype=torch.uint8, device="npu")
raised(torch.OutOfMemoryError, "NPU out of memory", lambda: big.float() + 1)
assert torch.npu.memory_allocated() < 10 << 20 and torch.npu.mem_get_info()[1] == 64 << 20
torch.ones(20 << 20, dtype=torch.uint8, device="npu:1")  # another device's memory

# Operators without a kernel: all overloads of a name, or one.
raised(NotImplementedError, "Could not run 'aten::cumsum' with arguments from the 'PrivateUse1'",
       lambda: x.npu().cumsum(0))
raised(NotImplementedError, "Could not run 'aten::sum.dim_IntList'", lambda: x.npu().sum(0))
x.npu().sum()
raised(NotImplementedError, "Could not run 'aten::linear'", lambda: torch.nn.Linear(4, 4).npu()(x.npu()))
raised(NotImplementedError, "Could not run 'npu::npu_swiglu'", lambda: torch.ops.npu.npu_swiglu(x.npu()))

# A fused operator is one operator.
torch.ops.npu.npu_rms_norm(x.npu(), torch.ones(4, device="npu"))

# One that torch_npu leaves to the CPU.
assert torch.equal(torch.special.i0e(x.npu()).cpu(), torch.special.i0e(x))
"""


@pytest.mark.parametrize("allocator", ["max_split_size_mb:64", "expandable_segments:True"])
def test_a_process_on_the_pretended_device(
    standin: StandinKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocator: str
) -> None:
    """Values, memory, refusals; with both ways in which torch_npu allocates."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # other tests activate devices in this process
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "2")
    monkeypatch.setenv("PYTORCH_NPU_ALLOC_CONF", allocator)
    said = passes(
        standin,
        ONE_PROCESS,
        devices=3,
        hbm_mib=64,
        unsupported=["cumsum", "aten::sum.dim_IntList", "linear", "npu::npu_swiglu"],
        report=str(tmp_path),
    )
    assert "CAUTION: The operator 'aten::special_i0e.out' is not currently supported on the NPU backend" in said
    (report,) = (json.loads(path.read_text()) for path in tmp_path.iterdir())
    assert report["cautions"] == ["aten::special_i0e.out"] and report["devices"] == ["Ascend910B3"] * 3
    assert report["operators"]["aten::bmm"]["count"] > 1
    assert {"float32", "bfloat16"} <= set(report["operators"]["aten::mean"]["dtypes"])
    assert report["operators"]["npu::npu_rms_norm"] == {"count": 1, "dtypes": ["float32"]}
    assert "aten::rsqrt" not in report["operators"]
    # `zeros` is one kernel on a card, whatever it is made of here.
    assert "aten::zeros" in report["operators"] and "aten::zero_" not in report["operators"]


CHIPS = """
# torch_npu asks for chip and devices on first use: one import serves several machines.
for soc, devices in (("Ascend910PremiumA", 1), ("Ascend310P3", 3), ("Ascend910B3", 0)):
    child = os.fork()
    if child == 0:
        os.environ |= {"CROSSTUNE_STANDIN_SOC": soc, "CROSSTUNE_STANDIN_DEVICES": str(devices)}
        assert torch.npu.device_count() == devices and torch.npu.is_available() is (devices > 0)
        if devices:
            assert not torch.npu.is_bf16_supported() and torch.npu.get_device_name(0) == soc
        else:
            raised(RuntimeError, "No NPUs are available", lambda: torch.ones(1, device="npu"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, soc
"""


def test_chips_without_bf16_and_a_machine_without_devices(standin: StandinKit) -> None:
    passes(standin, CHIPS)


@pytest.mark.parametrize(
    ("machine", "listed", "count"),
    [
        (4, None, 4), (4, "2", 1), (4, "3,0,1", 3), (4, "", 0), (4, "0,4,1", 1), (4, "0,-1,1", 1), (4, "0,x,1", 1),
        (4, "1x,0", 0), (0, "0", 0), (2, "0,1,2,3", 2),
    ],
)  # fmt: skip
def test_visible_devices(standin: StandinKit, machine: int, listed: str | None, count: int) -> None:
    """The first entry of the list that is not there ends it."""
    script = (
        "import ctypes, sys; n = ctypes.c_uint32(); ctypes.CDLL('libascendcl.so').aclrtGetDeviceCount(ctypes.byref(n))"
    )
    environment = standin.environment(devices=machine)
    environment.pop("ASCEND_RT_VISIBLE_DEVICES", None)
    if listed is not None:
        environment["ASCEND_RT_VISIBLE_DEVICES"] = listed
    done = subprocess.run([sys.executable, "-c", f"{script}; sys.exit(n.value)"], env=environment)
    assert done.returncode == count


# ---- two processes

TWO_RANKS = """
rank = int(os.environ["RANK"])
torch.npu.set_device(rank)
dist.init_process_group("hccl", init_method="file://" + os.environ["MEETING"], rank=rank, world_size=2)
npu = lambda *values, dtype=torch.float32: torch.tensor(values, dtype=dtype, device="npu")
assert dist.get_backend() == "hccl"

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.uint8):
    x = npu(rank + 1, 2, dtype=dtype)
    dist.all_reduce(x)
    assert x.tolist() == [3, 4] and x.device.index == rank, (dtype, x)
x = npu(rank, 3)
dist.all_reduce(x, op=dist.ReduceOp.AVG)
assert x.tolist() == [0.5, 3]
flag = npu(rank == 1, dtype=torch.bool)
dist.all_reduce(flag)
assert flag.item()
x = npu(rank, dtype=torch.float64)
dist.broadcast(x, 1)
assert x.item() == 1
whole = torch.empty(4, device="npu")
dist.all_gather_into_tensor(whole, npu(rank, rank + 10))
assert whole.tolist() == [0, 10, 1, 11]
part = torch.empty(2, device="npu")
for _ in range(2):
    dist.reduce_scatter_tensor(part, whole.clone(), op=dist.ReduceOp.AVG)
    assert part.tolist() == [[0, 10], [1, 11]][rank], part
work = dist.all_reduce(part, async_op=True)
work.wait(), work.wait()
assert part.tolist() == [1, 21]
x = npu(rank + 1, dtype=torch.uint8)
work = dist.all_reduce(x, async_op=True)
while not work.is_completed():
    time.sleep(0.001)
assert work.is_success() and x.item() == 3, "who asks need not wait"
swapped = torch.empty(2, device="npu")
dist.all_to_all_single(swapped, npu(rank * 2, rank * 2 + 1))
assert swapped.tolist() == [rank, rank + 2]
lists = [torch.empty(1, device="npu") for _ in range(2)]
dist.all_gather(lists, npu(rank))
assert [t.item() for t in lists] == [0, 1]

alone = [dist.new_group([r]) for r in range(2)][rank]
x = npu(5)
dist.all_reduce(x, group=alone)
assert x.item() == 5
beside = dist.new_group(backend="gloo")
x = torch.tensor([rank + 1.0], dtype=torch.float64)
dist.all_reduce(x, group=beside)
assert x.item() == 3
names = [None, None]
dist.all_gather_object(names, f"rank {rank}", group=beside)
assert names == ["rank 0", "rank 1"]

# What HCCL refuses and gloo would take; nothing is sent, so the ranks stay in step.
reduce, Op = dist.all_reduce, dist.ReduceOp
double, wide = npu(1, dtype=torch.float64), torch.ones(4, 4, device="npu")
raised(RuntimeError, "No backend type associated with device type cpu", lambda: reduce(torch.ones(2)))
raised(RuntimeError, "Tensors must be NPU and dense", lambda: dist.all_gather([torch.ones(1)] * 2, npu(1)))
raised(RuntimeError, "must be contiguous", lambda: reduce(wide[:, :2]))
raised(RuntimeError, "HCCL allreduce: Unsupported data type at::kDouble", lambda: reduce(double))
raised(RuntimeError, "Unsupported data type for HCCL", lambda: dist.broadcast(npu(1, dtype=torch.uint16), 0))
raised(RuntimeError, "Cannot use ReduceOp.BAND with HCCL", lambda: reduce(npu(1, dtype=torch.int32), op=Op.BAND))
raised(RuntimeError, "_reduce_scatter_base: Unsupported data type at::kByte",
       lambda: dist.reduce_scatter_tensor(npu(0, dtype=torch.uint8), npu(1, 2, dtype=torch.uint8)))

started = time.monotonic()
dist.barrier()
assert time.monotonic() - started > 0.25, "rank 0 waits for the slow rank"
dist.destroy_process_group()
"""


def ranks(standin: StandinKit, script: str, folder: Path, **knobs: object) -> list[subprocess.CompletedProcess[str]]:
    """Two processes with the ranks 0 and 1."""
    base = standin.environment(**knobs) | {"MEETING": str(folder / "meeting")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script],
            env=base | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0] for process in started]
    return [
        subprocess.CompletedProcess([], process.returncode, out) for process, out in zip(started, said, strict=True)
    ]


@pytest.mark.distributed
def test_collectives(standin: StandinKit, tmp_path: Path) -> None:
    """Right values, subgroups, gloo beside, HCCL's refusals, and a slow rank."""
    report = tmp_path / "report"
    for done in ranks(standin, TWO_RANKS, tmp_path, slow="1:300", report=str(report)):
        assert done.returncode == 0, done.stdout
    reports = sorted((json.loads(path.read_text()) for path in report.iterdir()), key=lambda each: each["rank"])
    assert [each["rank"] for each in reports] == [0, 1]
    assert reports[0]["collectives"]["_reduce_scatter_base"] == 3 and reports[0]["collectives"]["barrier"] == 1


@pytest.mark.distributed
def test_a_rank_dies_in_its_collective(standin: StandinKit, tmp_path: Path) -> None:
    script = """
rank = int(os.environ["RANK"])
dist.init_process_group("hccl", init_method="file://" + os.environ["MEETING"], rank=rank, world_size=2)
for step in range(5):
    print("step", step, flush=True)
    dist.all_reduce(torch.ones(1, device=f"npu:{rank}"))
"""
    left, died = ranks(standin, script, tmp_path, die="1:3")
    assert died.returncode == -signal.SIGKILL and "step 2" in died.stdout and "step 3" not in died.stdout
    assert left.returncode == 1 and "by peer" in left.stdout, left.stdout


# ---- the command


def test_the_command_runs_a_program(standin: StandinKit, tmp_path: Path) -> None:
    """Its output, its exit code and its signals are the program's; `crosstune` and `python` are these."""
    command = [sys.executable, "-P", "-m", "launchers.cli", "doctor", "ascend-standin", "devices=3"]
    place = [f"build={root}"] if (root := os.environ.get(building.MARK)) else []

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *place, *words], capture_output=True, text=True, cwd=tmp_path)

    script = "import os, torch; print(torch.npu.device_count(), os.environ.get('HF_HUB_OFFLINE')); os._exit(7)"
    done = run("--", "python", "-c", script)
    # The program's output alone, and the user's environment as it is: crosstune itself sets that variable.
    assert (done.returncode, done.stdout) == (7, f"3 {os.environ.get('HF_HUB_OFFLINE')}\n"), done.stderr
    assert run("--", "sh", "-c", "kill -9 $$").returncode == 128 + 9
    assert "usage: crosstune COMMAND" in run("--", "crosstune", "--help").stdout
    missing = run("--", "no-such-program")
    assert missing.returncode == 2 and "'no-such-program' cannot be run" in missing.stderr
    unwritable = run("report=/proc/none", "--", "python", "-c", "")
    assert unwritable.returncode == 2 and "report: '/proc/none' cannot be made" in unwritable.stderr
    unknown = run("unsupported=[aten::sorted]", "--", "python", "-c", "import torch")
    assert unknown.returncode == 2 and "PyTorch has no operator 'aten::sorted'" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    assert json.loads(run("--json").stdout)["versions"]["torch_npu"] == wheel.VERSION

    waiting = "trap 'echo stopped; exit 5' TERM; echo ready; while :; do sleep 0.05; done"
    process = subprocess.Popen([*command, *place, "--", "sh", "-c", waiting], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "stopped\n" and process.returncode == 5


def test_the_libraries_hold_what_the_wheel_asks_for(standin: StandinKit) -> None:
    """Also those that it looks up by name in a library that is empty here."""
    library = ctypes.CDLL(str(standin.built.folder / "cann/lib64/libascendcl.so"))
    for name in ("aclrtMalloc", "aclGetCompileopt", "MsprofReportApi", "rtKernelLaunch", "aclmdlInitDump"):
        assert hasattr(library, name)


# ---- the cache; nothing is compiled or fetched

PROVE = building.prove


@pytest.fixture
def no_compiler_needed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that a build takes, none of which does anything slow."""
    steps: list[str] = []

    def fetch(folder: Path, source: str | None) -> None:
        steps.append("fetch")
        (folder / wheel.LIBRARY).parent.mkdir(parents=True)
        (folder / wheel.LIBRARY).touch()

    def compile_all(folder: Path, library: Path) -> None:
        steps.append("compile")
        assert library.is_file()
        (folder / "cann").mkdir()

    monkeypatch.setattr(wheel, "fetch", fetch)
    monkeypatch.setattr(compile, "compile_all", compile_all)
    monkeypatch.setattr(compile, "check_tools", lambda: None)
    monkeypatch.setattr(building, "prove", lambda standin: None)
    monkeypatch.setattr(compile, "compiler_version", lambda: "12.2.0")
    return steps


def test_a_second_build_does_nothing(no_compiler_needed: list[str], tmp_path: Path) -> None:
    cfg = StandinConfig(build=str(tmp_path))
    first = building.build(cfg)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    started = time.monotonic()
    second = building.build(cfg)
    assert time.monotonic() - started < 0.5
    assert second.folder == first.folder and second.build_seconds == 0 and no_compiler_needed == ["fetch", "compile"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_changed_source_is_another_build(
    no_compiler_needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = shutil.copytree(compile.SOURCES, tmp_path / "sources")
    monkeypatch.setattr(compile, "SOURCES", sources)
    cfg = StandinConfig(build=str(tmp_path / "built"))
    folders = [building.build(cfg).folder]
    for change in ("cann/memory.c", "overlay/overlay.h"):
        (sources / change).write_text("// changed")
        folders.append(building.build(cfg).folder)
    monkeypatch.setattr(compile, "compiler_version", lambda: "14.1.0")
    folders.append(building.build(cfg).folder)
    monkeypatch.setattr(compile, "RECIPE", b"other flags")
    folders.append(building.build(cfg).folder)
    (sources / "inside/fused_operators.py").write_text("# read where it stands")
    assert building.build(cfg).folder == folders[-1]
    assert len(set(folders)) == 5 and no_compiler_needed.count("fetch") == 1


def test_sources_that_change_while_they_are_compiled(
    no_compiler_needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was compiled is then neither the one nor the other."""
    monkeypatch.setattr(compile, "compile_all", lambda *_: monkeypatch.setattr(compile, "RECIPE", b"edited"))
    with pytest.raises(RunFailedError, match="changed while they were compiled"):
        building.build(StandinConfig(build=str(tmp_path)))
    assert not list(tmp_path.rglob(building.MANIFEST))


def test_a_build_that_does_not_load_is_no_build(
    standin: StandinKit, no_compiler_needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "prove", PROVE)

    def compile_all(folder: Path, library: Path) -> None:
        shutil.copytree(standin.built.folder / "cann", folder / "cann")
        (folder / compile.OVERLAY).write_bytes(b"half a library")

    monkeypatch.setattr(compile, "compile_all", compile_all)
    monkeypatch.setattr(
        wheel, "fetch", lambda folder, source: (folder / "torch_npu").symlink_to(standin.built.site / "torch_npu")
    )
    with pytest.raises(RunFailedError, match="does not load: ImportError"):
        building.build(StandinConfig(build=str(tmp_path)))
    assert not list(tmp_path.rglob(building.MANIFEST))


def test_a_folder_that_somebody_emptied_is_filled_again(no_compiler_needed: list[str], tmp_path: Path) -> None:
    cfg = StandinConfig(build=str(tmp_path))
    built = building.build(cfg)
    (built.site / wheel.LIBRARY).unlink()
    (built.folder / building.MANIFEST).unlink()
    again = building.build(cfg)
    assert (again.site / wheel.LIBRARY).is_file() and (again.folder / building.MANIFEST).is_file()
    assert no_compiler_needed == ["fetch", "compile"] * 2


@pytest.mark.parametrize("torn", ["fetch", "compile"])
def test_a_build_that_is_cut_off_leaves_nothing_under_its_name(
    no_compiler_needed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: str
) -> None:
    """Also one that is killed, whose temporary folder stays behind until the next."""
    module = {"fetch": wheel, "compile": compile}[torn]
    name = {"fetch": "fetch", "compile": "compile_all"}[torn]

    def cut_off(folder: Path, source: object) -> None:
        (folder / "half").touch()
        shutil.copytree(folder, tmp_path / f"{building.TEMPORARY}killed")
        raise KeyboardInterrupt

    cfg = StandinConfig(build=str(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, cut_off)
        building.build(cfg)
    assert [path.name for path in tmp_path.glob(f"{building.TEMPORARY}*")] == [f"{building.TEMPORARY}killed"]
    built = building.build(cfg)
    assert not list(tmp_path.rglob("half")) and (built.folder / building.MANIFEST).is_file()


# ---- faults


def test_missing_tools_are_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CrosstuneError) as fault:
        building.build(StandinConfig(build=str(tmp_path)))
    assert fault.value.exit_code == 2
    for tool, remedy in (("g++", "apt-get install g++"), ("gcc", "apt-get install gcc"), ("nm", "binutils")):
        assert f"{tool}: not found" in str(fault.value.render()) and remedy in fault.value.render()


def test_faults_of_the_wheel(tmp_path: Path) -> None:
    (tmp_path / "torch_npu-2.1.0-cp311.whl").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeviceError, match="not a wheel of this version"):
        wheel.fetch(tmp_path / "site", str(tmp_path / "torch_npu-2.1.0-cp311.whl"))
    with pytest.raises(DeviceError, match="there is no such file"):
        wheel.fetch(tmp_path / "site", str(tmp_path / "gone.whl"))
    with pytest.raises(DeviceError, match="pip cannot install it: .*No matching distribution"):
        wheel.fetch(tmp_path / "site", str(tmp_path / "empty"))
    assert not (tmp_path / "site").exists()
    with pytest.raises(DeviceError, match="there is no such file"):  # also where it is not needed any more
        building.build(StandinConfig(build=str(tmp_path), wheel=str(tmp_path / "gone.whl")))
    with pytest.raises(StorageError, match="separates the folders"):
        building.build(StandinConfig(build=str(tmp_path / "a:b")))


def test_another_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(building, "version", lambda name: "2.9.1")
    with pytest.raises(DeviceError, match="torch: version 2.9.1"):
        building.build(StandinConfig(build=str(tmp_path)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_compiler_that_fails(standin: StandinKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = shutil.copytree(compile.SOURCES, tmp_path / "sources")
    for unit in compile.UNITS.values():
        (sources / f"overlay/{unit[0]}.cpp").write_text('#error "of our own"\n')
    monkeypatch.setattr(compile, "SOURCES", sources)
    monkeypatch.setattr(
        wheel, "fetch", lambda folder, source: (folder / "torch_npu").symlink_to(standin.built.site / "torch_npu")
    )
    with pytest.raises(RunFailedError, match="of our own"):
        building.build(StandinConfig(build=str(tmp_path / "built")))
    assert sorted(path.name[:9] for path in (tmp_path / "built").iterdir()) == [".lock", "torch_npu"]


def test_torch_npu_is_not_installed_here() -> None:
    """Plain `import torch` would fail for everyone who has no CANN."""
    assert building.MARK in os.environ or importlib.util.find_spec("torch_npu") is None
