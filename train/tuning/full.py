"""Full fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from configs.errors import ConfigError
from configs.schema.tuning import Frozen, FullConfig
from train.models.families import Family
from train.models.families.parts import Part, is_vision, weights_of
from train.tuning.base import Note, Tuning, quiet

_DEFAULT = FullConfig().frozen


class FullTuning(Tuning):
    """All parameters train but those of frozen parts, and those that no gradient reaches."""

    name = "full"

    def __init__(self, cfg: FullConfig) -> None:
        self.cfg = cfg

    def apply(self, model: nn.Module, family: Family, note: Note = quiet) -> nn.Module:
        """The model itself.

        A parameter without a gradient would not stay as it is: weight decay shrinks it. So it is frozen.

        Raises:
            ConfigError: a part that is to be frozen is not there, or nothing is left to train.
        """
        model.requires_grad_(True)
        for part in self.cfg.frozen:
            count = _freeze(model, _belongs(part, model, family))
            if count:
                note(f"full: {part.value} stays as it is ({count:,} parameters; tuning.frozen)")
            elif self.cfg.frozen != _DEFAULT:
                raise ConfigError("tuning.frozen", f"'{part.value}' is no part of this model", remedy="leave it out")
        if family.untrained:
            pattern = re.compile(family.untrained)
            count = _freeze(model, lambda name: bool(pattern.search(name)))
            if count:
                note(f"full: {count:,} parameters stay as they are: {family.untrained_reason}")
        if not any(p.requires_grad for p in model.parameters()):
            raise ConfigError("tuning.frozen", "nothing is left to train", remedy="freeze less")
        return model


def _belongs(part: Frozen, model: nn.Module, family: Family) -> Callable[[str], bool]:
    if part is Frozen.vision:
        return is_vision
    if part is Frozen.embeddings:
        tables = [getattr(model, get)() for get in ("get_input_embeddings", "get_output_embeddings")]
        held = {id(p) for table in tables if table is not None for p in table.parameters()}
        embedding = {n for n, p in model.named_parameters() if id(p) in held}
        return embedding.__contains__
    found = [w for w in weights_of(model, family) if Part[part.value] in w.parts]
    names, linear = {w.name for w in found}, {w.module for w in found if w.linear}
    return lambda name: name in names or name.rpartition(".")[0] in linear  # biases go with their weights


def _freeze(model: nn.Module, belongs: Callable[[str], bool]) -> int:
    """Number of parameters that trained before and do no more."""
    count = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and belongs(name):
            parameter.requires_grad_(False)
            count += parameter.numel()
    return count
