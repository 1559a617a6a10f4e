"""What a template writes around the texts of an answer, told by rendering the answer with placeholders for them.

That an answer's texts all occur in what the template made of it proves little where they are short: an "a" is found in
any JSON. But what is made of placeholders, with the texts put in their places, must be what is made of the texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from data_prep.records import Message, RowFault, ToolCall

LEFT_OUT = "the chat template leaves out a part of the answer"
CHANGED = "the chat template changes the assistant's text"

_PLACEHOLDER = re.compile(r"xk8Qf2Lw(\d{4})")


class Placeholders:
    """An answer whose texts are placeholders.

    Args:
        message: an assistant's turn.

    Attributes:
        message: the turn with placeholders for reasoning, content, names and texts in the arguments of calls.
    """

    def __init__(self, message: Message) -> None:
        self._texts: list[tuple[str, str]] = []
        self.message = replace(
            message,
            reasoning=self._held("reasoning", message.reasoning),
            content=self._held("content", message.content),
            calls=tuple(self._call(call, number) for number, call in enumerate(message.calls, start=1)),
        )

    def check(self, held: str, text: str) -> None:
        """Compares what a template made of the placeholders with what it made of the texts.

        Raises:
            RowFault: a text is not there, or more than white space at its ends and JSON's escapes is different.
        """
        first, *rest = _PLACEHOLDER.split(held)
        shown = [self._texts[int(number)] for number in rest[::2]]
        for part in self._texts:
            if part not in shown:
                raise RowFault(LEFT_OUT, part[0])
        if not text.startswith(first):
            raise RowFault(CHANGED, f"{first[:20]!r} became {text[:20]!r}")
        at = len(first)
        for (what, original), after in zip(shown, rest[1::2], strict=True):
            ends = (at + len(form) for form in text_forms(original) if text.startswith(form, at))
            at = next((end + len(after) for end in ends if text.startswith(after, end)), -1)
            if at < 0:
                raise RowFault(CHANGED, what)
        if at != len(text):
            raise RowFault(CHANGED, f"followed by {text[at : at + 20]!r}")

    def _held(self, what: str, text: str) -> str:
        if not text.strip():  # templates ask whether there is any
            return text
        self._texts.append((what, text))
        return f"xk8Qf2Lw{len(self._texts) - 1:04}"

    def _call(self, call: ToolCall, number: int) -> ToolCall:
        name = self._held(f"name of call {number}", call.name)
        return replace(call, name=name, arguments=self._leaves(call.arguments, f"arguments of call {number}"))

    def _leaves(self, value: Any, what: str) -> Any:
        if isinstance(value, str):
            return self._held(what, value)
        if isinstance(value, dict):
            return {key: self._leaves(inner, what) for key, inner in value.items()}
        return [self._leaves(inner, what) for inner in value] if isinstance(value, list) else value


def text_forms(text: str) -> Iterator[str]:
    """A text as templates write it: as it stands, stripped in some way; as JSON writes that, and JSON inside JSON."""
    bare = dict.fromkeys(
        (text, text.strip(), text.lstrip(), text.rstrip(), text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
    )
    yield from bare
    yield from (form for stripped in bare for form in _escaped(stripped))


def _escaped(text: str) -> tuple[str, str, str]:
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    return once, json.dumps(text)[1:-1], json.dumps(once, ensure_ascii=False)[1:-1]
