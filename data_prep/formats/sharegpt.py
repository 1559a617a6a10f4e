"""``{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``.

A `function_call` is something the model says, so it is an assistant turn and learned; an `observation` is a tool turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import ConversationFormat
from data_prep.formats.turns import OPENAI, SHAREGPT, Keys, has_turns
from data_prep.records import Message


class ShareGptFormat(ConversationFormat):
    """Turns with from and value."""

    name = "sharegpt"
    required = ("conversations",)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by a column 'conversations' of turns with from and value."""
        if has_turns(sample.get("conversations"), SHAREGPT):
            return "column 'conversations' holds turns with from and value"
        return None

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """See `ConversationFormat.turns`."""
        return self.sharegpt_turns.read(row["conversations"], self.theirs("conversations"))
