"""``{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import Format
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


class AlpacaFormat(Format):
    """Instruction and input, joined by a line break, are the question. The answers of `history` are learned too."""

    name = "alpaca"
    required = ("instruction", "output")
    optional = ("input", "system", "history")

    @classmethod
    def recognise(cls, sample: Mapping[str, Any]) -> str | None:
        """Recognised by the columns 'instruction' and 'output'."""
        return "columns 'instruction' and 'output'" if {"instruction", "output"} <= sample.keys() else None

    def record(self, row: Mapping[str, Any], origin: Origin) -> Record:
        """See `Format.record`."""
        question = text_of(row["instruction"], self.theirs("instruction"))
        extra = optional_text(row["input"], self.theirs("input"))
        if extra.strip():
            question = f"{question}\n{extra}" if question.strip() else extra
        messages = _history(row["history"], self.theirs("history"))
        messages.append(Message("user", question))
        messages.append(Message("assistant", text_of(row["output"], self.theirs("output")), train=True))
        system = optional_text(row["system"], self.theirs("system"))
        return conversation(origin, with_system(messages, system or self.system))


def _history(value: Any, column: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise RowFault("history is not a list of pairs", f"{column} is {kind_of(value)}")
    messages = []
    for number, pair in enumerate(value, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowFault("history is not a list of pairs", f"{column}, entry {number}")
        messages.append(Message("user", text_of(pair[0], f"question {number} of {column}")))
        messages.append(Message("assistant", text_of(pair[1], f"answer {number} of {column}"), train=True))
    return messages
