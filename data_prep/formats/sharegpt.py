"""``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``, with tools in a plain form.

A function call is something the model says, so it is an assistant turn and learned; an observation is a tool turn.
The `tools` column is written into the system turn: every template shows that, where few know a `tools` argument.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import Format, has_turns, turns_of
from data_prep.records import (
    Message,
    Origin,
    Record,
    RowFault,
    conversation,
    kind_of,
    optional_text,
    text_of,
    with_system,
)

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}

TOOLS_TEXT = """You may call these functions. To call one, answer only with a JSON object of its name and arguments.
{tools}"""


class ShareGptFormat(Format):
    """Turns with from and value; optional columns `system` and `tools` (JSON text, or the objects themselves)."""

    name = "sharegpt"
    required = ("conversations",)
    optional = ("system", "tools")

    @classmethod
    def recognise(cls, sample: Mapping[str, Any]) -> str | None:
        """Recognised by a column 'conversations' of turns with from and value."""
        if has_turns(sample.get("conversations"), ("from", "value")):
            return "column 'conversations' holds turns with from and value"
        return None

    def record(self, row: Mapping[str, Any], origin: Origin) -> Record:
        """See `Format.record`."""
        turns = turns_of(row["conversations"], self.theirs("conversations"), ("from", "value"))
        messages = [_message(turn, f"turn {number}") for number, turn in enumerate(turns, start=1)]
        own_system = optional_text(row["system"], self.theirs("system"))
        messages = with_system(messages, own_system or self.system)
        return conversation(origin, _with_tools(messages, _tools(row["tools"], self.theirs("tools"))))


def _message(turn: dict[str, Any], what: str) -> Message:
    name = text_of(turn["from"], f"from of {what}")
    role = _ROLES.get(name)
    if role is None:
        raise RowFault("unknown role", f"{what}: {name!r}; known: {', '.join(_ROLES)}")
    return Message(role, text_of(turn["value"], f"value of {what}"), train=role == "assistant")


def _tools(value: Any, column: str) -> str:
    """The tools as JSON text; empty where there are none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowFault("tools are not JSON", f"{column}: {error}") from None
    if not value:
        return ""
    if not isinstance(value, list | dict):
        raise RowFault("tools are not JSON", f"{column} is {kind_of(value)}")
    return text_of(json.dumps(value, ensure_ascii=False), column)


def _with_tools(messages: list[Message], tools: str) -> list[Message]:
    if not tools:
        return messages
    text = TOOLS_TEXT.format(tools=tools)
    if messages and messages[0].role == "system":
        return [Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:]]
    return [Message("system", text), *messages]
