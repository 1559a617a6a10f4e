"""``{"prompt": ..., "completion": ...}``: one question, one answer; each a text, or turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import ConversationFormat
from data_prep.formats.turns import OPENAI, Keys
from data_prep.records import Message, as_context


class PromptCompletionFormat(ConversationFormat):
    """The prompt is a user turn, or turns that are context; the completion is the assistant's."""

    name = "prompt_completion"
    required = ("prompt", "completion")

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by the columns 'prompt' and 'completion'."""
        return "columns 'prompt' and 'completion'" if {"prompt", "completion"} <= sample.keys() else None

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """See `ConversationFormat.turns`."""
        prompt = as_context(self.said(row["prompt"], "user", self.theirs("prompt")))
        return prompt + self.said(row["completion"], "assistant", self.theirs("completion"))
