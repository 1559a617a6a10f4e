"""``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, the OpenAI shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import Format, has_turns, turns_of
from data_prep.records import Message, Origin, Record, RowFault, conversation, kind_of, text_of, with_system

_ROLE_NAMES = {"developer": "system", "function": "tool"}
_NOT_READ = ("tool_calls", "function_call", "reasoning_content", "reasoning", "images", "audio")
"""Fields that would change what the model says or sees: a row that fills one is rejected, not read in part."""


class MessagesFormat(Format):
    """Turns with role and content. An assistant turn with ``"train": false`` or ``"weight": 0`` is context only."""

    name = "messages"
    required = ("messages",)
    optional = ("tools",)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any]) -> str | None:
        """Recognised by a column 'messages' of turns with role and content."""
        if has_turns(sample.get("messages"), ("role", "content")):
            return "column 'messages' holds turns with role and content"
        return None

    def record(self, row: Mapping[str, Any], origin: Origin) -> Record:
        """See `Format.record`."""
        if row["tools"]:
            raise RowFault("tools are not read in this format", "column tools")
        turns = turns_of(row["messages"], self.theirs("messages"), ("role", "content"))
        messages = [_message(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
        return conversation(origin, with_system(messages, self.system))


def _message(turn: dict[str, Any], what: str) -> Message:
    for field in _NOT_READ:
        if turn.get(field):
            raise RowFault(f"'{field}' is not read", what)
    role = text_of(turn["role"], f"role of {what}")
    role = _ROLE_NAMES.get(role, role)
    return Message(role, _content(turn["content"], what), train=role == "assistant" and _trained(turn, what))


def _content(content: Any, what: str) -> str:
    """Text, or a list of parts that are all text."""
    if not isinstance(content, list):
        return text_of(content, f"content of {what}")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else kind_of(part)
            raise RowFault("a part of the content is not text", f"{what}: {kind}")
        texts.append(text_of(part.get("text"), f"content of {what}"))
    return "".join(texts)


def _trained(turn: dict[str, Any], what: str) -> bool:
    for field in ("train", "weight"):
        value = turn.get(field)
        if value is not None and value not in (0, 1):
            raise RowFault(f"'{field}' is neither 0 nor 1", f"{what}: {value!r}")
        if value is not None and not value:
            return False
    return True
