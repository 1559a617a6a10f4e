"""Which weights ZeRO-3 holds gathered at once, as DeepSpeed 0.19.8 schedules them once it has seen a whole pass.

Each module's weights are fetched before it runs. Then the next ones in line are fetched ahead, at each module anew,
until so many elements are there that `stage3_max_live_parameters` stops it: the prefetch bucket bounds what one module
asks for, not what is there. A weight is fetched whole, however far beyond the bound it reaches, and a module that is
gathered as one (`train.engine.needs`) waits for all the weights below it.
(``deepspeed/runtime/zero/partitioned_param_coordinator.py``; measured in tests/distributed/test_plan_zero.py.)

Not followed: recomputation, which runs a layer's modules once more before they are gone through backwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn


@dataclass(frozen=True)
class Part:
    """A module that weights are gathered for when it runs."""

    weights: tuple[tuple[str, int], ...] = ()
    """Name and elements; one that several modules share has one name."""
    parts: tuple[Part, ...] = ()
    """Those inside of it that are gathered by themselves, in the order in which they run."""


def part_of(module: nn.Module, as_one: tuple[type[nn.Module], ...], whole: Collection[str]) -> Part:
    """A model's modules.

    Args:
        module: the model.
        as_one: classes of modules whose weights come together with all those below them.
        whole: names of parameters that are never spread.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters() if name not in whole}

    def made(each: nn.Module) -> Part:
        leaf = isinstance(each, as_one)
        weights = {id(parameter): parameter.numel() for parameter in each.parameters(recurse=leaf)}
        inside = () if leaf else tuple(made(child) for child in each.children())
        return Part(tuple((names[key], numel) for key, numel in weights.items() if key in names), inside)

    return made(module)


@dataclass(frozen=True)
class Gathered:
    """Elements."""

    large: int
    """Of what comes and goes, at the most."""
    small: int
    """Of what always stays."""
    fetched: int
    """Of what comes by one collective, at the most."""


def gathered(root: Part, *, prefetch: int, persistent: int, max_live: int, reuse: int) -> Gathered:
    """What is there at once in a pass, forward and backward.

    Args:
        root: the model.
        prefetch: elements that a module asks for ahead.
        persistent: weights of so few elements stay.
        max_live: nothing more is asked for ahead where so many elements are there.
        reuse: elements within which a further use keeps a weight.
    """
    sizes = {name: numel for part in _inside(root) for name, numel in part.weights}
    small = sum(numel for numel in sizes.values() if numel <= persistent)
    events = [*_run(root, backward=False), *_run(root, backward=True)]
    steps = [part for begins, part in events if begins]
    passed = [0, *accumulate(sum(numel for _, numel in part.weights) for part in steps)]
    line = deque((name, step) for step, part in enumerate(steps) for name, _ in part.weights)
    uses: dict[str, list[int]] = {}
    for name, step in reversed(line):
        uses.setdefault(name, []).append(step)
    asked_for = dict.fromkeys(sizes, -1)
    there: set[str] = set()
    live = most = most_at_once = 0
    step = -1

    def fetch(names: Sequence[str]) -> int:
        new = [name for name in dict.fromkeys(names) if name not in there and sizes[name] > persistent]
        there.update(new)
        return sum(sizes[name] for name in new)

    for begins, part in events:
        names = [name for name, _ in part.weights]
        if begins:
            step += 1
            own = fetch(names)
            for _ in {name for name in names if asked_for[name] < step}:
                line.popleft()
            room, ahead = min(max_live - live - own - small, prefetch), 0
            while line and ahead < room:
                name, use = line.popleft()
                asked_for[name] = max(asked_for[name], use)
                ahead += fetch([name])
            live += own + ahead
            most, most_at_once = max(most, live), max(most_at_once, own, ahead)
            continue
        for name in names:
            while uses[name] and uses[name][-1] <= step:
                uses[name].pop()
            near = bool(uses[name]) and passed[uses[name][-1]] - passed[step + 1] < reuse
            if name in there and not near and asked_for[name] <= step:
                there.remove(name)
                live -= sizes[name]
    return Gathered(most, small, most_at_once)


def _inside(part: Part) -> Iterator[Part]:
    yield part
    for each in part.parts:
        yield from _inside(each)


def _run(part: Part, *, backward: bool) -> Iterator[tuple[bool, Part]]:
    """Beginnings and ends, in order."""
    yield True, part
    for each in reversed(part.parts) if backward else part.parts:
        yield from _run(each, backward=backward)
    yield False, part
