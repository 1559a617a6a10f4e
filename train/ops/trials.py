"""Small inputs on which a device's version of an op is compared with the reference (`agreement.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from train.ops.kernel import Needs, Version
from train.ops.packed_attention import Lengths

MANY: Lengths = ((300, 1, 140),)
"""A sample of one token between two that are longer than the blocks of fused kernels, and no multiples of them."""
ROWS: Lengths = ((37,), (1, 36))
"""A row that one sample fills, and one of two samples."""
LONG: Lengths = ((2100,),)
"""A sample beyond the edge of compressed masks, commonly 2048 tokens."""
WINDOW = 96
"""Stands for the model's window, which samples this short would not fill."""


@dataclass(frozen=True)
class Trial:
    """One call of an op."""

    name: str
    call: Callable[[Version, Mapping[str, torch.Tensor]], torch.Tensor]
    inputs: Mapping[str, torch.Tensor]
    """In fp64 on the CPU, to be rounded to the working dtype."""
    differentiated: tuple[str, ...]
    """Inputs whose gradients are compared: all of which training asks one."""


def trials(op: str, needs: Needs) -> Iterator[Trial]:
    """Those of an op, at the sizes of a model."""
    draw = torch.Generator().manual_seed(0)
    yield from {"attention": _attention, "rms_norm": _rms_norm, "rotary": _rotary, "swiglu": _swiglu}[op](needs, draw)


def _normal(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


def _attention(needs: Needs, draw: torch.Generator) -> Iterator[Trial]:
    # Two heads of keys, two of queries on each: what tells a wrong grouping from a right one, at a cost that does not
    # grow with the model. The model's own number of heads is tried on few tokens.
    shared = min(2, needs.kv_heads)
    heads = shared * min(2, needs.heads // needs.kv_heads)
    small = (heads, shared, needs.head_dim)
    yield attention_trial("samples of 300, 1 and 140 tokens", MANY, small, None, draw)
    if needs.sliding_window is not None:
        yield attention_trial(f"a sliding window of {WINDOW}", MANY, small, WINDOW, draw)
    own = (needs.heads, needs.kv_heads, needs.head_dim)
    yield attention_trial(f"{needs.heads} heads over {needs.kv_heads}, two rows", ROWS, own, None, draw)
    # A softmax does not see what all keys have in common, but scores in a narrow format lose their low bits to it.
    common = attention_trial("keys with much in common", ROWS, small, None, draw)
    offset = 30 * _normal(draw, needs.head_dim)
    shifted = {**common.inputs, "key": common.inputs["key"] + offset}
    yield Trial(common.name, common.call, shifted, common.differentiated)
    beyond = attention_trial("a sample of 2100 tokens", LONG, (1, 1, needs.head_dim), needs.sliding_window, draw)
    yield Trial(beyond.name, beyond.call, beyond.inputs, ())


def attention_trial(
    name: str, lengths: Lengths, sizes: tuple[int, int, int], window: int | None, draw: torch.Generator
) -> Trial:
    """Attention without dropout.

    Args:
        name: what is tried.
        lengths: the samples of each row.
        sizes: heads of queries, heads of keys, and a head's size.
        window: tokens that a query may look back.
        draw: generator of the inputs.
    """
    heads, shared, width = sizes
    rows, tokens = len(lengths), sum(lengths[0])
    numbers = {"query": heads, "key": shared, "value": shared}
    inputs = {key: _normal(draw, rows, number, tokens, width) for key, number in numbers.items()}
    return Trial(name, partial(attend, lengths=lengths, window=window), inputs, tuple(inputs))


def attend(
    version: Version,
    inputs: Mapping[str, torch.Tensor],
    *,
    lengths: Lengths,
    window: int | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Calls a version of attention; the scaling is not the usual one, so that a version which ignores it differs."""
    scaling = 1.3 * inputs["query"].shape[-1] ** -0.5
    return version(*inputs.values(), lengths, scaling=scaling, dropout=dropout, sliding_window=window)


def _rms_norm(needs: Needs, draw: torch.Generator) -> Iterator[Trial]:
    def call(version: Version, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return version(inputs["x"], inputs["weight"], needs.epsilon)

    # Where the mean square is about epsilon, a wrong epsilon, or one in a wrong place, shows.
    for name, shape, scale in (
        ("hidden states", (2, 7, needs.hidden), 1.0),
        ("hidden states as small as epsilon", (2, 7, needs.hidden), needs.epsilon**0.5),
        ("heads", (2, 5, 3, needs.head_dim), 1.0),
    ):
        weight = 1 + 0.5 * _normal(draw, shape[-1])
        yield Trial(name, call, {"x": scale * _normal(draw, *shape), "weight": weight}, ("x", "weight"))


def _rotary(needs: Needs, draw: torch.Generator) -> Iterator[Trial]:
    def call(version: Version, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return version(inputs["x"], inputs["cos"], inputs["sin"])

    for name, rows, heads in (
        ("queries", 2, needs.heads),
        ("keys", 2, needs.kv_heads),
        ("positions shared by all rows", 1, needs.heads),
    ):
        # Kernels use that the two halves are equal; nothing differentiates them.
        angles = (7 * _normal(draw, rows, 1, 9, needs.head_dim // 2)).repeat(1, 1, 1, 2)
        turns = {"cos": needs.rotary_factor * angles.cos(), "sin": needs.rotary_factor * angles.sin()}
        yield Trial(name, call, {"x": _normal(draw, 2, heads, 9, needs.head_dim), **turns}, ("x",))


def _swiglu(needs: Needs, draw: torch.Generator) -> Iterator[Trial]:
    def call(version: Version, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return version(inputs["gate"], inputs["up"])

    shape = (2, 7, needs.intermediate)
    inputs = {"gate": 3 * _normal(draw, *shape), "up": _normal(draw, *shape)}
    yield Trial("gates from -9 to 9", call, inputs, ("gate", "up"))
