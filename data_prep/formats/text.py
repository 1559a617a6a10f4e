"""``{"text": ...}``: plain text, learned as a whole, without a chat template; an end token is added when tokenizing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import Format
from data_prep.records import Origin, RowFault, TextRecord, text_of


class TextFormat(Format):
    """One text a row. `dataset.system` has no place here and is not used."""

    name = "text"
    required = ("text",)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any]) -> str | None:
        """Recognised by a column 'text'; the weakest sign, so it yields to any other format."""
        return "column 'text'" if isinstance(sample.get("text"), str) else None

    def record(self, row: Mapping[str, Any], origin: Origin) -> TextRecord:
        """See `Format.record`."""
        text = text_of(row["text"], self.theirs("text"))
        if not text.strip():
            raise RowFault("empty text")
        return TextRecord(origin, text)
