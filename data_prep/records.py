"""The one form everything is read into.

A reader turns raw rows into `Record` (a conversation) or `TextRecord` (plain text); a row that cannot be used becomes
a `Reject` that says where it stands and why. Nothing here knows files, tokenizers or templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")

_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> roles that may come next; the empty role is the start."""


class RowFault(Exception):
    """A row cannot be used. Caught where rows are read; it becomes a `Reject` there.

    Args:
        reason: the kind of fault, the same words for every row that has it, so that rejects can be counted by it.
        detail: what was met in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: the file as the config named it, and the line (text files) or row number, from 1."""

    file: str
    line: int
    part: int = 1
    """Ordinal of the row among those that start on the same line, from 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f"#{self.part}" if self.part > 1 else "")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that an assistant turn calls."""

    name: str
    arguments: Any
    """JSON value; an object but in broken exports, which is for the template to judge."""
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` marks what the model shall learn to say; only assistant turns may carry it."""

    role: str
    content: str
    train: bool = False
    reasoning: str = ""
    """What the assistant thought before its content, without markers."""
    calls: tuple[ToolCall, ...] = ()
    """Functions that an assistant turn calls after its content, which may then be empty."""
    name: str | None = None
    """Of the function whose answer a tool turn is."""
    call_id: str | None = None
    """`ToolCall.id` that a tool turn answers."""
    images: tuple[str, ...] = ()
    """References to images, as the record gives them; where they stand in `content` is marked by ``<image>``."""


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation whose roles and texts were checked by `conversation`."""

    origin: Origin
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that may be called, in OpenAI's form."""

    @property
    def id(self) -> str:
        """``file:line``, unique within a data set."""
        return str(self.origin)


@dataclass(frozen=True, slots=True)
class TextRecord:
    """Plain text, learned as a whole, without a chat template."""

    origin: Origin
    text: str

    @property
    def id(self) -> str:
        """``file:line``, unique within a data set."""
        return str(self.origin)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two conversations that differ in their last answers only, which alone are learned."""

    origin: Origin
    chosen: Record
    rejected: Record

    @property
    def id(self) -> str:
        """``file:line``, unique within a data set."""
        return str(self.origin)


@dataclass(frozen=True, slots=True)
class Vote:
    """A conversation whose last answer, which alone is learned, was liked or not (KTO)."""

    origin: Origin
    record: Record
    liked: bool

    @property
    def id(self) -> str:
        """``file:line``, unique within a data set."""
        return str(self.origin)


@dataclass(frozen=True, slots=True)
class Reject:
    """A row left out, and why. `reason` is the kind (counted), `detail` what was met."""

    origin: Origin
    reason: str
    detail: str = ""
    split: str | None = None
    counts: bool = True
    """Whether it counts against ``dataset.max_rejects``: a fault of the row does, a limit of the config does not."""

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


AnyRecord = Record | TextRecord | Pair | Vote


def content_json(record: AnyRecord) -> str:
    """The record's content as canonical JSON, without its origin: equal for equal records, wherever they stand."""
    if isinstance(record, TextRecord):
        return json.dumps(record.text)
    return json.dumps([[m.role, m.content, m.train] for m in record.messages])


def text_of(value: Any, what: str) -> str:
    """`value` as text.

    Raises:
        RowFault: it is null, not text, or not valid Unicode (undecodable bytes, lone surrogates).
    """
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise RowFault("invalid UTF-8", f"{what}, character {error.start + 1}") from None
        return value
    if value is None:
        raise RowFault("null where text belongs", what)
    raise RowFault("not text", f"{what} is {kind_of(value)}")


def optional_text(value: Any, what: str) -> str:
    """As `text_of`, but null, which also stands for an absent column, is the empty text."""
    return "" if value is None else text_of(value, what)


def conversation(origin: Origin, messages: list[Message]) -> Record:
    """Checks roles and texts and makes the record.

    Raises:
        RowFault: unknown role, roles out of order, an empty turn, no answer at the end, or nothing to learn from.
    """
    if not messages:
        raise RowFault("no turns")
    previous = ""
    for number, message in enumerate(messages, start=1):
        if message.role not in ROLES:
            raise RowFault("unknown role", f"turn {number}: {message.role!r}; known: {', '.join(ROLES)}")
        if message.role not in _MAY_FOLLOW[previous]:
            after = f"after {previous}" if previous else "as the first turn"
            raise RowFault("roles out of order", f"turn {number}: {message.role} {after}")
        if not message.content.strip() and message.role in ("user", "assistant"):
            raise RowFault(f"empty {message.role} turn", f"turn {number}")
        assert not message.train or message.role == "assistant"
        previous = message.role
    if previous != "assistant":
        raise RowFault("no answer at the end", f"the last turn is {previous}'s")
    if not any(m.train for m in messages):
        raise RowFault("no turn to learn from", "every assistant turn is marked as not trained")
    return Record(origin, tuple(messages))


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """`messages` with a system turn in front if `system` is given and they have none."""
    if not system or (messages and messages[0].role == "system"):
        return messages
    return [Message("system", system), *messages]


def kind_of(value: Any) -> str:
    """What a JSON value is, in words that a user knows."""
    kinds = {bool: "a true/false value", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def answers(record: Record) -> Iterator[tuple[int, str]]:
    """Position and text of the turns to learn from."""
    return ((i, m.content) for i, m in enumerate(record.messages) if m.train)
