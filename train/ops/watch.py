"""What hooks on a model may count, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Watch:
    """Hears the model's modules during the forward pass of a micro-batch only."""

    _listening = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """During the forward pass of a micro-batch: what a later recomputation finds is not counted again."""
        self._listening = True
        try:
            yield
        finally:
            self._listening = False
