"""The forms that every row is read into, and what becomes of a row that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import Any

ROLES = ("system", "user", "assistant", "tool")

IMAGE_MARK = "<image>"
"""Where an image stands in a turn's content."""


class RowFault(Exception):
    """A row cannot be used. Caught where rows are read; it becomes a `Reject` there.

    Args:
        reason: the kind of fault, the same words for every row that has it, so that rejects can be counted by it.
        detail: what was met in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


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
    arguments: dict[str, Any]
    """JSON object."""
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
    """References to images, as the record gives them; where they stand in `content` is marked by `IMAGE_MARK`."""


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation whose roles and texts were checked by `conversation`."""

    origin: Origin
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the functions that may be called, in OpenAI's form: ``{"type": "function", "function": ...}``."""

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
    """Two conversations that begin alike; what the assistant says after that is learned. Made by `pair`."""

    origin: Origin
    """Of both conversations too."""
    chosen: Record
    rejected: Record

    @property
    def id(self) -> str:
        """``file:line``, unique within a data set."""
        return str(self.origin)

    @property
    def shared(self) -> int:
        """How many turns both begin with."""
        both = zip(self.chosen.messages, self.rejected.messages, strict=False)
        return sum(1 for _ in takewhile(lambda turns: turns[0] == turns[1], both))


@dataclass(frozen=True, slots=True)
class Vote:
    """A conversation whose answer, which alone is learned, was liked or not (KTO)."""

    origin: Origin
    """Of the conversation too."""
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
