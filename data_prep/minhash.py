"""MinHash signatures: two records' shares of equal values estimate the Jaccard index of their shingles.

A. Broder, "On the resemblance and containment of documents" (1997); P. Li and A. König, "b-Bit Minwise Hashing" (2010):
of each minimum one byte is kept, which costs next to nothing in precision and makes a signature a quarter as large.

datatrove's own MinHash blocks are not used. They take words from spaCy or NLTK, with models to download and one
language for a whole data set; compute one document at a time in Python; take whole chains of near-duplicates for one
cluster; and keep any of it, whatever its split. Its executors run this code instead (`corpus`), so that one machine
and many give the same result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from configs.schema.clean import DedupConfig
from data_prep.records import AnyRecord, Vote, acts_of, texts_of
from data_prep.shingles import mixed, shingles

MARGIN = 0.05
"""Records that are this much more alike than the threshold are found with a probability above 0.95."""

_MAX_CHARS = 2**20
"""Of a longer record only the beginning is looked at, which bounds the memory."""
_BATCH_CHARS = 2**18
"""Records are signed together while they have fewer characters, so that the arrays stay in the processor's cache."""
_BY_CHANCE = 1 / 256
"""Share of a signature's bytes that agree in unlike records."""


@dataclass(frozen=True)
class Banding:
    """How long a signature is and how it is cut; records that agree in all values of a band are compared."""

    threshold: float
    width: int
    """Bytes of a signature."""
    rows: int
    """Bytes of a band."""

    @property
    def bands(self) -> int:
        """Their number."""
        return self.width // self.rows

    @property
    def needed(self) -> float:
        """Equal bytes from which two signatures count as near."""
        return self.width * (self.threshold + (1 - self.threshold) * _BY_CHANCE) - 1e-9

    @classmethod
    def of(cls, threshold: float) -> Banding:
        """The smallest that finds what `MARGIN` promises.

        Of pairs with an index of s = threshold + `MARGIN`, an estimate from k values falls below the threshold with
        less than 2.3 % probability if `MARGIN` is two standard deviations, sqrt(s (1 - s) / k); and they agree in no
        band with probability (1 - s^rows)^bands, held below 0.5 %.
        """
        s = min(1.0, threshold + MARGIN)
        width = next((k for k in (256, 384) if 2 * sqrt(s * (1 - s) / k) <= MARGIN), 512)
        rows = max(r for r in range(1, 17) if (1 - s**r) ** (width // r) <= 0.005)
        return cls(threshold, width, rows)


class Signer:
    """Makes signatures, about 10,000 of records of 1 kB a second and core.

    Args:
        cfg: `threshold` and `shingle_words` decide what is made.
    """

    def __init__(self, cfg: DedupConfig) -> None:
        self.width = Banding.of(cfg.threshold).width
        self._size = cfg.shingle_words

    def __call__(self, records: Sequence[AnyRecord]) -> NDArray[np.uint8]:
        """Signatures, [records, `width`]. All zeros: the record has no words and is near to none."""
        parts = [self._signed(batch) for batch in _batches(records)]
        return np.concatenate(parts) if parts else np.zeros((0, self.width), np.uint8)

    def _signed(self, batch: list[tuple[str, bool | None]]) -> NDArray[np.uint8]:
        hashes, starts = shingles([text for text, _ in batch], self._size)
        made = np.zeros((len(batch), self.width), np.uint8)
        if not len(hashes):
            return made
        counts = np.diff(starts)
        salts = np.fromiter((_SALT[liked] for _, liked in batch), np.uint32, len(batch))
        values = (hashes >> np.uint64(32)).astype(np.uint32) ^ np.repeat(salts, counts)
        some = np.flatnonzero(counts)
        made[some] = _minima(values, starts[:-1][some], self.width)
        return made


_SALT = {None: 0, True: 0x5BD1E995, False: 0x1B873593}
"""The same answer liked and disliked is no repetition."""


def _batches(records: Sequence[AnyRecord]) -> Iterator[list[tuple[str, bool | None]]]:
    """Whole texts of records, and whether each was liked."""
    batch: list[tuple[str, bool | None]] = []
    chars = 0
    for record in records:
        text = "\n".join([*texts_of(record), *acts_of(record)])[:_MAX_CHARS]
        if batch and chars + len(text) > _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        batch.append((text, record.liked if isinstance(record, Vote) else None))
        chars += len(text)
    if batch:
        yield batch


def _minima(values: NDArray[np.uint32], starts: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """One byte of the minimum of each record's values under `width` permutations, [records, width]."""
    xors, factors = _permutations(width)
    least = np.empty((width, len(starts)), np.uint32)
    permuted = np.empty_like(values)
    for j in range(width):
        np.bitwise_xor(values, xors[j], out=permuted)
        np.multiply(permuted, factors[j], out=permuted)
        np.minimum.reduceat(permuted, starts, out=least[j])
    least ^= least >> np.uint32(16)
    least *= np.uint32(0x7FEB352D)
    made: NDArray[np.uint8] = (least >> np.uint32(24)).astype(np.uint8).T
    return made


@cache
def _permutations(width: int) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Numbers that make x -> (x ^ xors[j]) * factors[j] a permutation of 32-bit numbers, as the factors are odd."""
    drawn = (mixed(np.arange(1, 2 * width + 1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return drawn[:width], drawn[width:] | np.uint32(1)
