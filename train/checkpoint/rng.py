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


def set_rng_states(states: Mapping[str, torch.Tensor], device: Device, *, otherwise: int) -> None:
    """Puts back what `rng_states` gave.

    A generator of another kind of device cannot go on here, though its state may have the same size: a device whose
    own state is not in `states` starts from the seed `otherwise`.
    """
    stored = states.get(_key(device))
    has_own = device.rng_state() is not None
    if has_own and stored is None:
        device.seed(otherwise)
    version, internal, gauss = _from_bytes(states["python"])
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = _from_bytes(states["numpy"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if has_own and stored is not None:
        device.set_rng_state(stored)


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
