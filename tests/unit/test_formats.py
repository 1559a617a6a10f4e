"""Raw rows become records, or are refused with a reason; `auto` recognises what is certain and stops at the rest."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import ConfigError, DataError
from configs.schema.dataset import RecordFormat
from data_prep.formats import FORMATS
from data_prep.formats.detect import choose
from data_prep.records import Origin, Record, RowFault, TextRecord

_HERE = Origin("rows.jsonl", 3)


def _turns(name: str, row: dict[str, Any], system: str | None = None) -> list[tuple[str, str, bool]]:
    record = FORMATS[name](system=system).read(row, _HERE)
    assert isinstance(record, Record)
    return [(m.role, m.content, m.train) for m in record.messages]


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


def test_sharegpt_says_function_calls_and_shows_observations_and_tools() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f"}'},
            {"from": "observation", "value": "7"},
            {"from": "gpt", "value": "seven"},
        ],
        "tools": '[{"name": "f"}]',
    }
    system, *rest = _turns("sharegpt", row, system="Be kind.")
    assert system[0] == "system"
    assert system[1].startswith("Be kind.\n\n")
    assert system[1].endswith('[{"name": "f"}]')
    assert rest == [
        ("user", "q", False),
        ("assistant", '{"name": "f"}', True),
        ("tool", "7", False),
        ("assistant", "seven", True),
    ]
    assert _turns("sharegpt", row | {"tools": "[]"})[0][0] == "user"


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
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "a part of the content is not text",
        ),
        (
            "messages",
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]},
            "'tool_calls' is not read",
        ),
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


_TURN, _GPT = {"role": "user", "content": "q"}, {"from": "human", "value": "q"}


@pytest.mark.parametrize(
    ("row", "name", "columns"),
    [
        ({"messages": [_TURN]}, "messages", {}),
        ({"conversations": [_GPT]}, "sharegpt", {}),
        ({"conversations": [_TURN]}, "messages", {"messages": "conversations"}),
        ({"messages": [_GPT]}, "sharegpt", {"conversations": "messages"}),
        ({"instruction": "i", "input": "", "output": "o", "text": "i o"}, "alpaca", {}),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", {}),
        ({"text": "t", "url": "u"}, "text", {}),
    ],
)
def test_auto_recognises(row: dict[str, Any], name: str, columns: dict[str, str]) -> None:
    chosen, why = choose("f.jsonl", [row], RecordFormat.auto, {}, None)
    assert (chosen.name, chosen.columns) == (name, columns)
    assert why.startswith(f"{name} (")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "question, answer; none of the known shapes"),
        ({"messages": [_TURN], "prompt": "p", "completion": "c"}, r"messages \(.*prompt_completion \("),
        ({"conversations": [_GPT], "chosen": {}, "rejected": {}}, "preference pairs"),
    ],
)
def test_auto_stops_when_unsure(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"f.jsonl: the format cannot be told[^\n]*{message}"):
        choose("f.jsonl", [row], RecordFormat.auto, {}, None)


def test_columns_are_mapped_and_checked() -> None:
    mapping = {"prompt": "question", "completion": "answer"}
    for wanted in (RecordFormat.auto, RecordFormat.prompt_completion):
        chosen, _ = choose("f", [{"question": "q", "answer": "a"}], wanted, mapping, None)
        record = chosen.read({"question": "q", "answer": "a"}, _HERE)
        assert isinstance(record, Record)
        assert record.messages[1].content == "a"
    with pytest.raises(DataError, match="f: no column 'answer' .*found: question, answers; nearest: 'answers'"):
        choose("f", [{"question": "q", "answers": "a"}], RecordFormat.prompt_completion, mapping, None)
    with pytest.raises(ConfigError, match="dataset.columns.promt: .*did you mean 'prompt'"):
        choose("f", [{"q": "q"}], RecordFormat.auto, {"promt": "q"}, None)
