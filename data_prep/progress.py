"""How far a preparation is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Stage = Literal["survey", "prepare"]
"""`survey`: a first pass that only some settings need (deduplication, splits by group or at random)."""


@dataclass(frozen=True, slots=True)
class PrepProgress:
    """Figures since the stage began; what an earlier, interrupted preparation had done already is part of them."""

    stage: Stage
    rows: int
    """Read so far, rejects included."""
    tokens: int
    """Written so far; 0 in a survey."""
    bytes_done: int
    """Of the source files; what `bytes_total` minus this will take is the time that remains."""
    bytes_total: int
    resumed_bytes: int = 0
    """Part of `bytes_done` that was there when this process began: it says nothing about speed."""


Progress = Callable[[PrepProgress], None]
"""Called with the figures a few times a second at most, and once at the end of each stage."""
