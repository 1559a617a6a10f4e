"""What an assistant thought, apart from what it said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.records import RowFault, optional_text

_FIELDS = ("reasoning_content", "reasoning", "thinking")
_OPEN, _CLOSE = "<think>", "</think>"


def split_reasoning(text: str, what: str) -> tuple[str, str]:
    """(reasoning, text) of an assistant's content that may begin with ``<think>...</think>``.

    White space around the markers belongs to templates, which put their own, so it is dropped; an empty pair of markers
    is no reasoning.

    Raises:
        RowFault: the markers are not closed, or stand elsewhere, where templates would cut the text.
    """
    if _OPEN not in text and _CLOSE not in text:
        return "", text
    inner, rest = "", text
    if text.lstrip().startswith(_OPEN):
        inner, close, rest = text.lstrip()[len(_OPEN) :].partition(_CLOSE)
        if not close:
            raise RowFault("reasoning is not closed", what)
        rest = rest.lstrip()
    for marker in (_OPEN, _CLOSE):
        if marker in inner or marker in rest:
            raise RowFault("a stray reasoning marker", f"{what}: {marker}")
    return inner.strip(), rest


def reasoning_of(turn: Mapping[str, Any], inline: str, what: str) -> str:
    """The reasoning of a turn, given in a field of its own or `inline`.

    Raises:
        RowFault: it is given twice, and not the same.
    """
    found = {inline} if inline else set()
    for field in _FIELDS:
        own = optional_text(turn.get(field), f"{field} of {what}").strip()
        found |= {own} if own else set()
    if len(found) > 1:
        raise RowFault("reasoning is given twice", what)
    for marker in (_OPEN, _CLOSE):
        if any(marker in text for text in found):
            raise RowFault("a stray reasoning marker", f"{what}: {marker}")
    return found.pop() if found else ""


def has_reasoning(turn: Mapping[str, Any]) -> bool:
    """Whether a field of the turn holds reasoning."""
    return any(turn.get(field) for field in _FIELDS)
