"""Rendering in its corners: what each kind of template and tokenizer asks for, what is rejected, what is cut.

`test_render_fuzz.py` has the broad proof.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from transformers import ByT5Tokenizer

from configs.errors import ConfigError, ModelError
from configs.schema.roots import TooLong
from data_prep.encode import pieces_add_up
from data_prep.records import Message, Origin, Pair, Record, Reject, TextRecord, ToolCall, Vote
from data_prep.render import PairSample, Renderer, Sample, VoteSample
from tests.unit.families import FAMILIES
from tests.unit.prep_kit import CHATML, CHINESE, MARKED, byte_level, sentencepiece_like, with_template

_TOOLS = ({"type": "function", "function": {"name": "look_up", "parameters": {}}},)
_CALL = ToolCall("look_up", {"query": "a\nb", "n": 2}, "call00001")
_CALLING = Message("assistant", "Let me see.", train=True, calls=(_CALL,))


def _record(*contents: str, tools: tuple[dict[str, Any], ...] = (), **last: Any) -> Record:
    """A conversation of user and assistant in turn, every answer learned."""
    messages = [Message("assistant" if n % 2 else "user", text, train=bool(n % 2)) for n, text in enumerate(contents)]
    return Record(Origin("f", 7), (*messages[:-1], dataclasses.replace(messages[-1], **last)), tools)


def _renderer(template: str | None, tokenizer: Any = None, **settings: Any) -> Renderer:
    return Renderer(with_template(tokenizer or byte_level(), template), **{"max_length": 10**6, **settings})


def _said(renderer: Renderer, sample: Any) -> list[str]:
    assert isinstance(sample, Sample), sample
    return [renderer.decode(sample.input_ids[a:b]) for a, b in sample.spans]


def _rejected(renderer: Renderer, record: Any) -> Reject:
    ((reject,),) = renderer.render([record])
    assert isinstance(reject, Reject), reject
    return reject


# Prompts


def test_an_answer_that_begins_with_a_line_break_would_merge_with_the_prompt() -> None:
    """The case the pieces are for: tokenised at once, prompt and answer share a token."""
    renderer = _renderer(CHATML)
    ((sample,),) = renderer.render([_record("q", "\n\nthe answer")])
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\nthe answer"}]
    at_once = byte_level()(byte_level().apply_chat_template(messages, tokenize=False))["input_ids"]
    assert isinstance(sample, Sample)
    assert at_once[: sample.spans[0][0]] != sample.input_ids[: sample.spans[0][0]]


def test_an_earlier_answer_that_would_merge_is_learned_on_its_own() -> None:
    """In the later prompt it has merged, as inference will have it; alone it is learned behind its own prompt."""
    renderer = _renderer(CHATML)
    ((whole, own),) = renderer.render([_record("q", "\n\nthe answer", "r", "yes")])
    assert [_said(renderer, s) for s in (whole, own)] == [["yes<|end|>"], ["\n\nthe answer<|end|>"]]
    assert [s.id for s in (whole, own)] == ["f:7", "f:7/2"]
    assert renderer.notes.total() == 1


def test_reasoning_that_later_turns_drop_is_learned_on_its_own() -> None:
    renderer = _renderer(FAMILIES["qwen3"].template)
    first = Message("assistant", "one", train=True, reasoning="because")
    record = Record(Origin("f", 7), (Message("user", "q"), first, *_record("r", "two").messages))
    ((whole, own),) = renderer.render([record])
    assert _said(renderer, whole) == ["two<|end|>"]
    assert "because" not in renderer.decode(whole.input_ids)
    assert "<think>\n\n</think>\n\ntwo" in renderer.decode(whole.input_ids)  # context, put there by the template
    assert _said(renderer, own) == ["<think>\nbecause\n</think>\n\none<|end|>"]


def test_a_prompt_that_opens_reasoning_loses_it_before_answers_without() -> None:
    renderer = _renderer(FAMILIES["r1"].template)
    ((with_it,), (without,)) = renderer.render([_record("q", "a", reasoning="why"), _record("q", "a")])
    assert _said(renderer, with_it) == ["why\n</think>\n\na</s>"]
    assert _said(renderer, without) == ["a</s>"]
    assert "<think>" not in renderer.decode(without.input_ids)
    assert list(renderer.notes.values()) == [1]


def test_a_token_that_swallows_the_space_behind_it_does_so_between_turns() -> None:
    """As Phi's end token does: pieces by themselves would have line breaks that inference does not."""
    tokenizer = byte_level.__wrapped__()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|stop|>", rstrip=True, special=True)])
    renderer = _renderer(CHATML.replace("<|end|>", "<|stop|>"), tokenizer)
    ((sample,),) = renderer.render([_record("q", "a", "r", "b")])
    assert _said(renderer, sample) == ["a<|stop|>", "b<|stop|>"]
    prompt = [{"role": m.role, "content": m.content} for m in _record("q", "a", "r", "b").messages[:3]]
    expected = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert sample.input_ids[: sample.spans[1][0]] == expected


# Templates


@pytest.mark.parametrize(
    ("template", "record", "reason"),
    [
        (CHATML, _record("q", "it ends<|end|>here"), "the text holds a control token"),
        (CHATML, _record("q", "a", reasoning="it ends<|end|>"), "the text holds a control token"),
        (CHATML, _record("q<s>", "a"), "the text holds a control token"),
        (CHATML, _record("q", "a", tools=({"function": {"name": "<|end|>"}},)), "the text holds a control token"),
        (
            FAMILIES["qwen3"].template,
            _record("q", "", calls=(ToolCall("look_up", {"k": [{"<|end|>": 1}]}),)),
            "the text holds a control token",
        ),
        (CHATML, _record("q", "a", images=("a.png",)), "images need a model that sees"),
        (
            CHATML.replace("m['content']", "m['content'] | upper"),
            _record("q", "quiet"),
            "the chat template changes the assistant's text",
        ),
        (CHATML.replace("<|end|>\n", "\n"), _record("q", "endless"), "no end token after the answer"),
        (
            CHATML.replace("m['content']", "m['content'].split('</think>') | last"),
            _record("q", "a", reasoning="b"),
            "the chat template leaves out a part of the answer",
        ),
        (
            FAMILIES["qwen3"].template.replace("{{ content }}", ""),
            _record("q", "a", calls=(_CALL,)),
            "the chat template leaves out a part of the answer",
        ),
        (
            FAMILIES["qwen3"].template.replace("c.function.arguments | tojson", "'{}'"),
            _record("q", "", calls=(_CALL,)),
            "the chat template leaves out a part of the answer",
        ),
        ("{{ messages | length }}" + CHATML, _record("q", "a"), "the chat template changes what came before an answer"),
        ("{{ raise_exception('no such talk') }}", _record("q", "a"), "the chat template refuses the conversation"),
        (
            "{{ 1 // (2 - messages | length) }}" + CHATML,
            _record("q", "a"),
            "the chat template refuses the conversation",
        ),
        (
            MARKED.replace("+ '<|end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|end|>' }}"),
            _record("q", "a"),
            "the template's generation marks leave the end token out",
        ),
        (
            MARKED.replace("{% generation %}{{ m['content'] +", "{{ m['content'] }}{% generation %}{{"),
            _record("q", "a"),
            "the template's generation marks leave a part of the answer out",
        ),
        (
            MARKED.replace("'assistant' %}{% gen", "'assistant' and loop.last %}{% gen"),
            _record("q", "a", "r", "b"),
            "the template's generation marks do not match the answers",
        ),
    ],
)
def test_what_cannot_be_supervised_exactly_is_rejected(template: str, record: Record, reason: str) -> None:
    reject = _rejected(_renderer(template), record)
    assert reject.reason == reason
    assert str(reject).startswith("f:7: ")


def test_a_turn_may_end_with_the_token_that_begins_the_next_one() -> None:
    """As GLM's do; its last turn then has no end, and a template that gives it one is needed."""
    glm = (
        "{% for m in messages %}{{ ('<|start|>' if m.role == 'assistant' else '<|header|>') + '\n' + m.content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}{% for k, v in c.function.arguments"
        ".items() %}{{ '<arg_key>' + k + '</arg_key><arg_value>' + (v if v is string else v | tojson) }}"
        "{% endfor %}{{ '</tool_call>' }}{% endfor %}{% endfor %}{{ '<|start|>\n' if add_generation_prompt }}"
    )
    renderer = _renderer(glm)
    messages = (Message("user", "q"), _CALLING, Message("tool", "t"), *_record("q", "a", "r", "b").messages[1:])
    record = Record(Origin("f", 1), (*messages[:-1], dataclasses.replace(messages[-1], train=False)))
    ((sample,),) = renderer.render([record])
    called = "Let me see.\n<tool_call>look_up<arg_key>query</arg_key><arg_value>a\nb<arg_key>n</arg_key><arg_value>2"
    assert _said(renderer, sample) == [called + "</tool_call><|header|>", "a<|header|>"]
    assert _rejected(renderer, _record("q", "a")).reason == "no end token after the answer"


@pytest.mark.parametrize(
    ("content", "shown"),
    [("a", "m.content.replace('a', 'aa')"), ("a", "m.content + ('!' if m.content == 'a' else '')")],
)
def test_a_short_text_beside_a_call_is_not_found_by_chance(content: str, shown: str) -> None:
    template = FAMILIES["qwen3"].template.replace("{{ content }}", "{{ " + shown + " }}")
    behind = FAMILIES["qwen3"].template + "{{ 'x' if messages[-1].content == 'a' }}"
    for changing in (template, behind):
        reject = _rejected(_renderer(changing), _record("q", content, calls=(_CALL,)))
        assert reject.reason == "the chat template changes the assistant's text"


def test_a_turn_with_a_call_ends_with_the_first_end_token() -> None:
    template = FAMILIES["mistral"].template.replace("{{ eos_token }}", "{{ eos_token + '\n<s>' }}")
    renderer = _renderer(template)
    ((sample,),) = renderer.render([_record("q", "", calls=(_CALL,))])
    assert _said(renderer, sample)[0].endswith("}</s>")


def test_a_template_without_tools_is_given_them_as_text() -> None:
    renderer = _renderer(CHATML)
    record = Record(Origin("f", 1), (Message("user", "q"), _CALLING, *_record("r", "a").messages), _TOOLS)
    ((sample,),) = renderer.render([dataclasses.replace(record, messages=(*record.messages[:2], *_tool_turn("t")))])
    call = '{"name": "look_up", "arguments": {"query": "a\\nb", "n": 2}}'
    assert _said(renderer, sample) == [f"Let me see.\n{call}<|end|>", "done<|end|>"]
    assert renderer.decode(sample.input_ids).startswith("<|start|>system\nYou may call these functions.")
    assert sum(renderer.notes.values()) == 2


def test_a_template_that_takes_arguments_as_text_gets_text() -> None:
    """DeepSeek V3's adds them to strings."""
    template = CHATML.replace(
        "m['content'] +",
        "m['content'] + (m.tool_calls[0].function.arguments + m.tool_calls[0].function.name if m.tool_calls else '') +",
    ).replace(".arguments + m.tool_calls[0].function.name", ".name + m.tool_calls[0].function.arguments")
    renderer = _renderer(template)
    ((sample,),) = renderer.render([_record("q", "", calls=(_CALL,))])
    assert _said(renderer, sample) == ['look_up{"query": "a\\nb", "n": 2}<|end|>']
    assert len(renderer.notes) == 1


def test_template_kwargs_reach_the_template_and_may_not_replace_the_conversation() -> None:
    renderer = _renderer("{{ greeting }}" + CHATML, template_kwargs={"greeting": "Hail. "})
    ((sample,),) = renderer.render([_record("q", "a")])
    assert renderer.decode(sample.input_ids).startswith("Hail. ")
    with pytest.raises(ConfigError, match=r"template\.kwargs\.messages"):
        _renderer(CHATML, template_kwargs={"messages": []}).render([_record("q", "a")])


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_that_writes_the_date_writes_the_same_one_every_day(template: str) -> None:
    renderer = _renderer("{{ strftime_now('%d %b %Y') }}" + template)
    ((sample,),) = renderer.render([_record("q", "a")])
    assert renderer.decode(sample.input_ids).startswith("26 Jul 2024")
    assert renderer.notes.total() == 1


def test_no_template_and_a_broken_template_are_the_models_fault() -> None:
    with pytest.raises(ModelError, match=r"no chat template[\s\S]*template\.path"):
        _renderer(None).render([_record("q", "a")])
    with pytest.raises(ModelError, match="does not compile"):
        _renderer("{% for %}").render([_record("q", "a")])
    ((text,),) = _renderer(None).render([TextRecord(Origin("f", 1), "needs none")])
    assert isinstance(text, Sample)


# Tokenizers


def test_the_end_token_is_learned_though_it_is_the_padding_token() -> None:
    assert byte_level().pad_token_id == byte_level().eos_token_id
    ((sample,),) = _renderer(CHINESE).render([_record("q", "a")])
    assert sample.input_ids[sample.spans[-1][1] - 1] == byte_level().pad_token_id


def test_a_tokenizer_without_a_fast_core_works() -> None:
    renderer = _renderer(CHINESE, ByT5Tokenizer())
    document = TextRecord(Origin("f", 8), "a document with </s> in it")
    ((sample,), (text,)) = renderer.render([_record("qu\n", "授权\nyes"), document])
    assert _said(renderer, sample) == ["授权\nyes</s>"]
    assert text.input_ids.count(1) == 1
    # It strips what stands before a special token: such an answer is never learned half.
    assert _rejected(renderer, _record("q", "a\n")).reason == "the tokens of the answer decode to another text"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("tokenizer", [byte_level, sentencepiece_like])
def test_a_document_cannot_spell_a_control_token(tokenizer: Any, fast: bool) -> None:
    renderer = _renderer(CHATML, tokenizer(), fast=fast)
    (chat,) = renderer.render([_record("q", "a")])
    documents = [TextRecord(Origin("f", n), text) for n, text in enumerate(["ab</s>c<|end|>", "plain", "more</s>"])]
    samples = [sample for (sample,) in renderer.render(documents)]
    special = set(tokenizer().all_special_ids) | {tokenizer().convert_tokens_to_ids("<|end|>")}
    for document, sample in zip(documents, samples, strict=True):
        assert renderer.decode(sample.input_ids) == document.text + "</s>"
        assert [k for k, token in enumerate(sample.input_ids) if token in special] == [len(sample.input_ids) - 1]
    assert list(renderer.notes.values()) == [2]
    assert renderer.render([_record("q", "a")]) == [chat]  # whose control tokens are such, after documents as before


@pytest.mark.parametrize("fast", [True, False])
def test_an_answer_that_the_tokenizer_changes_is_rejected(fast: bool) -> None:
    tokenizer = byte_level.__wrapped__()
    changes = [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(changes)
    renderer = _renderer(CHATML, tokenizer, fast=fast)
    for changed in ("Yes", " yes"):
        assert _rejected(renderer, _record("q", changed)).reason == "the tokens of the answer decode to another text"
    assert isinstance(renderer.render([_record("q", "caf\u0065\u0301")])[0][0], Sample)  # composed, the same text


def test_a_space_adding_tokenizer_is_known_as_such() -> None:
    assert pieces_add_up(byte_level())
    assert not pieces_add_up(sentencepiece_like())


# Lengths


def test_a_batch_keeps_its_order_and_long_rows_are_named() -> None:
    renderer = _renderer(CHATML, max_length=60)
    long, short = _record("q", "a" * 80), _record("q", "yes")
    ((text,), (reject,), (sample,)) = renderer.render([TextRecord(Origin("f", 1), "the text"), long, short])
    assert isinstance(text, Sample)
    assert text.input_ids[-1] == byte_level().eos_token_id
    assert text.spans == [(1, len(text.input_ids))]
    assert isinstance(reject, Reject)
    assert (reject.reason, reject.counts) == ("longer than max_length", False)
    assert _said(renderer, sample) == ["yes<|end|>"]


@pytest.mark.parametrize("length", [20, 40, 60, 80, 100])
def test_truncation_never_beheads_an_answer(length: int) -> None:
    template = "{{ bos_token }}" + CHATML
    record = _record("question " * 3, "first 123456 answer", "more", "second 123456 answer")
    ((full,),) = _renderer(template).render([record])
    for policy in (TooLong.truncate_left, TooLong.truncate_right):
        renderer = _renderer(template, max_length=length, too_long=policy)
        ((sample,),) = renderer.render([record])
        if isinstance(sample, Reject):
            assert (sample.reason, sample.counts) == ("no supervised tokens left", False)
            starts = [start for start, _ in full.spans]
            cut = len(full.input_ids) - length
            assert min(starts) >= length if policy is TooLong.truncate_right else max(starts) < 1 + cut
            continue
        assert len(sample.input_ids) + sample.cut == len(full.input_ids)
        wanted = ["first 123456 answer<|end|>", "second 123456 answer<|end|>"]
        if policy is TooLong.truncate_left:
            assert sample.input_ids == [full.input_ids[0], *full.input_ids[1 + sample.cut :]]
            assert _said(renderer, sample) == wanted[-len(sample.spans) :]
        else:
            assert sample.input_ids == full.input_ids[:length]
            assert all(w.startswith(s) for w, s in zip(wanted, _said(renderer, sample), strict=False))
            assert _said(renderer, sample)[:-1] == wanted[: len(sample.spans) - 1]


def test_a_token_that_opens_every_turn_is_no_begin_token() -> None:
    tokenizer = byte_level.__wrapped__()
    tokenizer.bos_token = "<|start|>"
    record = _record("question " * 9, "yes")
    ((full,),) = _renderer(CHATML, tokenizer).render([record])
    ((cut,),) = _renderer(CHATML, tokenizer, max_length=30, too_long=TooLong.truncate_left).render([record])
    assert cut.input_ids == full.input_ids[-30:]


@pytest.mark.parametrize("length", [2, 3, 7, 100])
def test_chunks_learn_every_token_of_a_document_once(length: int) -> None:
    text = TextRecord(Origin("f", 1), "the answer is here " * 5 + "授权")
    ((full,),) = _renderer(CHATML).render([text])
    pieces, (long,) = _renderer(CHATML, max_length=length, too_long=TooLong.chunk).render(
        [text, _record("q" * 99, "a")]
    )
    learned = [token for piece in pieces for a, b in piece.spans for token in piece.input_ids[a:b]]
    assert full.input_ids[:1] + learned == full.input_ids
    assert all(2 <= len(piece.input_ids) <= length and piece.cut == 0 for piece in pieces)
    assert [piece.id for piece in pieces] == ["f:1", *(f"f:1/{n}" for n in range(2, len(pieces) + 1))]
    assert isinstance(long, Reject)
    assert "conversations are not cut" in long.detail


# Preferences


def test_a_pair_has_one_prompt_and_two_answers() -> None:
    renderer = _renderer(CHATML, max_length=80)
    chosen, rejected, long = (_record("q", text) for text in ("good", "bad", "b" * 90))
    origin = Origin("f", 3)
    pair, too_long, bad, vote = renderer.render(
        [
            Pair(origin, chosen, rejected),
            Pair(origin, chosen, long),
            Pair(origin, chosen, _record("q", "<|end|>")),
            Vote(origin, chosen, liked=False),
        ]
    )
    (one,) = pair
    assert isinstance(one, PairSample)
    assert (_said(renderer, one.chosen), _said(renderer, one.rejected)) == (["good<|end|>"], ["bad<|end|>"])
    start = one.chosen.spans[0][0]
    assert one.chosen.input_ids[:start] == one.rejected.input_ids[:start]
    assert [(r.reason, r.detail[:8]) for r in (too_long[0], bad[0])] == [  # type: ignore[union-attr]
        ("longer than max_length", "rejected"),
        ("the text holds a control token", "rejected"),
    ]
    assert vote == [VoteSample("f:3", dataclasses.replace(one.chosen), liked=False)]


def test_a_pair_stays_in_one_conversation_or_is_rejected() -> None:
    pair = Pair(Origin("f", 3), _record("q", "\n\nthe answer", "r", "yes"), _record("q", "no"))
    assert _rejected(_renderer(CHATML), pair).reason == "a preference's answers do not stay in one conversation"


def test_a_pair_whose_sides_have_different_prompts_is_rejected() -> None:
    """One side thinks, before the other the template puts an empty block: they do not go on from the same tokens."""
    pair = Pair(Origin("f", 3), _record("q", "good", reasoning="why"), _record("q", "bad"))
    reject = _rejected(_renderer(FAMILIES["qwen3"].template), pair)
    assert reject.reason == "chosen and rejected have different prompts in the chat template"


def _tool_turn(result: str) -> tuple[Message, Message]:
    return Message("tool", result, call_id=_CALL.id), Message("assistant", "done", train=True)
