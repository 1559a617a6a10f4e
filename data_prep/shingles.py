"""Shingles of texts: runs of words, hashed, many texts at a time.

A word is a run of letters, digits and marks in scripts that put spaces between words. In those that put none (Chinese,
Japanese, Thai, Lao, Khmer, Burmese) every character is a word of its own. Case, white space, punctuation and
full-width forms make no difference. A. Broder, "On the resemblance and containment of documents" (1997).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

_SEPARATOR, _PART_OF_WORD, _WORD = 0, 1, 2

WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # iteration mark, ideographic zero
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
"""Code points, first and last, of scripts that put no spaces between words."""
_LAST = 0x323B0
"""From here on there are no letters (Unicode 17)."""

_BASE = np.uint64(0x9E3779B97F4A7C15)
_BASE_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))
_STEP = np.uint64(0xD1342543DE82EF95)


def normal(text: str) -> str:
    """Without case and full-width forms."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def letters(text: str) -> bytes:
    """What is left of a text without case, white space and punctuation; UTF-8."""
    text = normal(text)
    if text.isascii():  # as below, in a tenth of the time
        return text.encode().translate(None, _ascii_separators())
    codes = _codes(text)
    return bytes(codes[_kinds(codes) != _SEPARATOR]).decode("utf-32-le").encode()


def shingles(texts: Sequence[str], size: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of all runs of `size` words in each text; a shorter text is one shingle of all its words.

    Args:
        texts: they may be of any length; up to 85 bytes of memory are needed per character of all together.
        size: words of a shingle.

    Returns:
        Hashes, [number of shingles], and where each text's begin, [number of texts + 1]. The same on every machine.
    """
    normalised = [normal(text) for text in texts]
    first, hashed = _words(_codes("\n".join(normalised)))
    lengths = np.fromiter((len(text) + 1 for text in normalised), np.int64, len(texts))
    bounds = np.searchsorted(first, np.concatenate([[0], np.cumsum(lengths)]))
    counts = np.diff(bounds)

    # Each text is followed by size - 1 empty words, so that no run reaches into the next text.
    text_of_word = np.repeat(np.arange(len(texts)), counts)
    place = np.arange(len(hashed)) + text_of_word * (size - 1)
    padded = np.zeros(len(hashed) + len(texts) * (size - 1) + size, np.uint64)
    padded[place] = hashed
    runs = np.maximum(counts - size + 1, np.minimum(counts, 1))
    ends = np.cumsum(runs)
    starts = np.concatenate([[0], ends])
    at = np.arange(starts[-1]) + np.repeat(bounds[:-1] + np.arange(len(texts)) * (size - 1) - starts[:-1], runs)
    hashes = np.zeros(len(at), np.uint64)
    for k in range(size):
        hashes = hashes * _STEP + padded[at + k]
    return mixed(hashes), starts


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Every bit of the result depends on every bit of the value; the finaliser of SplitMix64 (Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _codes(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def _kinds(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    return _table()[np.minimum(codes, _LAST)]


@cache
def _table() -> NDArray[np.uint8]:
    """Code point -> what it is."""
    table = np.fromiter((_is_part_of_word(chr(code)) for code in range(_LAST + 1)), np.uint8, _LAST + 1)
    for start, end in WITHOUT_SPACES:
        table[start : end + 1] *= _WORD
    return table


@cache
def _ascii_separators() -> bytes:
    return bytes(np.flatnonzero(_table()[:128] == _SEPARATOR).astype(np.uint8))


def _is_part_of_word(character: str) -> bool:
    return character == "_" or character.isalnum() or unicodedata.category(character)[0] == "M"


def _words(codes: NDArray[np.uint32]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Where each word begins, and its hash: a polynomial in the character's place, by sums over prefixes."""
    kinds = np.concatenate([[_SEPARATOR], _kinds(codes), [_SEPARATOR]])
    here, before, after = kinds[1:-1], kinds[:-2], kinds[2:]
    alone, part = here == _WORD, here == _PART_OF_WORD
    first = np.flatnonzero(alone | (part & (before != _PART_OF_WORD)))
    end = np.flatnonzero(alone | (part & (after != _PART_OF_WORD))) + 1
    powers = np.full(len(codes) + 1, _BASE)
    powers[0] = 1
    np.cumprod(powers, out=powers)
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(mixed(codes.astype(np.uint64) + _STEP) * powers[:-1], out=sums[1:])
    back = np.full(len(codes) + 1, _BASE_INVERSE)
    back[0] = 1
    np.cumprod(back, out=back)
    return first, mixed((sums[end] - sums[first]) * back[first])
