"""A tuning method decides which parameters train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import nn

from train.models.families import Family

Note = Callable[[str], None]


def quiet(text: str) -> None:
    """Tells nobody."""


class Tuning(ABC):
    """Turns a loaded model into the module that trains."""

    name: str

    @abstractmethod
    def apply(self, model: nn.Module, family: Family, note: Note = quiet) -> nn.Module:
        """Sets `requires_grad` on exactly the parameters that train and returns the module to train.

        Args:
            model: of transformers.
            family: its facts.
            note: takes what the user should know of the choice.

        Raises:
            ConfigError: the method cannot be applied to this model.
        """


def count_parameters(module: nn.Module) -> tuple[int, int]:
    """Numbers of trained and of all parameters; a tied one counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
