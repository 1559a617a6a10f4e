r"""Where an answer stands in a conversation's text.

An answer begins where its prompt ends and goes to its end token, a special token after the assistant's text. Templates
strip texts, so white space at both ends is not compared, but belongs to the answer: the model is asked to write it.
An empty reasoning block that a template puts before an answer without reasoning does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.records import RowFault, ToolCall
from data_prep.scaffold import CHANGED, LEFT_OUT, text_forms

_MARKER = r"[<\[◁][^\s<>\[\]◁▷]*think[^\s<>\[\]◁▷]*[>\]▷]"
_GLUE = re.compile(rf"\s*{_MARKER}\s*", re.IGNORECASE)
"""A reasoning marker: ``<think>``, ``◁/think▷``, ``[THINK]``, ``<|START_THINKING|>`` ..."""
_SPACE = re.compile(r"\s*")
_MARKED_END = re.compile(rf"(?:{_MARKER}\s*)+\Z", re.IGNORECASE)
_CLOSING = re.compile(r"/|end", re.IGNORECASE)

NO_END = "no end token after the answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """Characters of an answer: ``[start, end)`` is learned, and ``[token, end)`` of it is the end token."""

    start: int
    token: int
    end: int


@dataclass(frozen=True, slots=True)
class Part:
    """Something an answer must show, in any of the ways that templates write it."""

    what: str
    forms: tuple[str, ...]

    def find(self, text: str, start: int) -> int:
        """Where it ends in `text`, from `start` on; -1: it is not there."""
        ends = [at + len(form) for form in self.forms if (at := text.find(form, start)) >= 0]
        return min(ends, default=-1)


class AnswerFinder:
    """Finds answers in texts.

    Args:
        specials: texts of the special tokens, longer ones first.
        eos: the tokenizer's end token.
        block: the empty reasoning block that the template puts between a prompt and an answer without reasoning, as
            far as an example shows it; others are recognised by their markers.
    """

    def __init__(self, specials: list[str], eos: str | None, block: str = "") -> None:
        any_special = "|".join(map(re.escape, specials)) or r"(?!)"
        self._special = re.compile(any_special)
        self._end = re.compile(rf"\s*({any_special})")
        self._eos = eos
        self._block = block

    def content(self, text: str, start: int, content: str) -> Answer:
        """An answer that is its content and nothing else.

        Raises:
            RowFault: it does not stand at `start` of `text`, or no end token follows it.
        """
        for at in (start, *self.blocks(text, start)):
            body_end = _stands_at(text, at, content)
            if body_end is not None:
                return self._ended(text, at, body_end)
        raise RowFault(CHANGED, f"{content.strip()[:20]!r} became {text[start : start + 20]!r}")

    def parts(self, text: str, start: int, parts: list[Part], *, reasoned: bool) -> tuple[Answer, bool]:
        """An answer of several parts, the last turn of `text`; and whether it has its end token there.

        Some families end a turn with the token that begins the next one; `Answer.end` is then where the text ends.

        Args:
            text: of a conversation that ends with the answer.
            start: where the prompt ends.
            parts: what must be there, in this order.
            reasoned: whether the first of them is reasoning; else an empty reasoning block before them is context.

        Raises:
            RowFault: a part is not there.
        """
        starts = [start] if reasoned else [*self.blocks(text, start), start]
        start, at = next(found for begin in starts if (found := _in_order(text, begin, parts, last=begin == start)))
        ends = list(self._special.finditer(text, at))
        token = next((match for match in ends if match[0] == self._eos), None)
        if token is None and ends and not text[ends[-1].end() :].strip():
            token = ends[-1]
        if token is not None:
            return Answer(start, token.start(), token.end()), True
        end = len(text.rstrip())
        return Answer(start, end, end), False

    def again(self, text: str, start: int, said: str, token: int) -> Answer:
        """What `parts` found, in a longer text of the conversation.

        Args:
            text: of the conversation.
            start: where the prompt ends.
            said: the answer.
            token: where in `said` the end token begins; at its end if the end token must follow yet.

        Raises:
            RowFault: it does not stand there, or no end token follows it.
        """
        begin = next((at for at in (start, *self.blocks(text, start)) if text.startswith(said, at)), None)
        if begin is None:
            raise RowFault(CHANGED, f"{said[:20]!r} became {text[start : start + 20]!r}")
        if token == len(said):
            return self._ended(text, begin, begin + len(said))
        return Answer(begin, begin + token, begin + len(said))

    def blocks(self, text: str, start: int) -> list[int]:
        """Where an empty reasoning block that begins at `start` may end: the template's own, then the longest."""
        ends: list[int] = []
        while match := _GLUE.match(text, ends[-1] if ends else start):
            ends.append(match.end())
        own = [start + len(self._block)] if self._block and text.startswith(self._block, start) else []
        return own + ends[::-1]

    def _ended(self, text: str, start: int, body_end: int) -> Answer:
        match = self._end.match(text, body_end)
        if match is None:
            raise RowFault(NO_END, f"followed by {text[body_end : body_end + 20]!r}")
        return Answer(start, match.start(1), match.end())


def without_marker(prompt: str) -> tuple[str | None, bool]:
    """The prompt without the reasoning markers that end it, None if none do; and whether they leave a block open."""
    match = _MARKED_END.search(prompt)
    return (None, False) if match is None else (prompt[: match.start()], _CLOSING.search(match[0]) is None)


def _stands_at(text: str, start: int, content: str) -> int | None:
    """Where `content` ends, if it stands at `start`: as it is, or stripped and behind white space."""
    if text.startswith(content, start):
        return start + len(content)
    body = content.strip()
    begin = _SPACE.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing, too
    return begin + len(body) if text.startswith(body, begin) else None


def _in_order(text: str, start: int, parts: list[Part], *, last: bool) -> tuple[int, int] | None:
    """`start`, and where the last of the parts ends; None if one is missing, which is a fault at the last chance."""
    at = start
    for part in parts:
        at = part.find(text, at)
        if at < 0 and last:
            raise RowFault(LEFT_OUT, part.what)
        if at < 0:
            return None
    return start, at


def parts_of(reasoning: str, content: str, calls: tuple[ToolCall, ...]) -> list[Part]:
    """What an answer with reasoning or calls must show, in this order."""
    said = [("reasoning", reasoning.strip()), ("content", content.strip())]
    parts = [Part(what, (text,)) for what, text in said if text]
    for number, call in enumerate(calls, start=1):
        parts += _call_parts(call, f"call {number}")
    return parts


def _call_parts(call: ToolCall, what: str) -> Iterator[Part]:
    yield Part(f"name of {what}", tuple(text_forms(call.name)))
    yield from (Part(f"arguments of {what}", forms) for forms in _leaves(call.arguments))


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Keys and leaves of a JSON value, each in the forms it may be written in."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield tuple(text_forms(key))
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield tuple(text_forms(value)) if isinstance(value, str) else (json.dumps(value), str(value))
