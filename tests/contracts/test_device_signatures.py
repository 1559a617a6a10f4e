"""Every call of `train/devices/` into a vendor's module is bound to the real function's signature.

Collected from the syntax tree, so that calls that no test reaches count, too. torch.cuda, torch.xpu and torch.mps are
those of the installed torch, whose Python side is there in a CPU build; torch.npu and torch_npu those of the real
wheel, in a child process on the stand-in (`test_devices.py` starts it). What cannot be resolved is a fault.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from train.devices.table import ROWS

DEVICES = Path(__file__).resolve().parents[2] / "train/devices"

RUNTIMES = {
    "accelerator.py": ("cuda", "xpu", "npu"),
    "cuda.py": ("cuda",),
    "rocm.py": ("cuda",),
    "xpu.py": ("xpu",),
    "ascend.py": ("npu",),
}
"""What ``self.runtime`` is in a file; any file not named here must not use it."""

HANDED_ON = {("table.py", "_call"): "calls what a row names: the rows are compared below"}
"""Functions that use ``self.runtime`` as a whole."""

KINDS = ("cuda", "xpu", "npu", "mps", "mlu", "musa", "hpu", "sdaa", "supa")


@dataclass(frozen=True)
class Use:
    """A call into, or an assignment to, a vendor's module."""

    file: str
    line: int
    path: str
    """Dotted, from ``torch`` or the plugin, such as ``torch.npu.set_device``."""
    call: ast.Call | None
    """None: the attribute is assigned to."""


def uses(file: Path, runtimes: dict[str, tuple[str, ...]]) -> Iterator[Use | str]:
    """Every use in a file; text for those that cannot be followed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in inner:
            continue  # a part of a longer path
        path = dotted(node)
        if path is None or not vendors(path):
            continue
        where = next((f.name for f in reversed(functions) if f.lineno <= node.lineno <= (f.end_lineno or 0)), "")
        call = called.get(id(node))
        if path in ("self.runtime", *(f"torch.{kind}" for kind in KINDS)):
            if (file.name, where) not in HANDED_ON:
                yield f"{file.name}:{node.lineno}: {path} is handed on, so its calls are not seen"
        elif path.startswith("self.runtime.") and file.name not in runtimes:
            yield f"{file.name}:{node.lineno}: no runtime is named for this file"
        elif call is None and not isinstance(node.ctx, ast.Store):
            yield f"{file.name}:{node.lineno}: {path} is neither called nor assigned to"
        else:
            tail = path.removeprefix("self.runtime.")
            heads = [f"torch.{kind}.{tail}" for kind in runtimes.get(file.name, ())] if tail != path else [path]
            yield from (Use(file.name, node.lineno, head, call) for head in heads)


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` of an attribute access on a name; None where it begins otherwise."""
    if isinstance(node, ast.Name):
        return node.id
    inner = dotted(node.value) if isinstance(node, ast.Attribute) else None
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else None


def vendors(path: str) -> bool:
    """Whether a path leads into a vendor's module."""
    return bool(re.match(rf"self\.runtime\b|torch_npu\.|torch\.ops\.npu\.|torch\.({'|'.join(KINDS)})\b", path))


def fault(use: Use) -> str | None:
    """What is wrong with a use, against the real module."""
    place = f"{use.file}:{use.line}: {use.path}"
    head, *parts = use.path.split(".")
    target: Any = torch if head == "torch" else importlib.import_module(head)
    for part in parts[:-1] if use.call is None else parts:
        try:
            target = getattr(target, part)
        except AttributeError:
            return f"{place}: there is no {part}"
    if use.call is None:
        return None if takes(target, parts[-1]) else f"{place}: assigning to it does nothing"
    if any(isinstance(each, ast.Starred) for each in use.call.args) or any(k.arg is None for k in use.call.keywords):
        return f"{place}: arguments that are not spelt out cannot be checked"
    found = list(signatures(target, parts[-1]))
    problems = []
    for signature in found:
        try:
            signature.bind(*use.call.args, **{str(each.arg): each.value for each in use.call.keywords})
            return None
        except TypeError as error:
            problems.append(str(error))
    return f"{place}: {'; '.join(problems) or 'its signature is not known'}"


def takes(target: Any, name: str) -> bool:
    """Whether assigning to ``target.name`` means something: some classes swallow any name."""
    setter = type(target).__setattr__
    if inspect.isfunction(setter) or inspect.ismethod(setter):
        return f'"{name}"' in inspect.getsource(setter)
    return hasattr(target, name)


def signatures(target: Any, name: str) -> Iterator[inspect.Signature]:
    """Of a Python function its own; of an operator those of its overloads."""
    operator = getattr(torch.ops.npu, name, None) if hasattr(torch, "npu") and name.startswith("npu_") else None
    if operator is not None:
        for overload in operator.overloads():
            yield of_schema(getattr(operator, overload)._schema)
        return
    try:
        yield inspect.signature(target)
    except ValueError:  # written in C++, without a text signature
        return


def of_schema(schema: Any) -> inspect.Signature:
    """A Python signature of an operator's schema."""
    return inspect.Signature(
        [
            inspect.Parameter(
                # "self" is "input" in Python.
                "input" if argument.name == "self" else argument.name,
                inspect.Parameter.KEYWORD_ONLY if argument.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
            )
            for argument in schema.arguments
        ]
    )


def faults(files: list[Path], kind: str, runtimes: dict[str, tuple[str, ...]] = RUNTIMES) -> list[str]:
    """What is wrong with the calls into one kind's modules, in all files."""
    of_kind = rf"torch\.{kind}\." + (r"|torch_npu\.|torch\.ops\.npu\." if kind == "npu" else "")
    found = [use for file in files for use in uses(file, runtimes)]
    unclear = [use for use in found if isinstance(use, str)]
    wanted = [use for use in found if isinstance(use, Use) and re.match(of_kind, use.path)]
    assert wanted or unclear, f"no call into torch.{kind} was collected"
    return unclear + [text for use in wanted if (text := fault(use))]


@pytest.mark.parametrize("kind", ["cuda", "xpu", "npu"])
def test_every_call_fits_the_real_function(kind: str):
    if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is only on the stand-in: tests/contracts/test_devices.py runs this test there")
    if kind == "npu":
        importlib.import_module("torch_npu")
    assert faults(sorted(DEVICES.glob("*.py")), kind) == []


PLANTED = {
    "cuda": {
        "self.runtime.set_device()": "missing a required argument: 'device'",
        "self.runtime.get_rng_state(dev=0)": "unexpected keyword argument 'dev'",
        "self.runtime.max_memory_cashed()": "there is no max_memory_cashed",
        "self.runtime.synchronize(*devices)": "not spelt out",
        "torch.cuda.manual_seed_all(1, 2)": "too many positional arguments",
        "vendor = self.runtime": "handed on",
        "f = self.runtime.synchronize": "neither called nor assigned to",
    },
    "npu": {
        "self.runtime.set_compile_mode(jit=True)": "unexpected keyword argument 'jit'",
        "self.runtime.config.alow_internal_format = True": "assigning to it does nothing",
        "torch_npu.npu_rms_norm(x, gamma, eps=1e-6)": "unexpected keyword argument 'eps'",
        "torch_npu.npu_swiglu(x, axis=-1)": "unexpected keyword argument 'axis'",
        "torch_npu.npu_fusion_attention(q, k, v, head_num=2)": "missing a required argument: 'input_layout'",
        "torch_npu.npu_rotary_mull(x, c, s)": "there is no npu_rotary_mull",
        "torch.npu.is_bf16_supported(emulation=True)": "unexpected keyword argument 'emulation'",
    },
}


@pytest.mark.parametrize("kind", ["cuda", "npu"])
def test_a_planted_wrong_call_is_found(kind: str, tmp_path: Path):
    if kind == "npu" and importlib.util.find_spec("torch_npu") is None:
        pytest.skip("torch_npu is only on the stand-in: tests/contracts/test_devices.py runs this test there")
    if kind == "npu":
        importlib.import_module("torch_npu")
    planted = tmp_path / "planted.py"
    planted.write_text("\n".join(PLANTED[kind]), encoding="utf-8")
    found = "\n".join(faults([planted], kind, {"planted.py": (kind,)}))
    for number, (line, problem) in enumerate(PLANTED[kind].items(), 1):
        assert re.search(rf"^planted.py:{number}: .*{re.escape(problem)}", found, re.MULTILINE), (line, found)
    stranger = tmp_path / "stranger.py"
    stranger.write_text("self.runtime.synchronize()", encoding="utf-8")
    assert "no runtime is named" in faults([stranger], kind)[0]


# The rows of table.py: no wheel of theirs is here, so they are compared with what DeepSpeed and accelerate call.

SHARED = {"is_available", "device_count", "synchronize"}
"""What AcceleratorDevice calls for a row's device, too."""
UNSEEN = {
    "musa": {"synchronize", "set_device"},  # torch_musa's documents say that it has torch.cuda's functions
    "mps": {"is_available", "device_count"},  # stock torch: bound to the real functions below
}
"""Called by neither peer."""


def functions_of(name: str) -> set[str]:
    """The functions that a row, or what it inherits, calls."""
    row = ROWS[name]
    wanted = {row.seed, row.rng_state, row.set_rng_state, row.used, row.peak, row.total, *SHARED}
    return wanted | {extra for extra in (row.set_device, row.bf16) if isinstance(extra, str)}


def called_by_peers(name: str) -> set[str]:
    """Functions of ``torch.<name>`` in DeepSpeed's class (``self.hpu`` in that for hpu) and anywhere in accelerate."""
    texts = [file.read_text(encoding="utf-8") for file in package("accelerate").rglob("*.py")]
    own = package("deepspeed") / f"accelerator/{name}_accelerator.py"
    texts += [own.read_text(encoding="utf-8")] if own.exists() else []
    return {found for text in texts for found in re.findall(rf"(?:torch|self)\.{name}\.([a-z_0-9.]+)", text)}


def package(name: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_as_its_peers_have_it(name: str):
    row = ROWS[name]
    assert functions_of(name) - called_by_peers(name) == UNSEEN.get(name, set())
    file = package("deepspeed") / f"accelerator/{name}_accelerator.py"
    assert file.exists() == (row.deepspeed is not None)
    chosen = (package("deepspeed") / "accelerator/real_accelerator.py").read_text(encoding="utf-8")
    peers = (package("accelerate") / "state.py").read_text(encoding="utf-8")
    peers += (package("accelerate") / "utils/launch.py").read_text(encoding="utf-8")
    source = (file.read_text(encoding="utf-8") if file.exists() else "") + chosen + peers
    assert f"'{row.backend}'" in source or f'"{row.backend}"' in source
    if row.plugin and name != "musa":
        assert f"import {row.runtime or row.plugin}" in chosen
    if row.visible and name != "musa":
        assert row.visible in source
    if row.deepspeed:
        assert f"'{row.deepspeed}'" in chosen


def test_the_row_of_stock_torch_fits_its_functions():
    row, real = ROWS["mps"], torch.mps
    for name, arguments in {row.seed: 1, row.rng_state: 0, row.set_rng_state: 1, row.used: 0, row.peak: 0}.items():
        inspect.signature(getattr(real, name)).bind(*range(arguments))
    for name in (row.total, *SHARED):
        inspect.signature(getattr(real, name)).bind()
