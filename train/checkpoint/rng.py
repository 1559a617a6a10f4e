"""States of the random generators of one rank, as bytes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from train.devices.base import Device

RNG_PREFIX = "rng:"
"""Before a generator's name in a rank's file."""
REQUIRED_RNG = ("python", "numpy", "torch")
MAX_RNG_BYTES = 2**20
"""Of one generator's state; the largest known has 10 thousand."""
WORDS = 624
"""Of 32 bits: the state of a Mersenne twister."""


def rng_states(device: Device) -> dict[str, torch.Tensor]:
    """Python's, numpy's, torch's and, where it has one, the device's generator; uint8 [n] each."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "python": _to_bytes(random.getstate()),
        "numpy": _to_bytes([np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]),
        "torch": torch.get_rng_state(),
    }
    own = device.rng_state()
    return states if own is None else {**states, _key(device): own.cpu()}


def check_rng_states(states: Mapping[str, torch.Tensor], device: Device) -> None:
    """Tries the states on other generators than those in use: a position beyond its state reads foreign memory.

    Raises:
        ValueError: `set_rng_states` could not put them back; says which.
    """
    for name, attempt in (("python", _python_state), ("numpy", _numpy_state), ("torch", _try_torch)):
        try:
            attempt(states[name])
        except (KeyError, ValueError, TypeError, RuntimeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the state of {name}'s generator is damaged") from error
    own, stored = device.rng_state(), states.get(_key(device))
    if own is not None and stored is not None:
        try:
            device.set_rng_state(stored)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError("the state of the device's generator is damaged, or of another kind of device") from error
        finally:
            device.set_rng_state(own)


def set_rng_states(states: Mapping[str, torch.Tensor], device: Device, *, otherwise: int) -> None:
    """Puts back what `rng_states` gave.

    A generator of another kind of device cannot go on here, though its state may have the same size: a device whose
    own state is not in `states` starts from the seed `otherwise`.
    """
    stored = states.get(_key(device))
    has_own = device.rng_state() is not None
    if has_own and stored is None:
        device.seed(otherwise)
    random.setstate(_python_state(states["python"]))
    np.random.set_state(_numpy_state(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if has_own and stored is not None:
        device.set_rng_state(stored)


def _python_state(data: torch.Tensor) -> tuple[Any, ...]:
    version, internal, gauss = _from_bytes(data)
    _must(version == 3 and _are_words(internal[:-1]) and _is_position(internal[-1]))
    _must(gauss is None or isinstance(gauss, float))
    return version, tuple(internal), gauss


def _numpy_state(data: torch.Tensor) -> tuple[Any, ...]:
    keys, position, has_gauss, cached = _from_bytes(data)
    _must(_are_words(keys) and _is_position(position) and has_gauss in (0, 1) and isinstance(cached, float))
    return "MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached


def _try_torch(data: torch.Tensor) -> None:
    torch.Generator().set_state(data)


def _are_words(values: Any) -> bool:
    return len(values) == WORDS and all(type(value) is int and 0 <= value < 2**32 for value in values)


def _is_position(value: Any) -> bool:
    return type(value) is int and 0 <= value <= WORDS


def _must(fits: bool) -> None:
    if not fits:
        raise ValueError("no state of a Mersenne twister")


def _key(device: Device) -> str:
    """Of the device's own generator."""
    return f"device.{device.torch_type}"


def derived_seed(seed: int, step: int, rank: int) -> int:
    """A seed for a rank that has no saved state: the same for the same place in the same run, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little") >> 1


def _to_bytes(value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _from_bytes(data: torch.Tensor) -> Any:
    return json.loads(bytes(data.numpy()))
