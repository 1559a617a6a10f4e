"""Long texts in pieces whose tokens, end to end, are those of the whole text.

A tokenizer takes some 110 bytes of memory for each byte that it is given at once: for a text of 16 MiB 1.7 GiB, and
58 MiB, mostly token ids, if it is given in pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from data_prep.records import RowFault

MAX_WHOLE = 4 * 2**20
"""Characters of the longest text that a tokenizer is given at once."""
PIECE = 2**18
"""Characters of a piece, at least."""
_WINDOW = 64
"""Characters on either side of a cut that are looked at for whether they are tokenised alone as together."""
_TRIES = 64
_BORDER = re.compile(r"(?<=\w)(?=\W)")
"""The end of a word, where most tokenizers part a text before they look for tokens."""


def refuse_longer(characters: int, what: str) -> None:
    """What must be tokenised whole, and takes too much memory.

    Raises:
        RowFault: it is longer than `MAX_WHOLE`.
    """
    if characters > MAX_WHOLE:
        raise RowFault("row too long", f"{what} of {characters:,} characters, above {MAX_WHOLE:,}")


def is_long(text: str) -> bool:
    """Whether a text is worth cutting."""
    return len(text) > 2 * PIECE


def pieces_of(text: str, ids: Callable[[Sequence[str]], list[list[int]]]) -> list[str]:
    """The text in pieces; what has no end of a word that could be cut at stays whole.

    Args:
        text: of any length.
        ids: token ids of texts, without anything around them.
    """
    pieces, at = [], 0
    while len(text) - at > 2 * PIECE:
        cut = next((place for place in _borders(text, at + PIECE) if _adds_up(text, place, ids)), None)
        if cut is None:
            break
        pieces.append(text[at:cut])
        at = cut
    return [*pieces, text[at:]]


def _borders(text: str, begin: int) -> Iterator[int]:
    return (match.start() for match in islice(_BORDER.finditer(text, begin), _TRIES))


def _adds_up(text: str, place: int, ids: Callable[[Sequence[str]], list[list[int]]]) -> bool:
    left, right = text[place - _WINDOW : place], text[place : place + _WINDOW]
    both, left_ids, right_ids = ids([left + right, left, right])
    return both == left_ids + right_ids
