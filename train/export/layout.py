"""Which tensors of a model's files each parameter of the model becomes.

The files of a hub and the modules of transformers name and cut the weights differently: one tensor per expert here, all
experts in one parameter there. transformers' own table of conversions is asked (`transformers.conversion_mapping`), on
a model without weights, in the direction in which it loads; its inverse operations then cut a parameter as the files
have it. Operations are taken to move values only, never to change them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from configs.errors import ModelError
from train.models.classes import ROUTER_AND_MIXING, from_config
from train.models.load import load_config

Rows = Callable[[str, int, int | None], torch.Tensor]
"""Name of a parameter, first row, row after the last (None: the end) -> values ``[rows, ...]``."""


class Cut(Enum):
    """How a stored tensor lies in the model's parameters."""

    rows = "rows"
    """Rows of the one are rows of the other."""
    slice = "slice"
    """One slice of the first dimension: an expert's."""
    whole = "whole"
    """All of the parameters are needed for any of it."""


@dataclass(frozen=True)
class Place:
    """Where a stored tensor's values are in the model."""

    parameters: tuple[str, ...]
    """Names of what it is made from; mostly one."""
    cut: Cut = Cut.rows
    index: int = 0
    """Which slice."""
    converter: Any = None
    """transformers' inverse conversion; None: the same tensor by another name."""
    pattern: str = ""
    """The converter's name for it."""
    config: Any = None

    def rows(self, read: Rows) -> Callable[[int, int], torch.Tensor]:
        """Reads rows of the stored tensor from the model's parameters.

        Args:
            read: gives rows of a parameter.
        """
        if self.cut is Cut.rows:
            return lambda start, stop: self._converted([read(self.parameters[0], start, stop)])
        if self.cut is Cut.slice:
            whole = self._converted([read(self.parameters[0], self.index, self.index + 1)])
        else:
            whole = self._converted([read(name, 0, None) for name in self.parameters])
        return lambda start, stop: whole[start:stop]

    def _converted(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if self.converter is None:
            return tensors[0]
        sources, targets = self.converter.source_patterns, self.converter.target_patterns
        found: Any = {pattern: [tensor] for pattern, tensor in zip(sources, tensors, strict=True)}
        for operation in self.converter.operations:
            found = operation.convert(
                found,
                source_patterns=sources,
                target_patterns=targets,
                full_layer_name=self.parameters[0],
                model=None,
                config=self.config,
                missing_keys=None,
            )
        made = found[self.pattern]
        result: torch.Tensor = made[0] if isinstance(made, list) else made
        return result


def skeleton(model_dir: Path) -> Any:
    """The base as a model without weights, on the meta device. Python files of the folder are not run.

    Raises:
        ModelError: transformers knows no such architecture.
    """
    config = load_config(model_dir)
    try:
        with torch.device("meta"):
            return from_config(config, dtype=torch.bfloat16).eval()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(str(model_dir / "config.json"), str(error).partition("\n")[0]) from None


def read_layout(model: Any, stored: Iterable[str]) -> dict[str, Place]:
    """Stored name -> its place, for all that the model has a place for.

    Args:
        model: see `skeleton`.
        stored: names in the files.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    places: dict[str, Place] = {}
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(stored, key=dot_natural_key):  # the order decides which expert is which
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if renamed not in known:
            continue
        if pattern is None:
            places[name] = Place((renamed,))
        else:
            groups.setdefault(renamed, {}).setdefault(pattern, []).append(name)
    for first, sources in groups.items():
        places |= _places(first, sources, converter_of[next(iter(sources))], model)
    return places


def _places(first: str, sources: dict[str, list[str]], converter: Any, model: Any) -> dict[str, Place]:
    """Places of the stored tensors that one conversion brings together.

    Args:
        first: the first parameter that it makes.
        sources: pattern of the converter -> stored names in order.
        converter: transformers', in the direction of loading.
        model: the skeleton.
    """
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist

    made = tuple(first.replace(converter.target_patterns[0], other, 1) for other in converter.target_patterns)
    inverse = deepcopy(converter).reverse_transform()
    begins = converter.operations[0]
    if isinstance(begins, MergeModulelist) and begins.dim == 0:
        cut = Cut.slice
    elif all(isinstance(op, (Chunk, Concatenate)) and op.dim > 0 for op in converter.operations):
        cut = Cut.rows
    else:
        cut = Cut.whole
    places = {}
    for pattern, target in zip(converter.source_patterns, inverse.target_patterns, strict=True):
        for i, name in enumerate(sources.get(pattern, [])):
            own = target.replace("*", "0") if cut is Cut.slice else target
            places[name] = Place(made, cut, i, inverse, own, model.config)
    return places


def plain_layout(stored: Iterable[str], trained: Iterable[str]) -> dict[str, Place]:
    """The layout of a model that transformers does not know: its files name its modules.

    Old files leave out the model's outermost module.
    """
    names = set(stored)
    places = {name: Place((name,)) for name in names}
    for name in trained:
        inner = name.partition(".")[2]
        if name not in names and inner in names:
            places[inner] = Place((name,))
    return places


def keeps_fp32(model: Any) -> Callable[[str], bool]:
    """Tells of which parameters the model keeps fp32 whatever its number format is."""
    patterns = {*model._get_dtype_plan(torch.bfloat16), *ROUTER_AND_MIXING}
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    return lambda name: bool(found.search(name))
