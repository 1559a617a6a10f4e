"""Long documents are tokenised in pieces, to the tokens of the whole."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from data_prep import long_texts
from data_prep.encode import Encoder
from data_prep.records import Message, Origin, Record, Reject, TextRecord
from data_prep.render import Renderer, Sample
from tests.unit.prep_kit import CHATML, byte_level, sentencepiece_like, with_template

_WORDS = [
    "the",
    "answer",
    "is\n\n\n",
    "  here",
    "\n",
    "don't",
    "12",
    "3.5",
    "授权。",
    "允许",
    "é",
    "🙂",
    ",",
    "    \n\n",
    "x" * 200,
]


def _framing() -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level().backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, _framing])
def test_a_long_document_has_the_tokens_of_the_whole(make: object, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(7)
    joints = ["", " ", " ", "\n"]
    texts = ["".join(rng.choice(_WORDS) + rng.choice(joints) for _ in range(400)) for _ in range(6)]
    texts += [texts[0] + "</s>" + texts[1], "x" * 2000, "short"]
    encoder = Encoder(make(), Counter(), fast=fast)  # type: ignore[operator]
    whole = encoder.documents(texts)
    monkeypatch.setattr(long_texts, "PIECE", 300)
    longest: list[int] = []
    ids = encoder.ids

    def spy(given: Iterable[str], *, frame: bool = False) -> list[list[int]]:
        given = list(given)
        longest.extend(map(len, given))
        return ids(given, frame=frame)

    monkeypatch.setattr(encoder, "ids", spy)
    assert encoder.documents(texts) == whole
    if make is not sentencepiece_like:  # which puts a space before every piece
        longest.clear()
        encoder.documents(texts[:6])
        assert max(longest) < 1000 < min(map(len, texts[:6]))


def test_what_cannot_be_cut_and_conversations_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE", 300)
    monkeypatch.setattr(long_texts, "MAX_WHOLE", 1000)
    origin = Origin("a", 1)
    records = [
        TextRecord(origin, "x, " * 1000),
        TextRecord(origin, "x" * 3000),
        Record(origin, (Message("user", "x, " * 1000), Message("assistant", "a", True))),
        TextRecord(origin, "short"),
    ]
    for make, kept in ((byte_level, [True, False, False, True]), (sentencepiece_like, [False, False, False, True])):
        results = Renderer(with_template(make(), CHATML), max_length=9999).render(records)
        assert [isinstance(result, Sample) for (result,) in results] == kept
        assert {each.reason for (each,) in results if isinstance(each, Reject)} == {"row too long"}
