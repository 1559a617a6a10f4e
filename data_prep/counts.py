"""What the manifest says of a split: rows, tokens, lengths, per source and in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.packing import fill
from data_prep.rendered import AnySample
from data_prep.shards import sequences

_BINS = 32
_ROW_LENGTHS = (1024, 2048, 4096, 8192)
"""Common lengths of a training row, for which the fill is foretold."""


@dataclass
class Counts:
    """Of some rows. Lengths are those of token sequences, of which a pair has two."""

    rows: int = 0
    supervised: int = 0
    cut_rows: int = 0
    """Rows that were truncated."""
    cut_tokens: int = 0
    images: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a sequence -> how many sequences have so many."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(length * count for length, count in self.lengths.items())

    def add(self, sample: AnySample) -> None:
        """Counts one sample."""
        self.rows += 1
        cut = 0
        for sequence in sequences(sample):
            self.lengths[len(sequence.input_ids)] += 1
            self.supervised += sequence.supervised
            cut += sequence.cut
            self.images += len(sequence.images)
        self.cut_rows += cut > 0
        self.cut_tokens += cut

    def merge(self, other: Counts) -> None:
        """Adds other rows' counts."""
        self.rows += other.rows
        self.supervised += other.supervised
        self.cut_rows += other.cut_rows
        self.cut_tokens += other.cut_tokens
        self.images += other.images
        self.lengths.update(other.lengths)

    def to_json(self) -> list[Any]:
        """For a journal."""
        lengths = sorted(self.lengths.items())
        return [self.rows, self.supervised, self.cut_rows, self.cut_tokens, lengths, self.images]

    @classmethod
    def from_json(cls, value: list[Any]) -> Counts:
        """Undoes `to_json`."""
        rows, supervised, cut_rows, cut_tokens, lengths, images = [*value, 0][:6]  # journals of old had no images
        return cls(rows, supervised, cut_rows, cut_tokens, images, Counter(dict(lengths)))


def split_entry(by_source: Mapping[str, Counts], max_length: int, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """A split's entry of the manifest.

    Its `length_histogram` maps the upper edge of a bin, in tokens and inclusive, to the sequences in it; bins are
    equally wide, and those between the first and the last are there even if empty. `packing_fill` maps the length of a
    training row to the share of it that packed sequences fill.

    Args:
        by_source: source name -> counts of its rows in this split.
        max_length: tokens; sets the widths of the bins.
        shards: see `ShardWriter.shards`.
    """
    total = Counts()
    for counts in by_source.values():
        total.merge(counts)
    longest = max(total.lengths)
    width = max(1, -(-max_length // _BINS))
    bins: Counter[int] = Counter()
    for length, count in total.lengths.items():
        bins[-(-length // width) * width] += count
    rows = sorted({length for length in (*_ROW_LENGTHS, max_length) if length >= longest})
    return {
        **_figures(total),
        "max_length": longest,
        "length_histogram": {str(edge): bins[edge] for edge in range(min(bins), max(bins) + 1, width)},
        "truncated": {"rows": total.cut_rows, "tokens": total.cut_tokens},
        "by_source": {name: _figures(counts) for name, counts in sorted(by_source.items())},
        "packing_fill": {str(length): round(fill(total.lengths, length), 4) for length in rows},
        "shards": shards,
    }


def _figures(counts: Counts) -> dict[str, int]:
    figures = {"rows": counts.rows, "tokens": counts.tokens, "supervised_tokens": counts.supervised}
    return figures | ({"images": counts.images} if counts.images else {})
