"""Whatever a row holds, a format makes a sound record of it or refuses it; a record's JSON loses nothing."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema.dataset import Learn, Preference
from data_prep.formats import FORMATS
from data_prep.formats.turns import ROLE_NAMES
from data_prep.records import (
    ROLES,
    AnyRecord,
    Message,
    Origin,
    Pair,
    Record,
    RowFault,
    TextRecord,
    ToolCall,
    Vote,
    content_json,
    from_json,
    pair,
    texts_of,
    to_json,
    unique_keys,
    with_texts,
)

_HERE = Origin("a/rows.json", 3, 2)
_TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
_CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": ["y", {"z": "w"}]}'}}]
_SAID: list[dict[str, Any]] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image", "image": "a.png"}]},
    {"role": "assistant", "content": "<think>hm</think>a", "tool_calls": _CALLS, "weight": 0},
    {"role": "tool", "content": "7", "tool_call_id": "1", "name": "f"},
    {"role": "assistant", "content": "a", "reasoning_content": "so"},
]
_SHARED = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": "y"}}'},
    {"from": "observation", "value": "7"},
    {"from": "gpt", "value": "a", "train": True},
]
_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": _SAID, "tools": [_TOOL], "images": []}),
    ("sharegpt", {"conversations": _SHARED, "tools": json.dumps([_TOOL]), "system": "s"}),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]], "system": "s"}),
    ("prompt_completion", {"prompt": _SAID[:2], "completion": "<think>hm</think>a", "tools": _TOOL}),
    ("preference", {"prompt": "<image>q", "chosen": "a", "rejected": "b", "images": ["a.png"]}),
    ("preference", {"chosen": _SAID, "rejected": [*_SAID[:4], {"role": "assistant", "content": "b"}]}),
    ("preference", {"conversations": _SHARED[:3], "chosen": _SHARED[3], "rejected": {"from": "gpt", "value": "b"}}),
    ("vote", {"messages": _SAID, "label": "false"}),
    ("vote", {"instruction": "q", "output": "a", "label": 1}),
    ("text", {"text": "one\n\ntwo"}),
]

_KEYS = sorted({c for f in FORMATS.values() for c in (*f.required, *f.optional)} | {k for t in _SAID for k in t})
_TEXTS = st.one_of(
    st.sampled_from([*ROLE_NAMES, "function_call", "<image>", "<think>", "</think>a", " \n", "{}", '{"name": "f"}']),
    st.sampled_from(["[" * 50_000, '{"name": "f", "arguments": {"x": 1e999}}', "\ud800", '"\\ud800"', "9" * 5000]),
    st.text(st.characters(), max_size=5),
)
_JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.floats(), _TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS) | _TEXTS, inner, max_size=3),
    max_leaves=8,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value where something may be put: (container, key), the deepest first."""
    if not isinstance(value, dict | list):
        return []
    here = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    return [place for _, key in here for place in _places(value[key])] + here


@st.composite
def _broken(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A format's name, mostly the right one, and a row with junk in one to three places."""
    name, good = draw(st.sampled_from(_ROWS))
    name = draw(st.sampled_from([name] * 9 + sorted(FORMATS)))
    row = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(row)
        container, key = draw(st.sampled_from(places)) if places else (row, draw(st.sampled_from(_KEYS)))
        what = draw(st.sampled_from(["replace", "drop", "swap"]))
        if what == "drop":
            container.pop(key, None) if isinstance(container, dict) else container.pop(key)
        elif what == "swap" and places:
            other, place = draw(st.sampled_from(places))
            container[key] = copy.deepcopy(other[place]) if _has(other, place) else None
        else:
            container[key] = draw(_JUNK)
    return name, row | draw(st.dictionaries(st.sampled_from(_KEYS), _JUNK, max_size=1))


def _has(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def _check(record: AnyRecord) -> None:
    """What every later stage takes for granted."""
    for each in [record.chosen, record.rejected] if isinstance(record, Pair) else [record]:
        said = each.record if isinstance(each, Vote) else each
        if isinstance(said, TextRecord):
            continue
        assert said.messages[-1].role == "assistant"
        assert all(m.role in ROLES for m in said.messages)
        assert {m.role for m in said.messages if m.train} == {"assistant"}
        assert all(m.content.count("<image>") == len(m.images) for m in said.messages if m.images)
        assert all(call.name and isinstance(call.arguments, dict) for m in said.messages for call in m.calls)
        assert all(m.role == "assistant" for m in said.messages if m.calls or m.reasoning)
    for text in texts_of(record):
        text.encode("utf-8")
    line = json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode()
    assert from_json(json.loads(line)) == record
    assert pickle.loads(pickle.dumps(record)) == record
    assert with_texts(record, lambda text: text) == record


@settings(max_examples=600, deadline=None)
@given(_broken(), st.sampled_from(Learn), st.sampled_from(Preference))
def test_any_row_becomes_a_sound_record_or_a_fault(
    broken: tuple[str, dict[str, Any]], learn: Learn, preference: Preference
) -> None:
    name, row = broken
    before = copy.deepcopy(row)
    try:
        record = FORMATS[name](system="s", learn=learn, preference=preference).read(row, _HERE)
    except RowFault as fault:
        assert fault.reason
        assert len(str(fault)) < 300
        json.dumps([fault.reason, fault.detail]).encode()
    else:
        _check(record)
    assert repr(row) == repr(before)


@pytest.mark.parametrize(("name", "row"), _ROWS)
def test_a_record_survives_its_json(name: str, row: dict[str, Any]) -> None:
    record = FORMATS[name]().read(row, _HERE)
    _check(record)
    elsewhere = FORMATS[name]().read(copy.deepcopy(row), Origin("b", 1))
    assert content_json(elsewhere) == content_json(record)
    assert content_json(with_texts(record, lambda text: text + "!")) != content_json(record)


def test_content_tells_apart_whatever_differs() -> None:
    turns = (Message("user", "q"), Message("assistant", "a", True))
    record = Record(_HERE, turns)
    different: list[AnyRecord] = [
        record,
        TextRecord(_HERE, "q"),
        Record(_HERE, turns, ({"type": "function", "function": {"name": "f"}},)),
        Record(_HERE, (turns[0], Message("assistant", "a"))),
        Record(_HERE, (turns[0], Message("assistant", "a", True, reasoning="r"))),
        Record(_HERE, (turns[0], Message("assistant", "a", True, calls=(ToolCall("f", {}),)))),
        Record(_HERE, (turns[0], Message("assistant", "a", True, calls=(ToolCall("f", {}, "1"),)))),
        Record(_HERE, (Message("user", "q", images=("a.png",)), turns[1])),
        Vote(_HERE, record, True),
        Vote(_HERE, record, False),
    ]
    assert len({content_json(r) for r in different}) == len(different)


def test_texts_are_all_that_is_said_and_each_changes_once() -> None:
    call = Message("assistant", "c", True, "r", (ToolCall("f", {"x": ["l", {"y": "m"}], "n": 1}, "id"),))
    begin = (Message("user", "q"), call, Message("tool", "t", name="f"))
    chosen, rejected = (Record(_HERE, (*begin, Message("assistant", answer, True))) for answer in "ab")
    both = pair(_HERE, chosen, rejected)
    asked: list[str] = []

    def change(text: str) -> str:
        asked.append(text)
        return text.upper()

    changed = with_texts(both, change)
    assert texts_of(both) == asked == ["q", "r", "c", "l", "m", "t", "a", "b"]
    assert texts_of(changed) == [text.upper() for text in asked]
    assert isinstance(changed, Pair)
    assert changed.chosen.messages[1].calls == (ToolCall("f", {"x": ["L", {"y": "M"}], "n": 1}, "id"),)
    assert changed.chosen.messages[2].name == "f"
    for left, fault in (("", "empty user turn"), ("same", "chosen and rejected are the same")):
        with pytest.raises(RowFault, match=fault):
            with_texts(both, lambda text, left=left: left)  # type: ignore[misc]


def test_a_fault_survives_the_way_between_processes_and_a_key_stands_once() -> None:
    with pytest.raises(RowFault) as caught:
        json.loads('{"a": {"b": 1, "c": 2, "b": 3}}', object_pairs_hook=unique_keys)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.reason, again.detail, str(again)) == ("a key stands twice", "'b'", "a key stands twice: 'b'")
