"""A conversation in any of the other shapes, and beside it ``"label"``: whether its answer was liked (KTO)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from data_prep.formats.alpaca import AlpacaFormat
from data_prep.formats.base import ConversationFormat
from data_prep.formats.messages import MessagesFormat
from data_prep.formats.prompt_completion import PromptCompletionFormat
from data_prep.formats.sharegpt import ShareGptFormat
from data_prep.formats.turns import OPENAI, Keys
from data_prep.records import Message, Origin, RowFault, Vote, as_context, shown

_SHAPES: tuple[type[ConversationFormat], ...] = (MessagesFormat, ShareGptFormat, PromptCompletionFormat, AlpacaFormat)
_WORDS = {"true": True, "false": False, "1": True, "0": False}
"""As tables (csv) write them, in any case."""


class VoteFormat(ConversationFormat):
    """Only the answer is learned: the completion, or the last turn."""

    name = "vote"
    required = ("label",)
    optional = tuple(dict.fromkeys(column for shape in _SHAPES for column in (*shape.required, *shape.optional)))

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by a column 'label' of true and false beside a conversation."""
        shape = next((why for shape in _SHAPES if (why := shape.recognise(sample, keys))), None)
        if shape is None or _liked(sample.get("label")) is None:
            return None
        return f"column 'label' is {shown(sample['label'])}, and {shape}"

    @classmethod
    def rank(cls, sample: Mapping[str, Any]) -> int:
        """See `Format.rank`: 0 and 1 could as well be classes."""
        label = sample["label"]
        return 2 if isinstance(label, bool) or str(label).lower() in ("true", "false") else 1

    def record(self, row: Mapping[str, Any], origin: Origin) -> Vote:
        """See `Format.record`."""
        liked = _liked(row["label"])
        if liked is None:
            raise RowFault("the label is neither true nor false", f"{self.theirs('label')} is {shown(row['label'])}")
        return Vote(origin, self.finish(self.turns(row), row, origin), liked)

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """See `ConversationFormat.turns`."""
        fitting = [shape for shape in self._shapes if all(row.get(c) is not None for c in shape.required)]
        if len(fitting) != 1:
            reason = "more than one conversation" if fitting else "no conversation to vote on"
            raise RowFault(reason, ", ".join(shape.name for shape in fitting))
        messages = fitting[0].turns(row)
        if isinstance(fitting[0], PromptCompletionFormat):
            return messages
        return [*as_context(messages[:-1]), *messages[-1:]]

    @cached_property
    def _shapes(self) -> list[ConversationFormat]:
        return [shape(self.columns, self.system, roles=self.roles) for shape in _SHAPES]


def _liked(label: Any) -> bool | None:
    if isinstance(label, str):
        return _WORDS.get(label.strip().lower())
    return bool(label) if isinstance(label, bool | int | float) and label in (0, 1) else None
