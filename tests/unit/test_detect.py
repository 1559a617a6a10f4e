"""`auto` recognises what is certain and stops at the rest; columns, keys and roles may have other names."""

from __future__ import annotations

from typing import Any

import pytest

from configs.errors import ConfigError, DataError
from configs.schema.dataset import RecordFormat
from data_prep.formats.detect import choose
from data_prep.records import Origin, Record, RowFault, Vote

_HERE = Origin("rows.jsonl", 3)
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
        ({"prompt": "p", "completion": "c", "label": "mit"}, "prompt_completion", {}),
        ({"conversation": [_TURN], "kto_tag": True}, "vote", {"messages": "conversation", "label": "kto_tag"}),
        ({"text": "t", "url": "u"}, "text", {}),
    ],
)
def test_auto_recognises(row: dict[str, Any], name: str, columns: dict[str, str]) -> None:
    chosen, why = choose("f.jsonl", [row], RecordFormat.auto, {}, None)
    assert (chosen.name, chosen.columns) == (name, columns)
    assert why.startswith(f"{name} (")
    assert why.endswith("; not read: url") == ("url" in row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "question, answer; none of the known shapes"),
        ({"messages": [_TURN], "prompt": "p", "completion": "c"}, r"messages \(.*prompt_completion \("),
        ({"chosen": "Human: q Assistant: a", "rejected": "b"}, "none of the known shapes"),
        ({"prompt": "p", "completion": "c", "label": 0}, r"prompt_completion \(.*vote \("),
    ],
)
def test_auto_stops_when_unsure(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"f.jsonl: the format cannot be told[^\n]*{message}"):
        choose("f.jsonl", [row], RecordFormat.auto, {}, None)


_ZH = {"角色": "用户", "内容": "问"}


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"对话": [_ZH, {"角色": "助手", "内容": "答"}]}, "{messages: 对话, role: 角色, content: 内容}"),
        ({"chat": [_TURN, {"role": "assistant", "content": "a"}]}, "{messages: chat}"),
        ({"chat": [_GPT, {"from": "gpt", "value": "a"}]}, "{conversations: chat}"),
        ({"Question": "q", "Response": "a", "id": 3}, "{prompt: Question, completion: Response}"),
        ({"prompt": "q", "response": "a"}, "{completion: response}"),
        ({"query": "q", "response": "a", "history": []}, "{instruction: query, output: response}"),
        ({"instruction": "q", "context": "c", "response": "a"}, "{output: response, input: context}"),
        ({"question": "q", "chosen": "a", "rejected": "b"}, "{prompt: question}"),
        ({"content": "document"}, "{text: content}"),
    ],
)
def test_the_remedy_makes_the_file_readable(row: dict[str, Any], mapping: str) -> None:
    with pytest.raises(DataError) as caught:
        choose("f.jsonl", [row], RecordFormat.auto, {}, None)
    assert caught.value.remedy is not None and f"'dataset.columns={mapping}'" in caught.value.remedy
    columns = dict(pair.split(": ") for pair in mapping.strip("{}").split(", "))
    choose("f.jsonl", [row], RecordFormat.auto, columns, None)[0].read(row, _HERE)


@pytest.mark.parametrize(
    ("rows", "remedy"),
    [
        ([{"messages": '[{"role": "user"}]'}], "'messages' holds JSON written as text"),
        ([{"data": {"messages": [_TURN]}}], "take what is in 'data' out"),
        ([{"chosen": "a", "rejected": "b"}], "name the column of the prompt"),
        ([{"dialogue": [{"speaker": "Kundin", "text": "q"}]}], "objects of speaker, text"),
        ([{"a": 1}], "say which columns are meant"),
        ([{"prompt": "p", "completion": "c", "label": 0}], "dataset.format=prompt_completion or dataset.format=vote"),
        ([{"messages": [_TURN]}, {"prompt": "p", "completion": "c"}], "a file of its own"),
    ],
)
def test_where_no_setting_helps_the_remedy_says_what_does(rows: list[dict[str, Any]], remedy: str) -> None:
    with pytest.raises(DataError) as caught:
        choose("f.jsonl", rows, RecordFormat.auto, {}, None)
    assert remedy in str(caught.value.remedy)


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


def test_turns_under_other_keys_and_roles_under_other_names() -> None:
    row = {
        "dialogue": [
            {"speaker": "Kundin", "text": "q"},
            {"speaker": "Assistant", "text": "a"},
            {"speaker": "用户", "text": "r"},
            {"speaker": "助手", "text": "b"},
        ]
    }
    columns, roles = {"messages": "dialogue", "role": "speaker", "content": "text"}, {"Kundin": "user"}
    for wanted in (RecordFormat.auto, RecordFormat.messages):
        chosen, _ = choose("f", [row], wanted, columns, None, roles=roles)
        record = chosen.read(row, _HERE)
        assert isinstance(record, Record)
        assert [(m.role, m.content, m.train) for m in record.messages] == [
            ("user", "q", False),
            ("assistant", "a", True),
            ("user", "r", False),
            ("assistant", "b", True),
        ]
    with pytest.raises(RowFault, match="unknown role.*'Kundin'.*dataset.roles"):
        choose("f", [row], RecordFormat.auto, columns, None)[0].read(row, _HERE)
    with pytest.raises(ConfigError, match=r"dataset.roles.Kundin: no such role: 'customer'"):
        choose("f", [row], RecordFormat.auto, columns, None, roles={"Kundin": "customer"})
    peers = {"chat": [_GPT, {"from": "gpt", "value": "a"}]}  # a peer's config maps turns of any shape to 'messages'
    chosen, _ = choose("f", [peers], RecordFormat.auto, {"messages": "chat"}, None)
    assert isinstance(chosen.read(peers, _HERE), Record)
    votes = {
        "completion": [_TURN, {"role": "assistant", "content": "a"}],
        "prompt": "q",
        "label": True,
    }  # as one well-known export has them
    chosen, _ = choose("f", [votes], RecordFormat.auto, {"messages": "completion"}, None)
    assert isinstance(chosen.read(votes, _HERE), Vote)
