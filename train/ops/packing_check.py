"""Whether packed rows leak, asked of the real model at start: three passes without gradients.

On a row of two samples ``[X | Y]``, between which a third of nearly Y's length stands where mixers are wrapped, as
those take samples of like lengths together:

- *intervention*: another X of the same length must not change Y's logits. Shapes and kernels are the same in both
  passes, so this is exact but for noise: it finds every leak, and only leaks.
- *separation*: Y's logits must be those of Y alone. This finds what depends on X's length (wrong positions, windows out
  of place), but rounds otherwise, and sparse attention breaks ties by a row's width.

Where the experts' matrices meet other rows, and in bf16, a token may round over to another expert without any leak. So
before a run is stopped the same is asked where nothing can leak, of ``[Y | X]``: what is seen there is rounding.

Logits are compared without their mean over the vocabulary, which changes no probability and may be most of them: of
SmolLM2-135M 99 %, in which one layer's leak was lost.

A short row proves nothing: a block that compresses 128 tokens leaks across a boundary only if both samples are longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.errors import ConfigError
from train.engine.base import World
from train.models.families import Family
from train.ops.packed_attention import Pack
from train.ops.packed_mixers import DSA

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative L2 difference of a token's logits that counts. Leaks were 0.2 to 1.3 at Y's first tokens, and
0 to 2e-7 is what was left where there is none."""
FIRST = 8
"""Y's first tokens, which see a leak best."""
FEW, SOME = 0.02, 0.05
"""Shares of Y's tokens that may differ: under intervention; from Y alone, where a router or a top-k may round over."""
ABOVE_ROUNDING, AT_MOST = 3.0, 4.0
"""A leak is this many times what rounding does; but rounding excuses no more than so many times the limits."""
SEEN = 140
"""Tokens of Y that are looked at, the first ones among them; bounds the memory of the logits."""
LIKE = 9
"""Tokens more than Y has the sample that mixers take together with it."""
SHORTEST = 140
"""Tokens; a multiple of no block."""
LARGEST = 512
"""Tokens. Larger ones are windows of plain sliding attention, whose boundaries a shorter row shows as well."""
_BLOCKS = (
    "sliding_window",
    "block_size",
    "index_block_size",
    "index_kpool",
    "linear_conv_kernel_dim",
    "compress_rates",
)

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Differences:
    """Of Y's logits, relative, token by token."""

    first: float
    """Mean over Y's first tokens."""
    share: float
    """Share of Y's tokens above the tolerance."""

    def within(self, allowed: Differences) -> bool:
        """Whether neither figure is above; NaN is."""
        return self.first <= allowed.first and self.share <= allowed.share

    def above(self, rounding: Differences) -> Differences:
        """These limits, raised where rounding alone comes near them."""
        return Differences(_raised(self.first, rounding.first), _raised(self.share, rounding.share))


def check_packing(
    forward: Forward,
    module: nn.Module,
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    note: Callable[[str], None],
) -> None:
    """Stops a run whose packed rows would leak. Every rank takes part; no state and no random number changes.

    Args:
        forward: the engine's.
        module: what it runs.
        family: of the model.
        device: where inputs go.
        dtype: the working dtype.
        world: the ranks, which decide together.
        note: takes what was found.

    Raises:
        ConfigError: a sample reaches another one, or is misplaced.
    """
    started = time.monotonic()
    limit = TOLERANCE[dtype]
    row = Row(forward, module, device, limit, grouped=bool(family.packed_mixers))
    apart, alone = _worst_of_ranks(world, row.leak())
    few, some = Differences(limit, FEW), Differences(limit, SOME)
    if not (apart.within(few) and alone.within(some)):
        rounding = _worst_of_ranks(world, row.rounding())
        few, some = few.above(rounding[0]), some.above(rounding[1])
    if not apart.within(few):
        raise _fault(family, "changing one sample of a row changes the next one's logits", apart, few, limit)
    if not alone.within(some):
        # The first tokens have no more keys than the top-k takes.
        ties = not apart.share and alone.first <= some.first and set(DSA) & set(family.packed_mixers or ())
        if not ties:
            raise _fault(family, "a sample's logits in a packed row differ from those alone", alone, some, limit)
        note(
            f"packing: {alone.share:.1%} of the logits in a packed row differ from those of the sample alone; nothing "
            "leaks, but the top-k of this attention breaks ties by the width of a row"
        )
    note(
        f"packing checked on this model in {time.monotonic() - started:.1f} s: another sample in the row changes "
        f"logits by {apart.first:.1g} (at most {few.first:.1g})"
    )


class Row:
    """Passes over a row of X and Y, without gradients and in eval mode.

    Args:
        forward: the engine's.
        module: what it runs; left in the mode that it is in.
        device: where inputs go.
        limit: relative difference of a token's logits that counts.
        grouped: a third sample stands before Y, which changes with X.
    """

    def __init__(
        self, forward: Forward, module: nn.Module, device: torch.device, limit: float, *, grouped: bool = False
    ) -> None:
        self.forward, self.module, self.limit = forward, module, limit
        config = _base(module).config
        x, y = lengths_for(config)
        z = y + LIKE if grouped else 0
        *others, self.y = _tokens(config, (x, z, x, z, y), device)
        self.x, self.other = ([each for each in pair if len(each)] for pair in (others[:2], others[2:]))
        rest = torch.linspace(FIRST, y - 1, SEEN - FIRST, device=device).long()
        self.seen = torch.zeros_like(self.y, dtype=torch.bool)
        self.seen[:FIRST] = self.seen[rest] = True

    def leak(self) -> tuple[Differences, Differences]:
        """What becomes of Y behind another X, and beside Y alone."""
        with self._frozen():
            packed, changed, alone = (
                self._logits(*self.x, self.y),
                self._logits(*self.other, self.y),
                self._logits(self.y),
            )
        return self._differences(changed, packed), self._differences(alone, packed)

    def rounding(self) -> tuple[Differences, Differences]:
        """The same before X, which no causal model can see there."""
        with self._frozen():
            packed, changed, alone = (
                self._logits(self.y, *self.x),
                self._logits(self.y, *self.other),
                self._logits(self.y),
            )
        return self._differences(changed, packed), self._differences(alone, packed)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in training:
                module.training = True

    def _logits(self, *samples: torch.Tensor) -> torch.Tensor:
        """At the tokens of Y that are looked at, ``[n x vocabulary]``."""
        lengths = tuple(len(sample) for sample in samples)
        positions = torch.cat([torch.arange(n, device=self.y.device) for n in lengths])
        wanted = torch.cat([self.seen if sample is self.y else torch.zeros_like(sample) > 0 for sample in samples])
        out = self.forward(
            input_ids=torch.cat(samples)[None],
            position_ids=positions[None],
            pack=Pack((lengths,)),
            logits_to_keep=wanted[None],
            use_cache=False,
        )
        logits: torch.Tensor = out.logits
        return logits.flatten(0, -2)

    def _differences(self, a: torch.Tensor, b: torch.Tensor) -> Differences:
        a, b = (each.float() - each.float().mean(-1, keepdim=True) for each in (a, b))
        relative = (a - b).norm(dim=-1) / b.norm(dim=-1)
        return Differences(float(relative[:FIRST].mean()), float((~(relative <= self.limit)).float().mean()))


def lengths_for(config: Any) -> tuple[int, int]:
    """Tokens of X and Y: both longer than every block and compression rate of the model, multiples of none."""
    sizes = [size for each in (config, config.get_text_config()) for size in _sizes(each)]
    largest = max([size for size in sizes if size <= LARGEST], default=0)
    y = max(SHORTEST, largest + 13)
    return 2 * y + 21, y


def _sizes(config: Any) -> Iterator[int]:
    for name in _BLOCKS:
        value = getattr(config, name, None)
        for size in value.values() if isinstance(value, dict) else [value]:
            if isinstance(size, int) and not isinstance(size, bool):
                yield size


def _tokens(config: Any, lengths: tuple[int, ...], device: torch.device) -> list[torch.Tensor]:
    """Random ids; none that the model takes for an image or the like."""
    taken = {
        value
        for each in (config, config.get_text_config())
        for name, value in each.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    ids = torch.tensor([i for i in range(min(config.get_text_config().vocab_size, 50_000)) if i not in taken])
    draw = torch.Generator().manual_seed(0)
    return [ids[torch.randint(len(ids), (n,), generator=draw)].to(device) for n in lengths]


def _worst_of_ranks(world: World, found: tuple[Differences, Differences]) -> tuple[Differences, Differences]:
    """A rank that alone stopped would leave the others waiting."""
    mine = [_or_infinity(figure) for each in found for figure in (each.first, each.share)]
    count = len(mine)
    table = [0.0] * (world.size * count)
    table[world.rank * count : (world.rank + 1) * count] = mine
    everyone = world.all_reduce_sum(table)
    worst = [max(everyone[i::count]) for i in range(count)]
    return Differences(*worst[:2]), Differences(*worst[2:])


def _raised(limit: float, rounding: float) -> float:
    return min(max(limit, ABOVE_ROUNDING * rounding), AT_MOST * limit)


def _or_infinity(figure: float) -> float:
    return figure if math.isfinite(figure) else math.inf


def _fault(family: Family, what: str, found: Differences, allowed: Differences, limit: float) -> ConfigError:
    return ConfigError(
        "packing",
        f"samples of a row are not kept apart on this model ('{family.model_type}'): {what}, by {found.first:.2g} at "
        f"its first tokens, by more than {limit:g} at {found.share:.0%} of all",
        allowed=f"at most {allowed.first:.2g} at the first tokens, at most {allowed.share:.0%} of all",
        remedy="packing=off pads rows of one sample; please report the model's config.json",
    )


def _base(module: nn.Module) -> Any:
    """The model of transformers inside what peft wrapped."""
    inside: Any = module
    return inside.get_base_model() if hasattr(inside, "get_base_model") else inside
