"""What a row must hold to become a record: the values, the order of roles, something to learn.

Every fault is a `RowFault` whose reason is one of a few phrases, so that rejects can be counted by it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from configs.schema.dataset import Learn
from data_prep.records.model import ROLES, Message, Origin, Pair, Record, RowFault, TextRecord

_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> roles that may come next; the empty role is the start. A system turn is the first one or none: templates
drop, move or refuse it elsewhere."""


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


def kind_of(value: Any) -> str:
    """What a JSON value is, in words that a user knows."""
    kinds = {
        str: "a text",
        bool: "a true/false value",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def shown(value: Any) -> str:
    """A text as a fault's detail shows it, cut and escaped; of other values their kind."""
    return repr(value[:40]) if isinstance(value, str) else kind_of(value)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.JSONDecoder(object_pairs_hook=...)``: which of two values is meant cannot be told.

    Raises:
        RowFault: a key stands twice in one object.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RowFault("a key stands twice", shown(next(key for key in keys if keys.count(key) > 1)))
    return found


def plain_text(origin: Origin, text: str) -> TextRecord:
    """A text record.

    Raises:
        RowFault: there is nothing but white space.
    """
    if not text.strip():
        raise RowFault("empty text")
    return TextRecord(origin, text)


def conversation(
    origin: Origin,
    messages: Sequence[Message],
    tools: Iterable[dict[str, Any]] = (),
    *,
    learn: Learn = Learn.all,
) -> Record:
    """Checks roles and texts and makes the record.

    Args:
        origin: where the row stands.
        messages: the turns, with `train` as the row marks them.
        tools: functions that may be called, in OpenAI's form.
        learn: `last` takes the mark from every turn but the last.

    Raises:
        RowFault: unknown role, roles out of order, an empty turn, a tool's answer to another call, no answer at the
            end, or nothing to learn from.
    """
    if not messages:
        raise RowFault("no turns")
    previous = ""
    call_ids: Collection[str | None] = ()
    for number, message in enumerate(messages, start=1):
        role = message.role
        if role not in ROLES:
            raise RowFault("unknown role", f"turn {number}: {shown(role)}; known: {', '.join(ROLES)}")
        if role not in _MAY_FOLLOW[previous]:
            after = f"after {previous}" if previous else "as the first turn"
            raise RowFault("roles out of order", f"turn {number}: {role} {after}")
        if role == "assistant":
            call_ids = [call.id for call in message.calls if call.id]
        elif role == "tool" and message.call_id and call_ids and message.call_id not in call_ids:
            raise RowFault("a tool's answer to no call", f"turn {number}: {shown(message.call_id)}")
        refuse_empty(number, message)
        assert not message.train or role == "assistant"
        previous = role
    if previous != "assistant":
        raise RowFault("no answer at the end", f"the last turn is {previous}'s")
    if learn is Learn.last:
        messages = [*as_context(messages[:-1]), messages[-1]]
    return Record(origin, _something_learned(messages), tuple(tools))


def refuse_empty(number: int, message: Message) -> None:
    """A turn that says nothing; an assistant that calls a function says something, one that only thinks does not.

    Raises:
        RowFault: user or assistant turn `number` is empty.
    """
    if message.content.strip() or message.calls or message.role not in ("user", "assistant"):
        return
    thought = ", has reasoning only" if message.reasoning else ""
    raise RowFault(f"empty {message.role} turn", f"turn {number}{thought}")


def pair(origin: Origin, chosen: Record, rejected: Record) -> Pair:
    """Two conversations as a pair: what both begin with is context, what the assistant says after it is learned.

    Raises:
        RowFault: they are the same, begin with different questions, or one ends where the other goes on.
    """
    first, second = as_context(chosen.messages), as_context(rejected.messages)
    if first == second:
        raise RowFault("chosen and rejected are the same")
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if shared is None:
        raise RowFault("one of chosen and rejected is the beginning of the other")
    if {first[shared].role, second[shared].role} != {"assistant"}:
        raise RowFault("chosen and rejected answer different questions", f"turn {shared + 1} differs")
    learned = (
        Record(origin, _something_learned([*first[:shared], *record.messages[shared:]]), record.tools)
        for record in (chosen, rejected)
    )
    return Pair(origin, *learned)


def as_context(messages: Iterable[Message]) -> list[Message]:
    """The turns, none of them learned."""
    return [replace(m, train=False) if m.train else m for m in messages]


def _something_learned(messages: Sequence[Message]) -> tuple[Message, ...]:
    for message in messages:
        if message.train:
            return tuple(messages)
    raise RowFault("no turn to learn from", "every assistant turn is marked as not trained")


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """`messages` with a system turn in front if `system` is given and they have none."""
    if not system or (messages and messages[0].role == "system"):
        return messages
    return [Message("system", system), *messages]
