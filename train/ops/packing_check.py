"""Whether packed rows leak, asked of the real model at start: three passes without gradients.

On a row of two samples ``[X | Y]``:

- *intervention*: another X of the same length must not change Y's logits. Shapes and kernels are the same in both
  passes, so this is exact but for noise: it finds every leak, and only leaks.
- *separation*: Y's logits must be those of Y alone. This finds what depends on X's length (wrong positions, windows out
  of place), but rounds otherwise, and sparse attention breaks ties by a row's width.

A short row proves nothing: a block that compresses 128 tokens leaks across a boundary only if both samples are longer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from configs.errors import ConfigError
from train.engine.base import World
from train.models.families import Family
from train.ops.packed_attention import Pack

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative L2 difference of a token's logits that counts. Leaks were 0.2 to 1.3 at Y's first tokens, and
0 to 2e-7 is what was left where there is none."""
FIRST = 8
"""Y's first tokens, which see a leak best."""
FEW, SOME = 0.02, 0.05
"""Shares of Y's tokens that may differ: under intervention; from Y alone, where a router or a top-k may round over."""
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
    config = _base(module).config
    apart, alone = differences(forward, module, config, device, TOLERANCE[dtype])
    worst = _worst_of_ranks(world, [apart.first, apart.share, alone.first, alone.share])
    apart, alone = Differences(*worst[:2]), Differences(*worst[2:])
    limit = TOLERANCE[dtype]
    if not (apart.first <= limit and apart.share <= FEW):
        raise _fault(family, "changing one sample of a row changes the next one's logits", apart, limit, FEW)
    chooses = family.untrained is not None
    if not (alone.first <= limit and alone.share <= SOME):
        if not chooses:
            raise _fault(family, "a sample's logits in a packed row differ from those alone", alone, limit, SOME)
        note(
            f"packing: {alone.share:.1%} of the logits in a packed row differ from those of the sample alone; nothing "
            "leaks, but this attention's top-k breaks ties by the width of a row"
        )
    seconds = time.monotonic() - started
    note(
        f"packing checked on this model in {seconds:.1f} s: another sample in the row changes logits by "
        f"{apart.first:.1g} (at most {limit:g})"
    )


def differences(
    forward: Forward, module: nn.Module, config: Any, device: torch.device, limit: float
) -> tuple[Differences, Differences]:
    """Under intervention, and from the sample alone."""
    x, y = lengths_for(config)
    first, other, second = _tokens(config, (x, x, y), device)
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            packed = _logits(forward, [first, second])
            changed = _logits(forward, [other, second])
            alone = _logits(forward, [second])
    finally:
        module.train(was_training)
    return _differences(changed, packed, limit), _differences(alone, packed, limit)


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


def _logits(forward: Forward, samples: list[torch.Tensor]) -> torch.Tensor:
    """Of the last sample, fp32 ``[t x vocabulary]``."""
    lengths = tuple(len(sample) for sample in samples)
    ids = torch.cat(samples)[None]
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    wanted[:, -lengths[-1] :] = True
    out = forward(input_ids=ids, position_ids=positions, pack=Pack((lengths,)), logits_to_keep=wanted, use_cache=False)
    logits: torch.Tensor = out.logits
    return logits.flatten(0, -2).float()


def _differences(a: torch.Tensor, b: torch.Tensor, limit: float) -> Differences:
    relative = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return Differences(float(relative[:FIRST].mean()), float((~(relative <= limit)).float().mean()))


def _worst_of_ranks(world: World, figures: list[float]) -> list[float]:
    """A rank that alone stopped would leave the others waiting."""
    count = len(figures)
    mine = [0.0] * (world.size * count)
    mine[world.rank * count : (world.rank + 1) * count] = figures
    everyone = world.all_reduce_sum(mine)
    return [max(_or_infinity(each) for each in everyone[i::count]) for i in range(count)]


def _or_infinity(figure: float) -> float:
    return figure if math.isfinite(figure) else math.inf


def _fault(family: Family, what: str, found: Differences, limit: float, share: float) -> ConfigError:
    return ConfigError(
        "packing",
        f"samples of a row are not kept apart on this model ('{family.model_type}'): {what}, by {found.first:.2g} at "
        f"its first tokens, by more than {limit:g} at {found.share:.0%} of all",
        allowed=f"at most {limit:g} at the first tokens, and above it at most {share:.0%} of all",
        remedy="packing=off pads rows of one sample; please report the model's config.json",
    )


def _base(module: nn.Module) -> Any:
    """The model of transformers inside what peft wrapped."""
    inside: Any = module
    return inside.get_base_model() if hasattr(inside, "get_base_model") else inside
