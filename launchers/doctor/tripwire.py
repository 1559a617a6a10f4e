"""Records every assumption that the device is a CUDA one, on a run where it is not.

Many of them go unnoticed: on a build without CUDA ``torch.cuda.empty_cache()`` does nothing, ``max_memory_allocated()``
is 0, ``get_rng_state_all()`` is empty, ``is_bf16_supported()`` is False. With ``CROSSTUNE_TRIPWIRE=FILE`` and
`activate` called before user code (the stand-in does so; see `site_folder` for other runs), each of these leaves one
JSON line in FILE, once per place and process::

    {"what": "torch.cuda.empty_cache", "kind": "silent", "file": ".../trainer.py", "line": 12, "module": "trainer",
     "stack": ["trainer.py:12 step", ...], "pid": 41, "rank": 0}

Watched: public functions and classes of torch.cuda and its submodules, and of torch.backends.cuda; "cuda" or an
integer as a device (``.to``, factory functions and modules made by them, autocast and its questions, GradScaler,
``map_location``, device meshes); ``.cuda()``; the backend nccl. Only the call that comes from outside torch counts:
what torch (or its Ascend plugin) does inside is its own affair, and a call inside a watched call belongs to the outer
one.

Results and exceptions stay as they are. Not seen: attributes that are only read (``torch.version.cuda``,
``torch.backends.cudnn.*``, ``x.is_cuda``) or set (``torch.backends.cuda.matmul.allow_tf32``), ``torch.device(0)``
(which is the NPU where there is one), names that begin with an underscore, C++ extensions, and what always raises
without a GPU anyway: legacy tensor types (``torch.cuda.FloatTensor``), ``torch.Generator``, ``torch.Stream`` and
``torch.Event`` of cuda, ``with torch.device("cuda")``.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

VARIABLE = "CROSSTUNE_TRIPWIRE"
"""File that records are added to; unset: nothing is watched."""
OWN = ("torch", "torch_npu")
"""What these do inside is no assumption of anybody else."""
CUDA_MODULES = ("torch.cuda.", "torch.backends.cuda.")
STACK_DEPTH = 12
"""Frames outside torch that a record keeps, the innermost first."""

Judge = Callable[[tuple[Any, ...], dict[str, Any]], str | None]
"""From the arguments of a call to what it assumes, or None."""

Mend = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any], FrameType], Any]
mend: Mend | None = None
"""What a probe sets to go on after a watched call that raised: it gives a result in its place, or
NotImplemented. Nobody else."""

_state = threading.local()
_own_folders: tuple[str, ...] = ()
_watched: set[Callable[..., Any]] = set()
_seen: set[tuple[str, str, int, int]] = set()
_active = False


def activate() -> None:
    """Watches this process from now on, torch imported already or not; without the variable nothing happens."""
    global _active
    if _active or not os.environ.get(VARIABLE):
        return
    _active = True
    for name in OWN:  # the plugin puts functions of its own in the place of some of torch's
        if name not in sys.modules:
            sys.meta_path.insert(0, _After(name))
    if "torch" in sys.modules:
        _watch_torch()


def site_folder(parent: Path) -> Path:
    """A folder for PYTHONPATH that switches the tripwire on in every Python process that has the variable."""
    folder = parent / "tripwire"
    folder.mkdir(exist_ok=True)
    text = "from launchers.doctor.tripwire import activate\n\nactivate()\n"
    (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
    return folder


def records(file: Path) -> list[dict[str, Any]]:
    """What has been recorded there, in order; empty without the file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


class _After(importlib.abc.MetaPathFinder):
    """Watches as soon as the import of `name` has ended, before the importing code goes on."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)  # as found without us
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_watch(module: ModuleType) -> None:
                execute(module)
                _watch_torch()

            spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


def _watch_torch() -> None:
    import torch.distributed
    from torch.distributed import device_mesh, distributed_c10d

    global _own_folders
    files = [sys.modules[name].__file__ for name in OWN if name in sys.modules]
    _own_folders = tuple(os.path.dirname(file) + os.sep for file in files if file)
    _watch_cuda(torch)
    _watch_constructors(torch)
    for kind in (torch.Tensor, torch.nn.Module):
        _replace(kind, "to", _device_at("to", 1, "device"))
        _replace(kind, "cuda", _always(".cuda()"))
    for name in ("new_tensor", "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"):
        _replace(torch.Tensor, name, _device_at(name, None, "device"))
    for name in ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"):
        _replace(torch, name, _device_at(name, None, "device"), through=True)
    for name in ("is_autocast_enabled", "set_autocast_enabled", "get_autocast_dtype", "set_autocast_dtype"):
        _replace(torch, name, _device_at(name, 0, "device_type"))
    _replace(torch.autocast, "__init__", _device_at("autocast", 1, "device_type"))
    _replace(torch.amp.GradScaler, "__init__", _device_at("GradScaler", 1, "device", "cuda"))
    for owner, name, position, keyword in (
        (torch.amp, "custom_fwd", 1, "device_type"),
        (torch.amp, "custom_bwd", 1, "device_type"),
        (torch.random, "fork_rng", 4, "device_type"),
        (torch, "set_default_device", 0, "device"),
        (torch, "get_device_module", 0, "device"),
        (torch, "load", 1, "map_location"),
    ):
        _replace(owner, name, _device_at(name, position, keyword), also=(torch.serialization,))
    _replace(device_mesh.DeviceMesh, "__init__", _device_at("DeviceMesh", 1, "device_type"))
    _replace(
        device_mesh, "init_device_mesh", _device_at("init_device_mesh", 0, "device_type"), also=(torch.distributed,)
    )
    for name, position in (("init_process_group", 0), ("new_group", 2)):
        _replace(distributed_c10d, name, _nccl_at(name, position), also=(torch.distributed,))


def _watch_cuda(torch: Any) -> None:
    """Public functions and classes of torch.cuda, its submodules and torch.backends.cuda; each by one wrapper."""
    modules = [m for name, m in list(sys.modules.items()) if (name + ".").startswith(CUDA_MODULES)]
    done: dict[int, Any] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            origin = str(getattr(value, "__module__", ""))
            if name.startswith("_") or not (origin + ".").startswith(CUDA_MODULES):
                continue
            short = "torch.cuda" if getattr(torch.cuda, name, None) is value else origin
            if inspect.isfunction(value):
                if id(value) not in done:
                    done[id(value)] = _wrapper(value, _always(f"{short}.{name}"))
                setattr(module, name, done[id(value)])
            elif type(value) is type and id(value) not in done and not issubclass(value, BaseException):
                done[id(value)] = value
                for method in {"__new__", "__init__"} & vars(value).keys():
                    _replace(value, method, _always(f"{short}.{name}"))


def _watch_constructors(torch: Any) -> None:
    """The factory functions that take a device, as torch itself lists them for set_default_device."""
    from torch.jit import _builtins
    from torch.utils._device import _device_constructors

    for function in _device_constructors():
        name = function.__name__
        if getattr(torch, name, None) is not function:
            continue
        _replace(torch, name, _device_at(name, None, "device"), through=True)
        scripted = _builtins._find_builtin(function)  # type: ignore[no-untyped-call]
        if scripted is not None:  # TorchScript knows builtins by their identity
            _builtins._register_builtin(getattr(torch, name), scripted)


def _always(what: str) -> Judge:
    return lambda args, kwargs: what


def _device_at(label: str, position: int | None, keyword: str, default: Any = None) -> Judge:
    """Judges the argument at `position`, or named `keyword`: an integer or "cuda" is an assumption."""
    from torch import device as device_class

    place = sys.maxsize if position is None else position

    def judge(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        value = args[place] if len(args) > place else kwargs.get(keyword, default)
        kind = type(value)
        if kind is str:
            return f'{label}: device "cuda"' if value.startswith("cuda") else None
        if kind is device_class:
            return f'{label}: device "cuda"' if value.type == "cuda" else None
        return f"{label}: integer device" if kind is int else None

    return judge


def _nccl_at(label: str, position: int) -> Judge:
    def judge(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        backend = args[position] if len(args) > position else kwargs.get("backend")
        return f'{label}: backend "nccl"' if isinstance(backend, str) and "nccl" in backend.lower() else None

    return judge


def _replace(owner: Any, name: str, judge: Judge, also: Iterable[Any] = (), through: bool = False) -> None:
    """Puts a watched version in place of ``owner.name``, and of the same object under that name in `also`.

    Args:
        owner: a class or a module.
        name: of what it holds.
        judge: of its calls.
        also: other modules that hold it.
        through: a call inside torch counts for who called torch, as ``Linear(2, 2, device="cuda")`` asks torch.empty.
    """
    original = vars(owner).get(name, None)
    plain = original.__func__ if isinstance(original, staticmethod) else original or getattr(owner, name)
    watched = _wrapper(plain, judge, through)
    for place in also:
        if vars(place).get(name) is original:
            setattr(place, name, watched)
    setattr(owner, name, staticmethod(watched) if name == "__new__" else watched)


def _wrapper(function: Callable[..., Any], judge: Judge, through: bool = False) -> Callable[..., Any]:
    if function in _watched:
        return function

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        what = judge(args, kwargs)
        if what is None or getattr(_state, "inside", False):
            return function(*args, **kwargs)
        frame = _outside(sys._getframe(1)) if through else sys._getframe(1)
        if frame is None or frame.f_code.co_filename.startswith(_own_folders):
            return function(*args, **kwargs)
        _state.inside = True
        kind = "raises"
        try:
            result = function(*args, **kwargs)
            kind = "silent"
            return result
        except Exception:
            if mend is None:
                raise
            mended = mend(what, function, args, kwargs, frame)
            if mended is NotImplemented:
                raise
            return mended
        finally:
            _state.inside = False
            _record(what, kind, frame)

    _watched.add(watched)
    return watched


def _outside(frame: FrameType | None) -> FrameType | None:
    """The innermost frame that is not torch's."""
    while frame is not None and frame.f_code.co_filename.startswith(_own_folders):
        frame = frame.f_back
    return frame


def _record(what: str, kind: str, frame: FrameType) -> None:
    """Adds one line; a call in a loop leaves only the first."""
    file, line = frame.f_code.co_filename, frame.f_lineno
    if (what, file, line, os.getpid()) in _seen:
        return
    _seen.add((what, file, line, os.getpid()))
    stack: list[str] = []
    outer: FrameType | None = frame
    while outer is not None and len(stack) < STACK_DEPTH:
        code = outer.f_code
        if not code.co_filename.startswith((__file__, *_own_folders)):
            stack.append(f"{code.co_filename}:{outer.f_lineno} {code.co_qualname}")
        outer = outer.f_back
    content = {
        "what": what,
        "kind": kind,
        "file": file,
        "line": line,
        "module": frame.f_globals.get("__name__", ""),
        "stack": stack,
        "pid": os.getpid(),
        "rank": int(os.environ.get("RANK", "0")),
    }
    # One write to a file opened for appending: processes do not tear each other's lines.
    descriptor = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(content) + "\n").encode())
    finally:
        os.close(descriptor)
