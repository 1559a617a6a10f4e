"""Raw rows become records, or are refused with a reason."""

from __future__ import annotations

import json
from typing import Any

import pytest

from configs.schema.dataset import Learn, Preference, RecordFormat
from data_prep.formats import FORMATS
from data_prep.formats.detect import choose
from data_prep.formats.tools import tools_text
from data_prep.records import AnyRecord, Message, Origin, Pair, Record, RowFault, TextRecord, ToolCall, Vote

_HERE = Origin("rows.jsonl", 3)


def _read(name: str, row: dict[str, Any], **settings: Any) -> AnyRecord:
    return FORMATS[name](**settings).read(row, _HERE)


def _record(name: str, row: dict[str, Any], **settings: Any) -> Record:
    record = _read(name, row, **settings)
    assert isinstance(record, Record)
    return record


def _turns(name: str, row: dict[str, Any], **settings: Any) -> list[tuple[str, str, bool]]:
    return _said(_record(name, row, **settings))


def _said(record: Record) -> list[tuple[str, str, bool]]:
    return [(m.role, m.content, m.train) for m in record.messages]


_TURN, _GPT = {"role": "user", "content": "q"}, {"from": "human", "value": "q"}


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def _call(arguments: str) -> dict[str, Any]:
    return _assistant(None, tool_calls=[{"id": "x", "function": {"name": "f", "arguments": arguments}}])


def test_messages() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": "not this", "weight": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "this"},
        ]
    }
    assert _turns("messages", row, system="unused: the row has one") == [
        ("system", "s", False),
        ("user", "q?", False),
        ("assistant", "not this", False),
        ("user", "again", False),
        ("assistant", "this", True),
    ]


_WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
_OPENAI_TOOL = {"type": "function", "function": _WEATHER}


def test_calls_in_openai_form() -> None:
    calls = [
        {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}},
        {"id": "b", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}},
    ]
    row = {
        "tools": [_OPENAI_TOOL],
        "messages": [
            _user("q"),
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": "1", "tool_call_id": "b", "name": "weather"},
            {"role": "tool", "content": "2", "tool_call_id": "a"},
            {"role": "assistant", "content": "so", "function_call": {"name": "stop", "arguments": ""}},
            {"role": "function", "content": "", "name": "stop"},
            _assistant("done"),
        ],
    }
    record = _record("messages", row)
    assert record.tools == (_OPENAI_TOOL,)
    assert record.messages[1:6] == (
        Message(
            "assistant",
            "",
            True,
            calls=(ToolCall("weather", {"city": "Bonn"}, "a"), ToolCall("weather", {"city": "北京"}, "b")),
        ),
        Message("tool", "1", name="weather", call_id="b"),
        Message("tool", "2", call_id="a"),
        Message("assistant", "so", True, calls=(ToolCall("stop", {}),)),
        Message("tool", "", name="stop"),
    )


@pytest.mark.parametrize("tools", [[_WEATHER], [_OPENAI_TOOL], _WEATHER, [{"type": "function", **_WEATHER}]])
@pytest.mark.parametrize("as_text", [False, True])
def test_sharegpt_calls_observations_and_tools(tools: Any, as_text: bool) -> None:
    row: dict[str, Any] = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "I look."},
            {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": [1]}}, {"name": "g"}]'},
            {"from": "function_call", "value": '<think>hm</think>{"name": "h", "arguments": "{}"}'},
        ],
        "tools": json.dumps(tools) if as_text else tools,
    }
    with pytest.raises(RowFault, match="its own reasoning"):  # which of the two turns thought it would be lost
        _read("sharegpt", row)
    row["conversations"][3:] = [
        {"from": "function_call", "value": '{"name": "h", "arguments": "{}"}'},
        {"from": "observation", "value": "7"},
        {"from": "observation", "value": "8"},
        {"from": "function_call", "value": '<think>hm</think>{"name": "h", "arguments": {}}'},
    ]
    record = _record("sharegpt", row, system="Be kind.")
    assert record.tools == (_OPENAI_TOOL,)
    called = (ToolCall("f", {"x": [1]}), ToolCall("g", {}), ToolCall("h", {}))
    assert record.messages == (
        Message("system", "Be kind."),
        Message("user", "q"),
        Message("assistant", "I look.", True, calls=called),
        Message("tool", "7"),
        Message("tool", "8"),
        Message("assistant", "", True, "hm", (ToolCall("h", {}),)),
    )
    assert json.dumps([_WEATHER]) in tools_text(record.tools)
    assert _record("sharegpt", row | {"tools": "[]"}).tools == ()


def test_reasoning_is_taken_apart() -> None:
    for turn in (
        _assistant("so", reasoning_content="hm"),
        _assistant("so", thinking="hm\n", reasoning=None),
        _assistant("<think>hm</think>so"),
        _assistant("\n<think>\nhm\n</think>\n\nso", reasoning="hm"),
    ):
        answer = _record("messages", {"messages": [_user("<think> is a marker"), turn]}).messages[1]
        assert (answer.reasoning, answer.content) == ("hm", "so")
    for name, row in (
        ("alpaca", {"instruction": "q", "output": "<think>hm</think>so"}),
        ("prompt_completion", {"prompt": "q", "completion": "<think>hm</think>so"}),
        ("sharegpt", {"conversations": [_GPT, {"from": "gpt", "value": "<think>hm</think>so"}]}),
    ):
        answer = _record(name, row).messages[-1]
        assert (answer.reasoning, answer.content) == ("hm", "so")
    history = {"instruction": "q", "output": "so", "history": [["q", "<think>hm</think>so"]]}
    assert _record("alpaca", history).messages[1] == Message("assistant", "so", True, "hm")
    nothing = _record("prompt_completion", {"prompt": "q", "completion": "<think>\n\n</think>\n\nso"}).messages[1]
    assert (nothing.reasoning, nothing.content) == ("", "so")


def test_learn_last_takes_the_mark_from_history_in_every_format() -> None:
    chat = [_user("q"), _assistant("a"), _user("r"), _assistant("b")]
    share = [{"from": n, "value": v} for n, v in (("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))]
    for name, row in (
        ("messages", {"messages": chat}),
        ("sharegpt", {"conversations": share}),
        ("alpaca", {"instruction": "r", "output": "b", "history": [["q", "a"]]}),
    ):
        assert [t[2] for t in _turns(name, row)] == [False, True, False, True]
        assert [t[2] for t in _turns(name, row, learn=Learn.last)] == [False, False, False, True]


_SAID = [("user", "q", False), ("assistant", "a", False), ("user", "r", False)]
_SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}]
_CHAT = [_user("q"), _assistant("a"), _user("r")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": _CHAT, "chosen": "b", "rejected": "c"},
        {"prompt": _CHAT, "chosen": [_assistant("b")], "rejected": [_assistant("c")]},
        {"messages": _CHAT, "chosen": _assistant("b"), "rejected": _assistant("c")},
        {
            "conversations": _SHARE,
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        {"chosen": [*_CHAT, _assistant("b")], "rejected": [*_CHAT, _assistant("c")]},
        {
            "prompt": " q\n",
            "chosen": [*_CHAT, _assistant("b")],
            "rejected": [*_CHAT, _assistant("c")],
            "messages": _CHAT,
        },
    ],
)
def test_preference_pairs(row: dict[str, Any]) -> None:
    record = _read("preference", row)
    assert isinstance(record, Pair)
    assert _said(record.chosen) == [*_SAID, ("assistant", "b", True)]
    assert _said(record.rejected) == [*_SAID, ("assistant", "c", True)]
    assert (record.shared, record.origin, record.chosen.origin) == (3, _HERE, _HERE)
    assert choose("f", [row], RecordFormat.auto, {}, None)[0].name == "preference"
    row = row | {"rejected": None}
    assert _turns("preference", row, preference=Preference.chosen) == [*_SAID, ("assistant", "b", True)]


def test_all_that_the_assistant_says_after_a_shared_beginning_is_learned() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    chosen = [_user("q"), call, {"role": "tool", "content": "1"}, _assistant("b")]
    row = {"chosen": chosen, "rejected": [_user("q"), _assistant("c", weight=1)]}
    record = _read("preference", row)
    assert isinstance(record, Pair)
    assert [m.train for m in record.chosen.messages] == [False, True, False, True]
    record = _read("preference", row, learn=Learn.last)
    assert isinstance(record, Pair)
    assert [m.train for m in record.chosen.messages] == [False, False, False, True]
    alpaca = {"instruction": "q", "input": "i", "chosen": "b", "rejected": "c", "system": "s"}
    record = _read("preference", alpaca)
    assert isinstance(record, Pair)
    assert [m.content for m in record.rejected.messages] == ["s", "q\ni", "c"]


@pytest.mark.parametrize(
    "shape",
    [
        {"messages": [*_CHAT, _assistant("b")]},
        {"conversations": [*_SHARE, {"from": "gpt", "value": "b"}]},
        {"prompt": _CHAT, "completion": [_assistant("b")]},
        {"instruction": "r", "output": "b", "history": [["q", "a"]]},
    ],
)
@pytest.mark.parametrize(("label", "liked"), [(True, True), ("false", False), ("True", True), (1, True), (0.0, False)])
def test_votes(shape: dict[str, Any], label: Any, liked: bool) -> None:
    record = _read("vote", shape | {"label": label})
    assert isinstance(record, Vote)
    assert record.liked is liked
    assert _said(record.record) == [*_SAID, ("assistant", "b", True)]
    if isinstance(label, bool | str):
        assert choose("f", [shape | {"label": label}], RecordFormat.auto, {}, None)[0].name == "vote"


def test_images_are_carried() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "http://x/a.png"}},
        {"type": "text", "text": "What is it, and "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]
    row = {"messages": [_user(parts), _assistant("a cat"), _user("<image>?"), _assistant("none")]}
    record = _record("messages", row | {"images": ["b.png", {"path": "c.png", "bytes": None}]})
    assert record.messages[0] == Message("user", "<image>What is it, and <image>?", images=("http://x/a.png", "b.png"))
    assert record.messages[2].images == ("c.png",)
    for images in (["b.png"], ["b.png", "c.png", "d.png"], None):
        with pytest.raises(RowFault, match="marks and images differ in number"):
            _read("messages", row | {"images": images})
    with pytest.raises(RowFault, match="2 <image> marks, 1 images"):  # which mark is the image's cannot be told
        _read("messages", {"messages": [_user([*parts[:1], {"type": "text", "text": "<image>"}]), _assistant("a")]})
    svg = {"messages": [_user(parts[:2]), _assistant("a"), _user("and <image> in SVG?"), _assistant("b")]}
    assert [m.images for m in _record("messages", svg).messages] == [("http://x/a.png",), (), (), ()]
    share = [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]
    chosen, _ = choose("f", [{"conversations": share, "image": "a.png"}], RecordFormat.auto, {}, None)
    shown = chosen.read({"conversations": share, "image": "a.png"}, _HERE)
    assert isinstance(shown, Record)
    assert shown.messages[0].images == ("a.png",)
    assert _record("sharegpt", {"conversations": share}).messages[0].images == ()  # in SVG it is a word like any other


def test_alpaca_prompt_completion_and_text() -> None:
    row = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]]}
    assert _turns("alpaca", row) == [
        ("system", "s", False),
        ("user", "q", False),
        ("assistant", "a", True),
        ("user", "i\nx", False),
        ("assistant", "o", True),
    ]
    assert _turns("alpaca", {"instruction": "i", "input": None, "output": "o"})[0] == ("user", "i", False)
    assert _turns("prompt_completion", {"prompt": "p", "completion": "c"}, system="s") == [
        ("system", "s", False),
        ("user", "p", False),
        ("assistant", "c", True),
    ]
    assert FORMATS["text"]().read({"text": "t"}, _HERE) == TextRecord(_HERE, "t")


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("prompt_completion", {"prompt": "p"}, "missing column"),
        ("prompt_completion", {"prompt": "p", "completion": None}, "null where text belongs"),
        ("prompt_completion", {"prompt": "p", "completion": 7}, "not text"),
        ("prompt_completion", {"prompt": "p", "completion": " \n"}, "empty assistant turn"),
        ("prompt_completion", {"prompt": "", "completion": "c"}, "empty user turn"),
        ("prompt_completion", {"prompt": "p\ud800", "completion": "c"}, "invalid UTF-8"),
        ("text", {"text": "\n"}, "empty text"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["q"]]}, "history is not a list of pairs"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "a"}]}, "roles out of order"),
        ("sharegpt", {"conversations": [{"from": "cat", "value": "a"}]}, "unknown role"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}]}, "no answer at the end"),
        ("sharegpt", {"conversations": []}, "no turns"),
        ("sharegpt", {"conversations": "a"}, "turns are not a list"),
        ("sharegpt", {"conversations": ["a"]}, "a turn is not an object"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "a turn lacks 'value'"),
        ("sharegpt", {"conversations": [], "tools": "{"}, "tools are not JSON"),
        (
            "messages",
            {"messages": [_user([{"type": "input_audio"}])]},
            "a part of the content is neither text nor image",
        ),
        ("messages", {"messages": [_user("q")], "videos": ["a.mp4"]}, "'videos' is not read"),
        (
            "messages",
            {"messages": [_user([{"type": "image", "image": {"bytes": "x"}}])]},
            "an image is not a reference",
        ),
        ("messages", {"messages": [_user("q"), _assistant("", reasoning="hm")]}, "empty assistant turn"),
        ("messages", {"messages": [_user("q"), _assistant("<think>a")]}, "reasoning is not closed"),
        ("messages", {"messages": [_user("q"), _assistant("a</think>b")]}, "a stray reasoning marker"),
        ("messages", {"messages": [_user("q"), _assistant("<think>a</think>b<think>")]}, "a stray reasoning marker"),
        (
            "messages",
            {"messages": [_user("q"), _assistant("<think>a</think>b", thinking="c")]},
            "reasoning is given twice",
        ),
        (
            "messages",
            {"messages": [_user("q"), _assistant("a"), {"role": "system", "content": ""}]},
            "roles out of order",
        ),
        ("messages", {"messages": [{"role": "system", "content": "a"}], "system": "b"}, "two system turns"),
        (
            "messages",
            {"messages": [_user("q") | {"tool_calls": [1]}]},
            "a call or reasoning that is not the assistant's",
        ),
        ("messages", {"messages": [_user("q"), _assistant("", tool_calls=[1])]}, "a call is not a function's"),
        ("messages", {"messages": [_user("q"), _call("[1]")]}, "arguments are not an object"),
        ("messages", {"messages": [_user("q"), _call("{")]}, "arguments are not JSON"),
        ("messages", {"messages": [_user("q"), _call('{"a": NaN}')]}, "arguments are not JSON"),
        ("messages", {"messages": [_user("q"), _call('{"a": "\\ud800"}')]}, "invalid UTF-8"),
        ("messages", {"messages": [_user("q"), _call('{"a": 1, "a": 2}')]}, "a key stands twice"),
        ("messages", {"messages": [_user("q"), _call('{"a":' + "[" * 64 + "]" * 64 + "}")]}, "nested too deeply"),
        ("messages", {"messages": [_user("q"), _call('{"a":' + "[" * 9**5)]}, "arguments are not JSON"),
        (
            "messages",
            {"messages": [_user("q"), _call("{}"), {"role": "tool", "content": "1", "tool_call_id": "y"}]},
            "a tool's answer to no call",
        ),
        (
            "sharegpt",
            {"conversations": [_GPT, {"from": "function_call", "value": "f(1)"}]},
            "a function call is not JSON",
        ),
        ("sharegpt", {"conversations": [_GPT, {"from": "function_call", "value": " "}]}, "a function call is not JSON"),
        ("sharegpt", {"conversations": [_GPT], "tools": "[1]"}, "tools are not a list of functions"),
        ("sharegpt", {"conversations": [_GPT], "tools": '[{"name": " "}]'}, "a function has no name"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no prompt"),
        ("preference", {"prompt": "q", "messages": [_TURN], "chosen": "a", "rejected": "b"}, "more than one prompt"),
        (
            "preference",
            {"chosen": [_user("q"), _assistant("a")], "rejected": [_user("r"), _assistant("a")]},
            "chosen and rejected answer different questions",
        ),
        (
            "preference",
            {"chosen": [*_CHAT, _assistant("b")], "rejected": _CHAT[:2]},
            "one of chosen and rejected is the beginning of the other",
        ),
        (
            "preference",
            {"prompt": "other", "chosen": [_user("q"), _assistant("a")], "rejected": "b"},
            "the prompt is not in the chosen conversation",
        ),
        ("vote", {"prompt": "q", "completion": "a", "label": -1}, "the label is neither true nor false"),
        ("vote", {"prompt": "q", "completion": "a", "label": None}, "the label is neither true nor false"),
        ("vote", {"prompt": "q", "label": True}, "no conversation to vote on"),
        ("vote", {"prompt": "q", "completion": "a", "messages": [], "label": 1}, "more than one conversation"),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "a", "train": "no"}]},
            "'train' is neither 0 nor 1",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]},
            "no turn to learn from",
        ),
    ],
)
def test_a_row_that_cannot_be_used_says_why(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowFault) as caught:
        FORMATS[name]().read(row, _HERE)
    assert caught.value.reason == reason


def test_rows_of_another_shape_become_rejects_not_other_records() -> None:
    chosen, _ = choose("f", [{"messages": [_TURN]}], RecordFormat.auto, {}, None)
    for row, fault in (
        ({"conversations": [_GPT]}, "missing column: messages"),
        ({"messages": [_GPT]}, "a turn lacks 'role': turn 1 has 'from', 'value'"),
        ({"messages": "q"}, "turns are not a list: messages is a text"),
    ):
        with pytest.raises(RowFault) as caught:
            chosen.read(row, _HERE)
        assert str(caught.value) == fault
