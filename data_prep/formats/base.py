"""What a format is: the column names it reads, how it recognises itself, and how a row becomes a record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

from configs.schema.dataset import Learn, Preference
from data_prep.formats.images import references_of, with_images
from data_prep.formats.reasoning import split_reasoning
from data_prep.formats.tools import tools_of
from data_prep.formats.turns import NOT_READ, OPENAI, SHAREGPT, Keys, TurnReader, has_turns
from data_prep.records import (
    AnyRecord,
    Message,
    Origin,
    Record,
    RowFault,
    conversation,
    optional_text,
    text_of,
    with_system,
)

TURN_KEYS = ("role", "content")
"""Ours of the keys of a turn; `columns` may map them like columns."""


class Format(ABC):
    """One shape of raw rows. To add one: a file here with a subclass, and a line in `formats.FORMATS`.

    Args:
        columns: our column name, or key of a turn (`TURN_KEYS`) -> the file's.
        system: system turn for rows that have none.
        roles: the file's name of a role -> ours, besides those that are known.
        preference: what becomes of preference pairs.
        learn: which assistant turns are learned.
    """

    name: ClassVar[str]
    required: ClassVar[tuple[str, ...]]
    """Columns (our names) without which a row is nothing."""
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        columns: Mapping[str, str] | None = None,
        system: str | None = None,
        *,
        roles: Mapping[str, str] | None = None,
        preference: Preference = Preference.pairs,
        learn: Learn = Learn.all,
    ) -> None:
        self.columns = dict(columns or {})
        self.system, self.roles = system, dict(roles or {})
        self.preference, self.learn = preference, learn
        taken = {theirs for ours, theirs in self.columns.items() if ours not in TURN_KEYS}
        everything = (*self.required, *self.optional)
        self._reads = [(c, self.theirs(c)) for c in everything if c in self.columns or c not in taken]
        self._needs = [self.theirs(c) for c in self.required]

    def theirs(self, ours: str) -> str:
        """The file's name of our column."""
        return self.columns.get(ours, ours)

    @property
    def reads(self) -> set[str]:
        """The file's names of the columns that are read, should they be there."""
        return {theirs for _, theirs in self._reads}

    def read(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """One raw row as a record.

        Raises:
            RowFault: the row lacks a column or its values cannot be used.
        """
        for theirs in self._needs:
            if theirs not in row:
                raise RowFault("missing column", theirs)
        return self.record({ours: row.get(theirs) for ours, theirs in self._reads}, origin)

    @classmethod
    @abstractmethod
    def recognise(cls, sample: Mapping[str, Any], keys: Keys = OPENAI) -> str | None:
        """Why a row with these columns and values is of this format; None where it is not.

        Args:
            sample: column (our name) -> a value of it.
            keys: of a turn, as the config has them.
        """

    @classmethod
    def rank(cls, sample: Mapping[str, Any]) -> int:
        """Of formats that recognise themselves in a row, those of the highest rank remain."""
        return 1

    @abstractmethod
    def record(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """One row, under our column names (absent optional ones are None or not there), as a record.

        Raises:
            RowFault: a value cannot be used.
        """


class ConversationFormat(Format):
    """A format whose rows have turns, and beside them perhaps a system turn, tools and images."""

    optional: ClassVar[tuple[str, ...]] = ("system", "tools", "images")

    @cached_property
    def named_turns(self) -> TurnReader:
        """Reads turns with role and content, or the keys that the config names."""
        return TurnReader((self.theirs("role"), self.theirs("content")), self.roles)

    @cached_property
    def sharegpt_turns(self) -> TurnReader:
        """Reads turns with from and value."""
        return TurnReader(SHAREGPT, self.roles)

    def read(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """See `Format.read`."""
        for column in NOT_READ:
            if row.get(column):
                raise RowFault(f"'{column}' is not read", f"column {column}")
        return super().read(row, origin)

    def record(self, row: Mapping[str, Any], origin: Origin) -> AnyRecord:
        """See `Format.record`."""
        return self.finish(self.turns(row), row, origin)

    @abstractmethod
    def turns(self, row: Mapping[str, Any]) -> list[Message]:
        """The turns of a row, without what stands beside them.

        Raises:
            RowFault: a value cannot be used.
        """

    def finish(self, messages: list[Message], row: Mapping[str, Any], origin: Origin) -> Record:
        """The turns with the row's system turn, tools and images.

        Raises:
            RowFault: they do not make a conversation.
        """
        system = optional_text(row.get("system"), self.theirs("system"))
        if system.strip() and messages and messages[0].role == "system" and messages[0].content != system:
            raise RowFault("two system turns", f"in the turns, and in column {self.theirs('system')}")
        messages = with_system(messages, system if system.strip() else self.system)
        references = references_of(row.get("images"), self.theirs("images"))
        tools = tools_of(row.get("tools"), self.theirs("tools"))
        return conversation(origin, with_images(messages, references), tools, learn=self.learn)

    def said(self, value: Any, role: str, column: str) -> list[Message]:
        """A column that holds a text, which is one turn of `role`; a turn; or a list of turns.

        Raises:
            RowFault: it is something else.
        """
        if not isinstance(value, dict | list):
            text = text_of(value, column)
            return [self.answer(text, column) if role == "assistant" else Message(role, text)]
        turns = value if isinstance(value, list) else [value]
        return (self.sharegpt_turns if has_turns(turns, SHAREGPT) else self.named_turns).read(turns, column)

    def answer(self, text: str, what: str) -> Message:
        """An assistant's turn to learn from."""
        reasoning, text = split_reasoning(text, what)
        return Message("assistant", text, True, reasoning)

    def answer_column(self, row: Mapping[str, Any], ours: str) -> Message:
        """As `answer`, out of a column."""
        return self.answer(text_of(row[ours], self.theirs(ours)), self.theirs(ours))
