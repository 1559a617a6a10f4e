"""``{"text": ...}``: plain text, learned as a whole, without a chat template; an end token is added when tokenizing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_prep.formats.base import Format
from data_prep.formats.turns import OPENAI, Keys
from data_prep.records import Origin, TextRecord, plain_text, text_of


class TextFormat(Format):
    """One text a row. `dataset.system` and `dataset.learn` have no place here and are not used."""

    name = "text"
    required = ("text",)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by a column 'text'; the weakest sign, so it yields to any other format."""
        return "column 'text'" if isinstance(sample.get("text"), str) else None

    @classmethod
    def rank(cls, sample: Mapping[str, Any]) -> int:
        """See `Format.rank`."""
        return 0

    def record(self, row: Mapping[str, Any], origin: Origin) -> TextRecord:
        """See `Format.record`."""
        return plain_text(origin, text_of(row["text"], self.theirs("text")))
