"""``{"prompt": ..., "chosen": ..., "rejected": ...}``: two answers to one prompt, the better one named.

An answer is a text, a turn, or several turns; or each side is a whole conversation, both of which begin alike. What is
ranked in any other way, such as scored lists of answers, is not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.schema.dataset import Preference
from data_prep.formats.alpaca import question
from data_prep.formats.base import ConversationFormat
from data_prep.formats.turns import OPENAI, SHAREGPT, Keys, has_turns
from data_prep.records import AnyRecord, Message, Origin, RowFault, as_context, pair

_PROMPTS = ("prompt", "messages", "conversations", "instruction")


class PreferenceFormat(ConversationFormat):
    """The prompt stands in one of `_PROMPTS`, a text or turns; or in front of both answers."""

    name = "preference"
    required = ("chosen", "rejected")
    optional = (*_PROMPTS, "input", *ConversationFormat.optional)

    @classmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Recognised by the columns 'chosen' and 'rejected', with a prompt."""
        if not {"chosen", "rejected"} <= sample.keys():
            return None
        prompt = next((column for column in _PROMPTS if column in sample), None)
        if prompt:
            return f"columns 'chosen' and 'rejected', and the prompt in '{prompt}'"
        if any(has_turns(sample["chosen"], k) for k in (keys, SHAREGPT)):
            return "columns 'chosen' and 'rejected' hold turns"
        return None

    @classmethod
    def rank(cls, sample: Mapping[str, Any]) -> int:
        """See `Format.rank`: columns of these names mean nothing else."""
        return 2

    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """See `ConversationFormat.turns`: the chosen conversation, the answer to learn."""
        return self._side(row, "chosen")

    def record(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """See `Format.record`."""
        if self.preference is Preference.chosen:
            return self.finish(self.turns(row), row, origin)
        chosen, rejected = (self.finish(self._side(row, side), row, origin) for side in self.required)
        return pair(origin, chosen, rejected)

    def _side(self, row: Mapping[str, Any], side: str) -> list[Message]:
        answer = self.said(row[side], "assistant", self.theirs(side))
        if answer and answer[0].role != "assistant":
            self._check_prompt(row, answer, side)
            return answer if self.preference is Preference.pairs else [*as_context(answer[:-1]), answer[-1]]
        return as_context(self._prompt(row)) + answer

    def _prompt(self, row: Mapping[str, Any]) -> list[Message]:
        columns = [column for column in _PROMPTS if row.get(column) not in (None, "")]
        if len(columns) != 1:
            reason = "more than one prompt" if columns else "no prompt"
            raise RowFault(reason, ", ".join(map(self.theirs, columns)) or "beside chosen and rejected")
        if columns == ["instruction"]:
            return [question(self, row)]
        return self.said(row[columns[0]], "user", self.theirs(columns[0]))

    def _check_prompt(self, row: Mapping[str, Any], whole: list[Message], side: str) -> None:
        """A prompt beside whole conversations repeats some of it; another one would be lost."""
        if row.get("prompt") in (None, ""):
            return
        said = {(m.role, m.content.strip()) for m in whole}
        for message in self.said(row["prompt"], "user", self.theirs("prompt")):
            if (message.role, message.content.strip()) not in said:
                raise RowFault(f"the prompt is not in the {side} conversation")
