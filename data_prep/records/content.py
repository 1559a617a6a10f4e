"""What a record says: as JSON, canonical or lossless, and as texts that can be read and changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

from data_prep.records.checks import pair, plain_text, refuse_empty
from data_prep.records.model import AnyRecord, Message, Origin, Pair, Record, TextRecord, ToolCall, Vote

_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def content_json(record: AnyRecord) -> str:
    """The record's content as canonical JSON, without its origin: equal for equal records, wherever they stand."""
    return _CANONICAL.encode(_body(record))


def to_json(record: AnyRecord) -> dict[str, Any]:
    """The record as JSON values, origin included; `from_json` makes an equal record of them."""
    origin = record.origin
    return {"origin": [origin.file, origin.line, origin.part], **_body(record)}


def from_json(value: dict[str, Any]) -> AnyRecord:
    """The record that `to_json` was given. What is read here was written by us, so it is not checked again."""
    origin = Origin(*value["origin"])
    if "text" in value:
        return TextRecord(origin, value["text"])
    if "messages" in value:
        return _record(origin, value)
    if "chosen" in value:
        return Pair(origin, _record(origin, value["chosen"]), _record(origin, value["rejected"]))
    return Vote(origin, _record(origin, value["record"]), value["liked"])


def texts_of(record: AnyRecord) -> list[str]:
    """What people and the model say, in order: contents, reasoning, and texts in the arguments of calls.

    Of a pair, what both conversations begin with comes once, then the chosen and the rejected rest. Descriptions of
    tools are not said by anyone.
    """
    if isinstance(record, TextRecord):
        return [record.text]
    return [text for message in _messages(record) for text in _said(message)]


def acts_of(record: AnyRecord) -> list[str]:
    """What tells a record from others besides its texts, as canonical JSON: images, names of calls, numbers they carry.

    One for each turn that has any, which most records do not. Texts in arguments are left out: `texts_of` has them.
    """
    if isinstance(record, TextRecord):
        return []
    return [
        _CANONICAL.encode([n, m.images, [[c.name, _changed_leaves(c.arguments, lambda _: "")] for c in m.calls]])
        for n, m in enumerate(_messages(record))
        if m.images or m.calls
    ]


def with_texts(
    record: AnyRecord, change: Callable[[str], str], change_argument: Callable[[str], str] | None = None
) -> AnyRecord:
    """The record with every text of `texts_of` changed, each once, in the same order.

    Args:
        record: any record.
        change: the new text for a text.
        change_argument: the same for texts in the arguments of calls, which may be data to the letter (code, a path)
            rather than prose; None: `change`.

    Raises:
        RowFault: what is left is no record: an empty turn or text, or a pair of equals.
    """
    changes = (change, change_argument or change)
    if isinstance(record, TextRecord):
        return plain_text(record.origin, change(record.text))
    if isinstance(record, Record):
        return replace(record, messages=_changed(record.messages, changes))
    if isinstance(record, Vote):
        return replace(record, record=replace(record.record, messages=_changed(record.record.messages, changes)))
    shared = _changed(record.chosen.messages[: record.shared], changes)
    chosen, rejected = (
        replace(side, messages=shared + _changed(side.messages[len(shared) :], changes, len(shared) + 1))
        for side in (record.chosen, record.rejected)
    )
    return pair(record.origin, chosen, rejected)


def _body(record: AnyRecord) -> dict[str, Any]:
    if isinstance(record, TextRecord):
        return {"text": record.text}
    if isinstance(record, Pair):
        return {"chosen": _body(record.chosen), "rejected": _body(record.rejected)}
    if isinstance(record, Vote):
        return {"record": _body(record.record), "liked": record.liked}
    body: dict[str, Any] = {"messages": [_message_body(m) for m in record.messages]}
    return {**body, "tools": list(record.tools)} if record.tools else body


def _message_body(message: Message) -> dict[str, Any]:
    """Without what has its default value."""
    body: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.train:
        body["train"] = True
    if message.reasoning:
        body["reasoning"] = message.reasoning
    if message.calls:
        body["calls"] = [[call.name, call.arguments, call.id] for call in message.calls]
    if message.name is not None:
        body["name"] = message.name
    if message.call_id is not None:
        body["call_id"] = message.call_id
    if message.images:
        body["images"] = list(message.images)
    return body


def _record(origin: Origin, body: dict[str, Any]) -> Record:
    return Record(origin, tuple(_message(m) for m in body["messages"]), tuple(body.get("tools", ())))


def _message(body: dict[str, Any]) -> Message:
    calls = tuple(ToolCall(*call) for call in body.get("calls", ()))
    return Message(**{**body, "calls": calls, "images": tuple(body.get("images", ()))})


def _messages(record: Record | Pair | Vote) -> Iterable[Message]:
    if isinstance(record, Record):
        return record.messages
    if isinstance(record, Vote):
        return record.record.messages
    return (*record.chosen.messages, *record.rejected.messages[record.shared :])


def _said(message: Message) -> Iterator[str]:
    if message.reasoning:
        yield message.reasoning
    yield message.content
    for call in message.calls:
        yield from _leaves(call.arguments)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)


def _changed(
    messages: Iterable[Message], changes: tuple[Callable[[str], str], Callable[[str], str]], first: int = 1
) -> tuple[Message, ...]:
    change, change_argument = changes
    changed = []
    for number, message in enumerate(messages, start=first):
        reasoning = change(message.reasoning) if message.reasoning else ""
        content = change(message.content)
        calls = tuple(replace(c, arguments=_changed_leaves(c.arguments, change_argument)) for c in message.calls)
        changed.append(replace(message, reasoning=reasoning, content=content, calls=calls))
        refuse_empty(number, changed[-1])
    return tuple(changed)


def _changed_leaves(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed_leaves(inner, change) for key, inner in value.items()}
    return [_changed_leaves(inner, change) for inner in value] if isinstance(value, list) else value
