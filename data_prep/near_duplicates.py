"""Texts that are nearly the same, by the Jaccard index of their word shingles, computed exactly.

A. Broder, "On the resemblance and containment of documents" (1997). An inverted index makes it fast for thousands
of texts; corpora need the estimate of `minhash.py`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from data_prep import shingles as hashed

Shingles = frozenset[int]


def shingles(text: str, size: int) -> Shingles:
    """Hashes of the runs of `size` words; a shorter text is one shingle of all its words."""
    return frozenset(hashed.shingles([text], size)[0].tolist())


def near_duplicates(texts: Sequence[Shingles], held_out: Sequence[Shingles], threshold: float) -> set[int]:
    """Positions of `texts` whose Jaccard index with any of `held_out` is `threshold` or more."""
    holders: dict[int, list[int]] = defaultdict(list)
    for k, held in enumerate(held_out):
        for shingle in held:
            holders[shingle].append(k)
    found = set()
    for i, text in enumerate(texts):
        shared = Counter(k for shingle in text for k in holders.get(shingle, ()))
        for k, both in shared.items():
            if both / (len(text) + len(held_out[k]) - both) >= threshold:
                found.add(i)
                break
    return found
