"""What rendering makes of records: token ids and the spans to learn."""

from __future__ import annotations

from dataclasses import dataclass

Span = tuple[int, int]
"""Half-open; of characters or of token indices."""


@dataclass(frozen=True, slots=True)
class ImageUse:
    """An image where a sample shows it."""

    sha256: str
    """Of its bytes, which also names its file."""
    grid: tuple[int, int, int]
    """Patches: frames (1), rows, columns."""
    source: str = ""
    """Path that it was read from; empty: the record held it."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation or a text as the model will see it."""

    id: str
    """``file:line``; of further samples of one record ``file:line/2`` and so on."""
    input_ids: list[int]
    spans: list[Span]
    """Token indices learned as targets: half-open, sorted, disjoint; never index 0, which nothing predicts."""
    cut: int = 0
    """Tokens cut away because they were too many."""
    images: tuple[ImageUse, ...] = ()
    """In the order of their tokens."""

    @property
    def supervised(self) -> int:
        """Number of tokens learned."""
        return sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True)
class PairSample:
    """Two answers to one prompt; before they were cut, both begin with the same tokens up to their first spans."""

    id: str
    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, slots=True)
class VoteSample:
    """A conversation and whether its answer was liked."""

    id: str
    sample: Sample
    liked: bool


AnySample = Sample | PairSample | VoteSample
