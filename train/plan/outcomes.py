"""Operators on the meta device, asked once for each set of shapes: a model's layers ask the same again and again.

An answer of torch's own takes some 100 us there, most of it Python (``torch/_meta_registrations.py``,
``torch/_prims``).
FakeTensorMode has such a memory, too (``torch/_subclasses/fake_tensor.py``), for tensors of its own kind.
"""

from __future__ import annotations

from typing import Any

import torch

_Made = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
"""Shapes, strides and dtypes of the tensors that a call makes."""
_WRITTEN = "its first input, written into"
_UNKNOWN = "to be called each time"


class Outcomes:
    """Calls operators, or makes what they would give."""

    def __init__(self) -> None:
        self._kept: dict[Any, _Made | str] = {}
        """By operator and inputs."""

    def __call__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func` gives: a new tensor, a tuple of them, its first input where it writes into that."""
        try:
            named = ((name, _described(value)) for name, value in kwargs.items())
            key = (func, torch.get_default_dtype(), *map(_described, args), *named)
            kept = self._kept.get(key)
        except TypeError:  # also of what has no hash
            kept = _UNKNOWN
        if kept is None:
            before = _described(args), _memories(args)
            out = func(*args, **kwargs)
            same = (_described(args), _memories(args)) == before  # set_, resize_ and their like leave another tensor
            self._kept[key] = _outcome(func, args, kwargs, out) if same else _UNKNOWN
            return out
        if isinstance(kept, tuple):
            made = tuple(_empty(*each) for each in kept)
            return made[0] if len(func._schema.returns) == 1 else made
        return args[0] if kept == _WRITTEN else func(*args, **kwargs)


def _described(value: Any) -> Any:
    """What tells an input from others; 1, 1.0 and True are three.

    Raises:
        TypeError: it has values, as the optimizers' counts of steps.
    """
    if isinstance(value, torch.Tensor):
        if not value.is_meta:
            raise TypeError(value.device)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value


def _outcome(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Made | str:
    """What there is to know of a call. Views are made by the call itself: they share memory, declared or not."""
    if func._schema.is_mutable:
        name = func.overloadpacket.__name__
        alone = name.endswith("_") and name != "set_" and not isinstance(out, (tuple, list))
        return _WRITTEN if alone and out is args[0] else _UNKNOWN
    outs = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(each, torch.Tensor) and each.is_meta for each in outs):
        return _UNKNOWN
    shared = _memories((args, tuple(kwargs.values())))
    own = set(_memories(outs)) - set(shared)
    made = tuple((each.shape, each.stride(), each.dtype) for each in outs)
    whole = all(
        _empty(*like).untyped_storage().nbytes() == it.untyped_storage().nbytes()
        for like, it in zip(made, outs, strict=True)
    )
    return made if whole and len(own) == len(outs) else _UNKNOWN


def _empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _memories(value: Any) -> list[int]:
    """What tells the memories of tensors apart."""
    return [each.untyped_storage()._cdata for each in _tensors(value)]


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [each for part in value for each in _tensors(part)] if isinstance(value, (list, tuple)) else []
