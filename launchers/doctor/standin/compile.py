"""Compiles the pretended CANN and the overlay.

The two C++ units take nearly all of the time, most of it in PyTorch's headers; so files that need the same headers are
compiled as one unit, and the units side by side.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

from configs.errors import CrosstuneError, DeviceError, ErrorGroup, RunFailedError

SOURCES = Path(__file__).parent
RECIPE = Path(__file__).read_bytes()
"""This file as this process runs it: part of what identifies a build."""
UNITS = {"operators": ("aliasing", "operators", "memory"), "collectives": ("collectives", "module")}
"""C++ files by the unit that they are compiled in."""
OVERLAY = "standin_overlay.so"

EMPTY_LIBRARIES = ("hccl", "ge_runner", "graph", "acl_op_compiler", "acl_tdt_channel")
"""Libraries of CANN that torch_npu opens by name. All that they would hold is in libascendcl, on which they depend: a
symbol is looked up in a library's dependencies too."""
CANN_FOLDERS = ("lib64", "opp", "runtime", "compiler")
"""Folders of CANN that torch_npu looks for."""
CANN_SYMBOL = re.compile(r"(acl|Hccl|Msprof|rt[A-Z])[A-Za-z0-9_]*")
"""Functions of CANN, among what the wheel's library leaves undefined."""


def check_tools() -> None:
    """Looks for the compilers and Python's headers.

    Raises:
        ErrorGroup: some are missing; all are named.
    """
    missing: list[CrosstuneError] = [
        DeviceError(tool, "not found; the stand-in is compiled with it", remedy=f"apt-get install {package}")
        for tool, package in (("g++", "g++"), ("gcc", "gcc"), ("nm", "binutils"))
        if shutil.which(tool) is None
    ]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(
            DeviceError("Python.h", "Python's C headers are not there", remedy="apt-get install python3-dev")
        )
    if missing:
        raise ErrorGroup(missing)


def compiler_version() -> str:
    """Of g++."""
    return _run("g++", "-dumpfullversion").strip()


def compile_all(folder: Path, library: Path) -> None:
    """Builds everything into `folder`: ``cann/`` and the overlay.

    Args:
        folder: exists.
        library: torch_npu's, whose undefined symbols the pretended CANN provides.

    Raises:
        RunFailedError: the compiler failed.
    """
    objects = folder / "objects"
    objects.mkdir()
    units = [_start(_compile_unit(name, files, objects)) for name, files in UNITS.items()]
    try:
        _build_cann(folder / "cann", objects, library)
    finally:
        for unit in units:
            unit.wait()
    for unit in units:
        _finish(unit)
    torch = _torch() / "lib"
    _run(
        *("g++", "-shared", *(str(objects / f"{name}.o") for name in UNITS), "-o", str(folder / OVERLAY)),
        *(f"-L{torch}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{torch}"),
    )
    shutil.rmtree(objects)


def _build_cann(cann: Path, objects: Path, library: Path) -> None:
    for name in CANN_FOLDERS:
        (cann / name).mkdir(parents=True)
    compiled = []
    for source in sorted((SOURCES / "cann").glob("*.c")):
        compiled.append(str(objects / f"{source.stem}.o"))
        _run(*_c_compiler(), "-c", str(source), "-o", compiled[-1])
    wanted = {name for name in _symbols(str(library), "--undefined-only", "--dynamic") if CANN_SYMBOL.fullmatch(name)}
    stubs = objects / "stubs.c"
    stubs.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(wanted - _defined(compiled))))
    lib = cann / "lib64"
    _run(*_c_compiler(), "-fno-builtin", "-shared", *compiled, str(stubs), "-o", str(lib / "libascendcl.so"))
    for name in EMPTY_LIBRARIES:
        path = lib / f"lib{name}.so"
        _run(
            "gcc",
            "-shared",
            "-Wl,--no-as-needed",
            f"-L{lib}",
            "-lascendcl",
            "-o",
            str(path),
            f"-Wl,-soname,{path.name}",
        )


def _c_compiler() -> tuple[str, ...]:
    return "gcc", "-std=gnu11", "-O1", "-Wall", "-fPIC"


def _defined(objects: list[str]) -> set[str]:
    return _symbols(*objects, "--defined-only", "--extern-only")


def _symbols(*words: str) -> set[str]:
    """Names that nm prints."""
    lines = _run("nm", "--format=posix", *words).splitlines()
    return {line.split()[0].partition("@")[0] for line in lines if line and not line.endswith(":")}


def _compile_unit(name: str, files: tuple[str, ...], objects: Path) -> list[str]:
    overlay, torch = SOURCES / "overlay", _torch() / "include"
    unit = objects / f"{name}.cpp"
    unit.write_text("".join(f'#include "{overlay / file}.cpp"\n' for file in files))
    headers = (torch, torch / "torch/csrc/api/include", sysconfig.get_path("include"))
    return [
        *("g++", "-std=c++20", "-O1", "-Wall", "-Wfatal-errors", "-fPIC", "-fvisibility=hidden", "-DUSE_DISTRIBUTED"),
        # -isystem: warnings of others' headers are not ours.
        *(word for folder in headers for word in ("-isystem", str(folder))),
        *("-c", str(unit), "-o", str(objects / f"{name}.o")),
    ]


def _torch() -> Path:
    """Folder of the torch package, found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is a dependency"
    return Path(spec.origin).parent


def _start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate()[0]
    if process.returncode:
        assert isinstance(process.args, list)
        full = "No space left on device" in output
        lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
        raise RunFailedError(
            str(process.args[0]),
            "cannot compile the stand-in:\n    " + "\n    ".join(lines[:5]),
            remedy="build=DIR or TMPDIR on another disk" if full else "g++ 11 or newer",
        )
    return output


def _run(*command: str) -> str:
    return _finish(_start(list(command)))
