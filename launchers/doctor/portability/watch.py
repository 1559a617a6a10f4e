"""Watches a step on the pretended device: every operator with its place in the model, and what cannot work there.

Imported only in the probe's process, by way of functions: torch is there.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.module_tracker import ModuleTracker

from configs.errors import first_line

RARE = (torch.float64, torch.complex32, torch.complex64, torch.complex128)
"""dtypes that only some NPU operators take."""
FP8 = tuple(
    dtype for name, dtype in vars(torch).items() if name.startswith("float8_") and isinstance(dtype, torch.dtype)
)
CARRIERS = frozenset(
    "aten::_to_copy aten::copy_ aten::clone aten::detach aten::empty.memory_format aten::empty_strided "
    "aten::zeros aten::ones aten::lift_fresh aten::alias".split()
)
"""Operators that only hold or move values: they take every dtype."""
MIXED = "Expected all tensors to be on the same device"
CPU_LACKS = "not implemented for '"
"""As PyTorch's CPU kernels say of a dtype."""
MIXING, UNKNOWN = "mixing", "unknown"
Change = Callable[[torch.Tensor], torch.Tensor]
OWN_CODE = tuple(
    str(Path(file).parent) + "/"
    for file in (torch.__file__, __file__, getattr(sys.modules.get("torch_npu"), "__file__", None))
    if file
)


@dataclass
class Place:
    """Where in the model something happened first."""

    module: str = ""
    """Path of the innermost torch module, such as ``model.layers.0.mlp``."""
    file: str = ""
    line: int = 0
    backward: bool = False


@dataclass
class Operator:
    """An operator that ran."""

    count: int = 0
    dtypes: set[str] = field(default_factory=set)
    """Of its tensors on the device."""
    place: Place = field(default_factory=Place)
    faults: dict[str, Place] = field(default_factory=dict)
    """What it failed by, `MIXING`, `UNKNOWN` or the message, before the step went on in another way."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"dtypes": sorted(self.dtypes)}


@dataclass
class Rare:
    """A dtype that few NPU operators take, or that the NPU gave in place of the one asked for."""

    place: Place
    """Of the first operator that had to do with it."""
    count: int = 0
    operators: set[str] = field(default_factory=set)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"operators": sorted(self.operators)}


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators, and goes on after one that fails: on moved tensors, or on the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: dict[str, Operator] = {}
        self.rare: dict[str, Rare] = {}
        self.narrowed: dict[str, Rare] = {}
        """By the dtype that was asked for and not given: torch_npu casts to float32 what is to be float64."""
        self.tracker = ModuleTracker()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operator, noted."""
        name, kwargs = func.name(), kwargs or {}
        noted = self.operators.get(name)
        if noted is None:
            noted = self.operators[name] = Operator(place=self._place())
        noted.count += 1
        try:
            result = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            result = self._go_on(func, args, kwargs, noted, error)
        self._note_dtypes(name, noted, (args, kwargs, result))
        asked = kwargs.get("dtype")
        if asked is not None and is_on_device(result) and result.dtype != asked:
            self._note(self.narrowed, asked, name)
        return result

    def _go_on(self, func: Any, args: Any, kwargs: Any, noted: Operator, error: Exception) -> Any:
        """The result by a way that a card does not have, the fault noted; the error itself where there is none."""
        tensors = [x for x in tree_flatten((args, kwargs))[0] if is_on_device(x)]
        if func._schema.is_mutable or not tensors:
            raise error
        kind, change, back = _way(str(error), tensors[0])
        moved = tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) and x.dim() else x, (args, kwargs))
        try:
            result = func(*moved[0], **moved[1])
        except Exception:
            raise error from None
        noted.faults.setdefault(kind, self._place())
        return tree_map(lambda x: back(x) if isinstance(x, torch.Tensor) else x, result)

    def _note_dtypes(self, name: str, noted: Operator, values: Any) -> None:
        found = {x.dtype for x in tree_flatten(values)[0] if is_on_device(x)}
        noted.dtypes |= {_named(dtype) for dtype in found}
        for dtype in () if name in CARRIERS else found.intersection(RARE + FP8):
            self._note(self.rare, dtype, name)

    def _note(self, rares: dict[str, Rare], dtype: torch.dtype, name: str) -> None:
        rare = rares.get(_named(dtype))
        if rare is None:
            rare = rares[_named(dtype)] = Rare(self._place())
        rare.count += 1
        rare.operators.add(name)

    def _place(self) -> Place:
        names = [name for name in self.tracker.parents if name != "Global"]
        module = max(names, key=len, default="").partition(".")[2]
        backward = bool(self.tracker.is_bw)
        frame = None if backward else model_frame(sys._getframe(1))
        return Place(module, frame.f_code.co_filename, frame.f_lineno) if frame else Place(module, backward=backward)


def _way(message: str, first: torch.Tensor) -> tuple[str, Change, Change]:
    """Name of the fault, what to do with tensors for another try, and with what comes out."""
    if MIXED in message:
        return MIXING, lambda x: x.to("npu"), lambda x: x
    if CPU_LACKS in message:  # the stand-in's own limit: its kernels are the CPU's
        taken = first.dtype
        return UNKNOWN, lambda x: x.float() if x.dtype == taken else x, lambda x: x.to(taken)
    return message.splitlines()[0][:200], lambda x: x.to("cpu"), lambda x: x.to("npu")


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_on_device(value: Any) -> bool:
    """Whether it is a tensor on an NPU."""
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


def model_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost frame outside torch and this package."""
    while frame is not None and frame.f_code.co_filename.startswith(OWN_CODE):
        frame = frame.f_back
    return frame


def mend(what: str, function: Callable[..., Any], args: Any, kwargs: Any, frame: FrameType) -> Any:
    """Goes on after a CUDA assumption of the model's code that raised: does on the NPU what it meant for the GPU.

    What a library asks keeps raising: it may have an ``except`` for it.
    """
    module = str(frame.f_globals.get("__name__", ""))
    if not is_model_code(module):
        return NotImplemented
    if what == ".cuda()":
        return args[0].to("npu")
    if what.startswith("torch.cuda."):
        return getattr(torch.get_device_module("npu"), what.rpartition(".")[2])(*args, **kwargs)
    return function(*[_meant(x) for x in args], **{key: _meant(value) for key, value in kwargs.items()})


def is_model_code(module: str) -> bool:
    """Whether a Python module is a model's own: one that comes with it, or transformers' file of its architecture."""
    return module.startswith(("transformers_modules.", "transformers.models."))


def _meant(value: Any) -> Any:
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return torch.device("npu", 0)
    return value


def failure(stage: str, error: BaseException) -> dict[str, Any]:
    """What ended a stage: the exception, and the innermost frames that are the model's or a library's, not ours."""
    frames = [
        {"file": frame.filename, "line": frame.lineno, "function": frame.name, "code": frame.line}
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        if not frame.filename.startswith(OWN_CODE)
    ]
    message = (first_line(error) or "no message")[:300]
    return {"stage": stage, "exception": type(error).__name__, "message": message, "frames": frames[:6]}
