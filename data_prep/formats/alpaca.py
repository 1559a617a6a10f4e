"""``{"instruction": ..., "input": ..., "output": ..., "system": ..., "history": [[question, answer], ...]}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import ConversationFormat
from data_prep.formats.turns import OPENAI, Keys
from data_prep.records import Message, RowFault, kind_of, optional_text, text_of


class AlpacaFormat(ConversationFormat):
    """Instruction and input, joined by a line break, are the question. The answers of `history` are learned too."""

    name = "alpaca"
    required = ("instruction", "output")
    optional = ("input", "history", *ConversationFormat.optional)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by the columns 'instruction' and 'output'."""
        return "columns 'instruction' and 'output'" if {"instruction", "output"} <= sample.keys() else None

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """See `ConversationFormat.turns`."""
        messages = self._history(row.get("history"), self.theirs("history"))
        messages.append(question(self, row))
        messages.append(self.answer_column(row, "output"))
        return messages

    def _history(self, value: Any, column: str) -> list[Message]:
        if value is None or value == "":
            return []
        if not isinstance(value, list):
            raise RowFault("history is not a list of pairs", f"{column} is {kind_of(value)}")
        messages = []
        for number, pair in enumerate(value, start=1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise RowFault("history is not a list of pairs", f"{column}, entry {number}")
            what = f"answer {number} of {column}"
            messages.append(Message("user", text_of(pair[0], f"question {number} of {column}")))
            messages.append(self.answer(text_of(pair[1], what), what))
        return messages


def question(form: ConversationFormat, row: Mapping[str, Any]) -> Message:
    """The user turn of the columns `instruction` and `input`.

    Raises:
        RowFault: one of them is no text.
    """
    text = text_of(row["instruction"], form.theirs("instruction"))
    extra = optional_text(row.get("input"), form.theirs("input"))
    if extra.strip():
        text = f"{text}\n{extra}" if text.strip() else extra
    return Message("user", text)
