"""``{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}``, the OpenAI shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import ConversationFormat
from data_prep.formats.turns import OPENAI, Keys, has_turns
from data_prep.records import Message


class MessagesFormat(ConversationFormat):
    """Turns with role and content. An assistant turn with ``"train": false`` or ``"weight": 0`` is context only."""

    name = "messages"
    required = ("messages",)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by a column 'messages' of turns with role and content."""
        if has_turns(sample.get("messages"), keys):
            return f"column 'messages' holds turns with {keys[0]} and {keys[1]}"
        return None

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """See `ConversationFormat.turns`."""
        return self.named_turns.read(row["messages"], self.theirs("messages"))
