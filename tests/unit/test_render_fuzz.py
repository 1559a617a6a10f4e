"""Generated records of every kind x templates of every family x two kinds of tokenizer.

What is learned is what the assistant says in that family, told here in Python and not by the code under test, behind
the tokens that inference would put before it; and all that is to be learned is learned exactly once.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from data_prep.formats.tools import tools_text
from data_prep.records import Message, Origin, Pair, Record, Reject, TextRecord, ToolCall, Vote
from data_prep.render import PairSample, Renderer, Sample, VoteSample
from tests.unit.families import FAMILIES, Family, content_with_calls
from tests.unit.prep_kit import SPECIALS, byte_level, sentencepiece_like, with_template

_TOKENIZERS = {"byte-level": byte_level, "sentencepiece": sentencepiece_like}
_SNIPPETS = [
    *[
        "the answer",
        "assistant",
        "user",
        "Is it so?",
        "12 34",
        "授权协议",
        "许可证，可以。",
        "é",
        "e\u0301",
        "🙂",
        "👩‍👩‍👧",
    ],
    *["\n", "\n\n", " ", "   ", "\t", "\r\n", "\u00a0", "\u3000", "    indented", "\u200b", "ﬁ", "\ufeff"],
    *[
        "<b>bold</b>",
        "</div>",
        "[INST]",
        "end|>",
        "<|",
        "{{ x }}",
        "{% if %}",
        '{"a": "b"}',
        '"',
        "\\n",
        "\\",
        "<rethink>",
    ],
    *["```py\nx = 1\n```", "| a | b |", "<tool_response>", "&lt;", "thinking", "<function=f>"],
]
_TOOLS = (
    {"type": "function", "function": {"name": "look_up", "description": "查 it\nup", "parameters": {"type": "object"}}},
)
_BORDER = "a token crosses the border of an answer"
_ROWS = 220
_ACCEPTED_AT_LEAST = {"byte-level": 0.99, "sentencepiece": 0.9}


@pytest.mark.parametrize("kind", _TOKENIZERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned_is_what_the_assistant_says(name: str, kind: str) -> None:
    family, tokenizer = FAMILIES[name], with_template(_TOKENIZERS[kind](), FAMILIES[name].template)
    renderer = Renderer(tokenizer, max_length=10**6, template_kwargs=family.variables)
    records = [_record(random.Random(f"{name} {n}"), n) for n in range(_ROWS)]
    results = renderer.render(records)
    reasons = family.refuses | ({_BORDER} if kind == "sentencepiece" else set())
    accepted = refused = 0
    for record, result in zip(records, results, strict=True):
        if isinstance(result[0], Reject):
            assert result[0].reason in reasons, (record, result)
            assert len(result) == 1 or kind == "sentencepiece"
            refused += result[0].reason in family.refuses
            continue
        accepted += 1
        for samples, conversation in _conversations(record, result):
            _check(samples, conversation, family, tokenizer, exact=kind == "byte-level")
    assert accepted >= _ACCEPTED_AT_LEAST[kind] * (_ROWS - refused)
    assert refused <= _ROWS * 0.6


@pytest.mark.parametrize("kind", _TOKENIZERS)
@pytest.mark.parametrize("name", ["chatml", "qwen3", "r1", "mistral"])
def test_the_shortcuts_change_nothing(name: str, kind: str) -> None:
    tokenizer = with_template(_TOKENIZERS[kind](), FAMILIES[name].template)
    records = [_record(random.Random(f"same {n}"), n) for n in range(120)]
    records += [TextRecord(Origin("t", n), _text(random.Random(n), 1, 30)) for n in range(40)]
    fast, plain = (Renderer(tokenizer, max_length=400, fast=fast) for fast in (True, False))
    assert fast.render(records) == plain.render(records)
    assert fast.notes == plain.notes


@pytest.mark.parametrize("kind", _TOKENIZERS)
def test_documents_are_learned_from_their_second_token_to_an_end_token(kind: str) -> None:
    renderer = Renderer(_TOKENIZERS[kind](), max_length=10**6)
    texts = [_text(random.Random(n), 2, 40) + random.Random(n).choice(["", "<|end|>", "</s>"]) for n in range(200)]
    samples = [s for (s,) in renderer.render([TextRecord(Origin("t", n), text) for n, text in enumerate(texts)])]
    lost = " " if kind == "sentencepiece" else ""
    for text, sample in zip(texts, samples, strict=True):
        assert isinstance(sample, Sample)
        assert renderer.decode(sample.input_ids).removeprefix(lost) == text.removeprefix(lost) + "</s>"
        assert sample.spans == [(1, len(sample.input_ids))]


def _conversations(record: Any, result: list[Any]) -> list[tuple[list[Sample], Record]]:
    if isinstance(record, Pair):
        (pair,) = result
        assert isinstance(pair, PairSample)
        sides = [(pair.chosen, record.chosen), (pair.rejected, record.rejected)]
        prompts = [sample.input_ids[: sample.spans[0][0]] for sample, _ in sides]
        assert prompts[0] == prompts[1]
        return [([sample], side) for sample, side in sides]
    if isinstance(record, Vote):
        (vote,) = result
        assert isinstance(vote, VoteSample)
        assert vote.liked == record.liked
        return [([vote.sample], record.record)]
    assert [s.id for s in result] == [record.id, *(f"{record.id}/{k}" for k in range(2, len(result) + 1))]
    return [(result, record)]


def _check(samples: list[Sample], record: Record, family: Family, tokenizer: Any, *, exact: bool) -> None:
    learned = []
    for sample in samples:
        assert sample.spans == sorted(sample.spans)
        for start, end in sample.spans:
            said = tokenizer.decode(sample.input_ids[start:end])
            context = sample.input_ids[:start]
            turns = [
                i
                for i, m in enumerate(record.messages)
                if m.train
                and i not in learned
                and _alike(said, family.says(m), family, exact=exact)
                and context
                in [tokenizer(p, add_special_tokens=False)["input_ids"] for p in _prompts(record, i, family, tokenizer)]
            ]
            assert turns, (said, tokenizer.decode(context), record)
            learned.append(turns[0])
    assert sorted(learned) == [i for i, m in enumerate(record.messages) if m.train]


def _alike(said: str, expected: str, family: Family, *, exact: bool) -> bool:
    """Equal; but for white space at the ends of the answer where the template, or SentencePiece, does not keep it."""
    if exact and family.exact:
        return said == expected
    assert expected.endswith(family.end)
    return said.endswith(family.end) and said[: -len(family.end)].strip() == expected[: -len(family.end)].strip()


def _prompts(record: Record, i: int, family: Family, tokenizer: Any) -> list[str]:
    """What inference puts before turn `i`; for a turn without reasoning also with an empty block, or none opened."""
    messages = [_openai(m, family) for m in record.messages[:i]]
    tools = list(record.tools) or None
    if tools and not family.tools:
        text, tools = tools_text(record.tools), None
        if messages[0]["role"] == "system":
            messages[0]["content"] += "\n\n" + text
        else:
            messages.insert(0, {"role": "system", "content": text})
    prompt = tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, **family.variables
    )
    if record.messages[i].reasoning:  # after prompts that rule it out, it is learned where they would do so
        return [prompt, prompt.removesuffix("<think>\n\n</think>\n\n")]
    closed = prompt.removesuffix("<think>\n") + "<think>\n\n</think>\n\n"
    return [prompt, closed, prompt.removesuffix("<think>\n")]


def _openai(m: Message, family: Family) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": m.role, "content": m.content}
    if m.calls and family.calls:
        turn["tool_calls"] = [
            {"type": "function", "id": c.id, "function": {"name": c.name, "arguments": c.arguments}} for c in m.calls
        ]
    elif m.calls:
        turn["content"] = content_with_calls(m)
    if m.reasoning and family.reasoning:
        turn["reasoning_content"] = m.reasoning
    elif m.reasoning:
        turn["content"] = f"<think>\n{m.reasoning}\n</think>\n\n{turn['content']}"
    return turn


def _record(random: random.Random, n: int) -> Record | Pair | Vote:
    record = Record(Origin("f", n + 1), *_talk(random))
    kind = random.random()
    if kind < 0.6:
        return record
    *before, last = (dataclasses.replace(m, train=False) for m in record.messages)
    other = Message("assistant", _text(random) + " otherwise", train=True, reasoning=last.reasoning)
    sides = [dataclasses.replace(record, messages=(*before, m)) for m in (dataclasses.replace(last, train=True), other)]
    return Pair(record.origin, *sides) if kind < 0.8 else Vote(record.origin, sides[0], random.random() < 0.5)


def _talk(random: random.Random) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    with_tools, thinks = random.random() < 0.35, random.random() < 0.35
    messages = [Message("system", _text(random))] if random.random() < 0.3 else []
    for _ in range(random.choice([1, 1, 2, 3])):
        messages.append(Message("user", _text(random)))
        while with_tools and random.random() < 0.5:
            calls = tuple(_call(random) for _ in range(random.choice([1, 1, 2])))
            content = _text(random) if random.random() < 0.4 else ""
            messages.append(Message("assistant", content, _trained(random), _thought(random, thinks), calls))
            messages += [Message("tool", _text(random), name=call.name, call_id=call.id) for call in calls]
        messages.append(Message("assistant", _text(random), _trained(random), _thought(random, thinks)))
    messages[-1] = dataclasses.replace(messages[-1], train=True)
    if random.random() < 0.2:  # dataset.learn=last
        messages = [*(dataclasses.replace(m, train=False) for m in messages[:-1]), messages[-1]]
    return tuple(messages), _TOOLS if with_tools else ()


def _trained(random: random.Random) -> bool:
    return random.random() < 0.8


def _thought(random: random.Random, thinks: bool) -> str:
    return _text(random).strip() if thinks and random.random() < 0.7 else ""


def _call(random: random.Random) -> ToolCall:
    leaves = [lambda: _text(random), lambda: random.randrange(99), lambda: random.choice([True, None, 1.5])]
    nested = [*leaves, lambda: [_text(random), {"k": 1}], lambda: {"z": _text(random), "a": False}, lambda: ""]
    keys = random.sample(["query", "数量", "b", "a"], random.randrange(3))
    return ToolCall("look_up", {key: random.choice(nested)() for key in keys}, f"call{random.randrange(10**5):05}")


def _text(random: random.Random, least: int = 1, most: int = 6) -> str:
    while True:
        text = "".join(random.choice(_SNIPPETS) for _ in range(random.randint(least, most)))
        if text.strip() and not any(token in text for token in SPECIALS):
            return text
