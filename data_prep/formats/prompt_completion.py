"""``{"prompt": ..., "completion": ...}``: one question, one answer; `system` may stand beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import Format
from data_prep.records import Message, Origin, Record, conversation, optional_text, text_of, with_system


class PromptCompletionFormat(Format):
    """The prompt is a user turn, the completion the assistant's."""

    name = "prompt_completion"
    required = ("prompt", "completion")
    optional = ("system",)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any]) -> str | None:
        """Recognised by the columns 'prompt' and 'completion'."""
        return "columns 'prompt' and 'completion'" if {"prompt", "completion"} <= sample.keys() else None

    def record(self, row: Mapping[str, Any], origin: Origin) -> Record:
        """See `Format.record`."""
        system = optional_text(row["system"], self.theirs("system"))
        messages = [
            Message("user", text_of(row["prompt"], self.theirs("prompt"))),
            Message("assistant", text_of(row["completion"], self.theirs("completion")), train=True),
        ]
        return conversation(origin, with_system(messages, system or self.system))
