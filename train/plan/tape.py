"""What a process allocates and frees in the course of a run, each piece with the part that it belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from train.plan.trace import FREED, Event

WEIGHTS = "weights"
MASTERS = "fp32 masters"
GRADIENTS = "gradients"
STATE = "optimizer state"
STEP = "optimizer step, temporary"
ACTIVATIONS = "activations"
GRAPH = "autograd's graph"
LOGITS = "logits and loss"
BUCKETS = "ZeRO buckets"
GATHERED = "ZeRO-3 gathered weights"
COPY = "copy of an asynchronous checkpoint"
BUILD = "building the engine"


@dataclass
class Tape:
    """Allocations of one memory, in order."""

    events: list[Event] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    """By number of the piece."""

    def take(self, part: str, size: int) -> int:
        """A piece; returns its number."""
        self.parts.append(part)
        self.events.append((len(self.parts) - 1, int(size)))
        return len(self.parts) - 1

    def give(self, *numbers: int) -> None:
        """Frees pieces."""
        self.events += [(number, FREED) for number in numbers]

    def play(self, events: Iterable[Event], part_of: Sequence[str], numbers: dict[int, int]) -> None:
        """Appends what was traced elsewhere.

        Args:
            events: in order.
            part_of: by number there.
            numbers: here, by number there, of the pieces that live; kept up to date.
        """
        for number, size in events:
            if size == FREED:
                self.give(numbers.pop(number))
            else:
                numbers[number] = self.take(part_of[number], size)

    @property
    def objects(self) -> set[int]:
        """Numbers of the pieces that are no tensors."""
        return {number for number, part in enumerate(self.parts) if part == GRAPH}

    def peak(self) -> tuple[int, Counter[str]]:
        """The most bytes that live at once, and the parts they are of."""
        sizes: dict[int, int] = {}
        total = most = at = 0
        for place, (number, size) in enumerate(self.events):
            total += size if size != FREED else -sizes[number]
            sizes[number] = size
            if total > most:
                most, at = total, place
        return most, self.parts_after(at)

    def parts_after(self, place: int) -> Counter[str]:
        """Bytes of each part that live after an event."""
        live: dict[int, int] = {}
        for number, size in self.events[: place + 1]:
            if size == FREED:
                del live[number]
            else:
                live[number] = size
        found: Counter[str] = Counter()
        for number, size in live.items():
            found[self.parts[number]] += size
        return found
