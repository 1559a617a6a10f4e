"""Texts that are nearly the same, by the Jaccard index of their word shingles, computed exactly.

A. Broder, "On the resemblance and containment of documents" (1997). An inverted index makes it fast for thousands
of texts; it does not estimate by MinHash, which corpora would need.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

_WORD = re.compile(r"\w+")

Shingles = frozenset[Hashable]


def shingles(text: str, size: int) -> Shingles:
    """Runs of `size` words, without case and punctuation; a shorter text is one shingle of all its words."""
    words = _WORD.findall(text.lower())
    if not words:
        return frozenset()
    return frozenset(tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))


def near_duplicates(texts: Sequence[Shingles], held_out: Sequence[Shingles], threshold: float) -> set[int]:
    """Positions of `texts` whose Jaccard index with any of `held_out` is `threshold` or more."""
    holders: dict[Hashable, list[int]] = defaultdict(list)
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
