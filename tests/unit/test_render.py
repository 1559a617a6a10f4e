"""Loss spans: what is supervised is the assistant's text and its end token, whatever the template and the text."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import ModelError
from data_prep.records import Message, Origin, Record, Reject, TextRecord
from data_prep.render import Renderer, Sample, pieces_add_up
from tests.unit.prep_kit import CHATML, END, STRIPPING, TEMPLATES, byte_level, sentencepiece_like, with_template

_TRICKY = st.sampled_from(
    ["\n", "\n\n", " ", "  ", "\t", "assistant", "the answer", "é", "e\u0301", "授权", "🙂", "[/INST]", "<", "end|>"]
)
_TEXT = st.lists(st.one_of(_TRICKY, st.text(alphabet="ab .\n", max_size=4)), min_size=1, max_size=8).map("".join)
_MARKS_TOO_SHORT = TEMPLATES["marked"].replace(
    "{{ m['content'] + '<|end|>' }}{% endgeneration %}", "{{ m['content'] }}{% endgeneration %}{{ '<|end|>' }}"
)
_SAYABLE = _TEXT.filter(lambda text: text.strip())


@st.composite
def _conversations(draw: st.DrawFn) -> Record:
    messages = [Message("system", draw(_TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(_SAYABLE)))
        messages.append(Message("assistant", draw(_SAYABLE), train=draw(st.booleans())))
        if draw(st.booleans()):
            messages.append(Message("tool", draw(_SAYABLE)))
            messages.append(Message("assistant", draw(_SAYABLE), train=True))
    messages[-1] = Message("assistant", messages[-1].content, train=True)
    return Record(Origin("f", 1), tuple(messages))


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(record=_conversations())
def test_supervised_tokens_are_the_answers_and_their_end_tokens(name: str, record: Record) -> None:
    tokenizer = with_template(byte_level(), TEMPLATES[name])
    renderer = Renderer(tokenizer, max_length=10**6)
    (sample,) = renderer.render([record])
    assert isinstance(sample, Sample), sample
    said = [renderer.decode(sample.input_ids[a:b]) for a, b in sample.spans]
    wanted = [m.content + END[name] for m in record.messages if m.train]
    if name in STRIPPING:
        said = [text.removesuffix(END[name]).strip() + END[name] for text in said]
        wanted = [text.removesuffix(END[name]).strip() + END[name] for text in wanted]
    assert said == wanted
    whole = tokenizer.apply_chat_template(_dicts(record), tokenize=False)
    assert renderer.decode(sample.input_ids) == whole


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(question=_SAYABLE, answer=_SAYABLE)
def test_the_prompt_has_the_tokens_of_inference(name: str, question: str, answer: str) -> None:
    tokenizer = with_template(byte_level(), TEMPLATES[name])
    record = Record(Origin("f", 1), (Message("user", question), Message("assistant", answer, train=True)))
    (sample,) = Renderer(tokenizer, max_length=10**6).render([record])
    assert isinstance(sample, Sample)
    prompt = tokenizer.apply_chat_template(_dicts(record)[:1], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert sample.input_ids[: sample.spans[0][0]] == prompt


def test_an_answer_that_begins_with_a_line_break_would_merge_with_the_prompt() -> None:
    """The case the pieces are for: tokenised at once, prompt and answer share a token."""
    tokenizer = with_template(byte_level(), CHATML)
    record = Record(Origin("f", 1), (Message("user", "q"), Message("assistant", "\n\nthe answer", train=True)))
    (sample,) = Renderer(tokenizer, max_length=100).render([record])
    at_once = tokenizer(tokenizer.apply_chat_template(_dicts(record), tokenize=False))["input_ids"]
    assert isinstance(sample, Sample)
    assert at_once[: sample.spans[0][0]] != sample.input_ids[: sample.spans[0][0]]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(record=_conversations())
def test_a_tokenizer_that_adds_a_space_is_fed_whole_texts(record: Record) -> None:
    tokenizer = with_template(sentencepiece_like(), TEMPLATES["headers"])
    assert not pieces_add_up(tokenizer)
    renderer = Renderer(tokenizer, max_length=10**6)
    (sample,) = renderer.render([record])
    if isinstance(sample, Reject):  # a token across the border, or another prompt than at inference: never learned
        assert sample.reason in (
            "a token crosses the border of an answer",
            "the prompt alone has other tokens than before its answer",
        )
        return
    whole = tokenizer(tokenizer.apply_chat_template(_dicts(record), tokenize=False), add_special_tokens=False)
    assert sample.input_ids == whole["input_ids"]
    said = [renderer.decode(sample.input_ids[a:b]).strip() for a, b in sample.spans]
    assert said == [m.content.strip() + "<|end|>" for m in record.messages if m.train]


def test_the_space_adding_tokenizer_does_prepare_ordinary_rows() -> None:
    renderer = Renderer(with_template(sentencepiece_like(), TEMPLATES["headers"]), max_length=500)
    record = Record(Origin("f", 1), (Message("user", "the user"), Message("assistant", "the answer", train=True)))
    assert isinstance(renderer.render([record])[0], Sample)


@pytest.mark.parametrize(
    ("template", "answer", "reason"),
    [
        (CHATML, "it ends<|end|>here", "the text holds a control token of the template"),
        (
            CHATML.replace("m['content']", "m['content'] | upper"),
            "quiet",
            "the chat template changes the assistant's text",
        ),
        (CHATML.replace("<|end|>\n", "\n"), "endless", "no end token after the answer"),
        (_MARKS_TOO_SHORT, "a", "the template's generation marks leave the end token out"),
        ("{{ messages | length }}" + CHATML, "a", "the chat template changes what came before an answer"),
        ("{{ raise_exception('no such talk') }}", "a", "the chat template refuses the conversation"),
        ("{{ 1 // (2 - messages | length) }}" + CHATML, "a", "the chat template refuses the conversation"),
    ],
)
def test_what_cannot_be_supervised_exactly_is_rejected(template: str, answer: str, reason: str) -> None:
    record = Record(Origin("f", 7), (Message("user", "q"), Message("assistant", answer, train=True)))
    (reject,) = Renderer(with_template(byte_level(), template), max_length=100).render([record])
    assert isinstance(reject, Reject)
    assert reject.reason == reason
    assert str(reject).startswith("f:7: ")


def test_a_batch_keeps_its_order_and_long_rows_are_named_not_cut() -> None:
    renderer = Renderer(with_template(byte_level(), CHATML), max_length=60)
    rows = [
        TextRecord(Origin("f", 1), "the text"),
        Record(Origin("f", 2), (Message("user", "q"), Message("assistant", "a" * 80, train=True))),
        Record(Origin("f", 3), (Message("user", "q"), Message("assistant", "yes", train=True))),
    ]
    text, long, short = renderer.render(rows)
    assert isinstance(text, Sample)
    assert text.input_ids[-1] == byte_level().eos_token_id
    assert text.spans == [(1, len(text.input_ids))]
    assert isinstance(long, Reject)
    assert (long.reason, long.counts) == ("longer than max_length", False)
    assert isinstance(short, Sample)
    assert short.id == "f:3"


def test_no_template_and_a_broken_template_are_the_models_fault() -> None:
    record = Record(Origin("f", 1), (Message("user", "q"), Message("assistant", "a", train=True)))
    with pytest.raises(ModelError, match=r"no chat template[\s\S]*template\.path"):
        Renderer(with_template(byte_level(), None), max_length=60).render([record])
    with pytest.raises(ModelError, match="does not compile"):
        Renderer(with_template(byte_level(), "{% for %}"), max_length=60).render([record])


def _dicts(record: Record) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in record.messages]
