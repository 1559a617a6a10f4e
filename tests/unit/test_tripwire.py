"""The tripwire catches planted CUDA assumptions, each at its line, and nothing else.

That our own runs are free of them, on the CPU and on pretended NPUs: tests/integration/test_ascend_road.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.doctor.tripwire import VARIABLE, records, site_folder
from launchers.torchrun import free_port

LIBRARY = '''
"""A library: its user says nothing of CUDA."""
import torch

def tidy():
    torch.manual_seed(0)
    torch.cuda.manual_seed_all(0)  # planted: torch.cuda.manual_seed_all | silent
    return torch.zeros(1).to("cpu")

def question(function):
    return function()
'''

PROGRAM = '''
import contextlib, inspect, os, threading, warnings
import library
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")
x, layer, shown = torch.ones(2, 2, requires_grad=True), torch.nn.Linear(2, 2), {}

def attempt(name, function):
    """What a call gives, or raises, as text."""
    try:
        shown[name] = str(function())[:200]
    except Exception as error:
        shown[name] = f"{type(error).__name__}: {error}"[:200]

class Spy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        shown["backward"] = torch.cuda.max_memory_allocated()  # planted: torch.cuda.max_memory_allocated | silent
        return gradient

class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, i):
        assert torch.utils.data.get_worker_info()
        return len(torch.cuda.get_rng_state_all())  # planted: torch.cuda.get_rng_state_all | silent

@torch.jit.script
def scripted(n: int):
    return torch.zeros([n]).to(torch.float64)

# Each of these stands beside what must not be taken for it.
x.to("cpu"), x.to(torch.float64), x.to(x), x.to(device="cpu"), layer.to("cpu", torch.float32)
attempt("to 0", lambda: x.to(0))  # planted: to: integer device | raises
attempt("to cuda", lambda: layer.to("cuda:0"))  # planted: to: device "cuda" | raises
attempt("tensor.cuda", lambda: x.cuda())  # planted: .cuda() | raises
attempt("module.cuda", lambda: layer.cuda())  # planted: .cuda() | raises
torch.zeros(1, device="cpu"), torch.tensor([0]), torch.full((2,), 0), torch.arange(0, 3), scripted(2)
attempt("zeros", lambda: torch.zeros(1, device="cuda"))  # planted: zeros: device "cuda" | raises
attempt("new", lambda: x.new_ones(1, device=torch.device("cuda", 0)))  # planted: new_ones: device "cuda" | raises
attempt("synchronize", lambda: torch.cuda.synchronize())  # planted: torch.cuda.synchronize | raises
attempt("event", lambda: torch.cuda.Event(enable_timing=True))  # planted: torch.cuda.Event | raises
torch.random.initial_seed(), torch.manual_seed(1), torch.get_rng_state(), isinstance(x, torch.cuda.FloatTensor)
attempt("empty_cache", lambda: torch.cuda.empty_cache())  # planted: torch.cuda.empty_cache | silent
attempt("range", lambda: torch.cuda.nvtx.range_push("a"))  # planted: torch.cuda.nvtx.range_push | raises
with torch.autocast("cpu", dtype=torch.bfloat16):
    checkpoint(layer, x, use_reentrant=False).sum().backward()
with torch.autocast("cuda"):  # planted: autocast: device "cuda" | silent
    shown["autocast"] = torch.is_autocast_enabled("cuda")  # planted: is_autocast_enabled: device "cuda" | silent
torch.is_autocast_enabled("cpu"), torch.nn.Linear(1, 1, device="cpu"), torch.nn.Linear(1, 1).to_empty(device="meta")
attempt("made", lambda: torch.nn.Linear(1, 1, device="cuda"))  # planted: empty: device "cuda" | raises
attempt("moved", lambda: layer.to_empty(device="cuda"))  # planted: empty_like: device "cuda" | raises
attempt("scaler", lambda: torch.amp.GradScaler().get_scale())  # planted: GradScaler: device "cuda" | silent
torch.amp.GradScaler("cpu")
attempt("fork", lambda: contextlib.ExitStack().enter_context(torch.random.fork_rng()))
attempt("indirect", lambda: library.question(torch.cuda.is_bf16_supported))  # caught in library.py
attempt("nccl", lambda: dist.init_process_group("nccl"))  # planted: init_process_group: backend "nccl" | raises
dist.init_process_group("gloo")
attempt("group", lambda: dist.new_group([0], backend="cuda:nccl"))  # planted: new_group: backend "nccl" | raises
attempt("mesh", lambda: dist.init_device_mesh("cuda", (1,)).size())  # planted: init_device_mesh: device "cuda" | raises
dist.new_group([0], backend="gloo"), dist.init_device_mesh("cpu", (1,))
dist.destroy_process_group()
library.tidy()
thread = threading.Thread(target=lambda: Spy.apply(x).sum().backward())
thread.start(), thread.join()
shown["loader"] = [batch.tolist() for batch in DataLoader(Rows(), num_workers=1)]
shown["signatures"] = [str(inspect.signature(f)) for f in (torch.cuda.set_device, torch.cuda.Event, dist.new_group)]
shown["names"] = [torch.cuda.memory.empty_cache is torch.cuda.empty_cache, torch.cuda.synchronize.__name__]
import json
print("SHOWN", json.dumps(shown))
'''


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The program in a torchrun worker with the tripwire, and plainly without: (folder, records, two outputs)."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "library.py").write_text(LIBRARY)
    (folder / "program.py").write_text(PROGRAM)
    outputs = []
    for watched in (True, False):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(site_folder(folder)), str(folder)))}
        environment |= {VARIABLE: str(folder / "records.jsonl")} if watched else {}
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "1"] if watched else []
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, *launcher, str(folder / "program.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        outputs.append(json.loads(done.stdout.split("SHOWN", 1)[1]))
    return folder, records(folder / "records.jsonl"), outputs


def plants(file: Path) -> set[tuple[str, int, str, str]]:
    """(file, line, what, kind) of each line with a ``# planted: WHAT | KIND`` note."""
    noted = [(n, line.partition("# planted: ")[2]) for n, line in enumerate(file.read_text().splitlines(), 1)]
    return {(file.name, n, *note.split(" | ")) for n, note in noted if note}


def test_each_planted_assumption_is_caught_at_its_line_and_nothing_else(planted):
    folder, found, _ = planted
    got = {(Path(r["file"]).name, r["line"], r["what"], r["kind"]) for r in found if Path(r["file"]).parent == folder}
    asked = next(n for n, line in enumerate(LIBRARY.splitlines(), 1) if "return function()" in line)
    expected = plants(folder / "program.py") | plants(folder / "library.py")
    expected |= {("library.py", asked, "torch.cuda.is_bf16_supported", "silent")}
    assert len(expected) >= 10
    assert got == expected


def test_a_record_says_where_it_came_from(planted):
    folder, found, _ = planted
    (seeding,) = (r for r in found if r["what"] == "torch.cuda.manual_seed_all")
    assert [frame.rpartition("/")[2].partition(":")[0] for frame in seeding["stack"][:2]] == [
        "library.py",
        "program.py",
    ]
    assert (seeding["module"], seeding["rank"]) == ("library", 0)
    loader = next(r for r in found if r["what"] == "torch.cuda.get_rng_state_all")
    assert loader["pid"] != seeding["pid"], "of the loader's worker process"


def test_what_the_program_sees_is_the_same_with_and_without(planted):
    _, _, (watched, plain) = planted
    assert watched == plain
    assert "RuntimeError" in watched["event"] and watched["empty_cache"] == "None"


def test_without_the_variable_nothing_is_replaced(tmp_path):
    code = "import torch; print(torch.cuda.empty_cache.__code__.co_filename, torch.zeros.__class__.__name__)"
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    environment["PYTHONPATH"] = str(site_folder(tmp_path))
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "tripwire" not in shown.stdout and "builtin" in shown.stdout
