"""Records in, token ids and the spans to learn out. Pure but for the tokenizer.

The chat template makes a text of a conversation and shows where its answers are (`chat.py`), the text is tokenised
(`encode.py`), the tokens of each answer are decoded and compared with it (`verify.py`), and what is too long is treated
as configured (`length.py`). What differs is rejected. Nothing is ever decided by a token's id, so pad == eos costs
nothing. Images are not rendered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from configs.schema.roots import TooLong
from data_prep.chat import ChatTemplate, ChatText
from data_prep.encode import Encoder, Tokens
from data_prep.length import LengthFault, fitted
from data_prep.records import AnyRecord, Pair, Record, Reject, RowFault, TextRecord, Vote
from data_prep.rendered import AnySample, PairSample, Sample, Span, VoteSample
from data_prep.verify import Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AnySample", "PairSample", "Renderer", "Sample", "Span", "VoteSample"]

_FURTHER = "further samples of conversations: turns that the chat template or the tokenizer changes in the whole"

Result = AnySample | Reject
_Part = tuple[ChatText, Tokens | RowFault]
_Draft = RowFault | list[list[ChatText]]
"""A record's conversations, of a pair two, each with those of its answers that need one of their own."""


class Renderer:
    """Renders and tokenises batches of records.

    Args:
        tokenizer: with the chat template to use.
        max_length: tokens of the longest sample.
        model_name: how messages name the model.
        too_long: what becomes of longer samples.
        template_kwargs: what the chat template is given besides the conversation.
        fast: use the shortcuts that the tokenizer's kind allows; the results are the same.

    Attributes:
        notes: counts what a reader of the manifest should know.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        model_name: str = "the model",
        too_long: TooLong = TooLong.reject,
        template_kwargs: Mapping[str, Any] | None = None,
        fast: bool = True,
    ) -> None:
        self.max_length = max_length
        self.notes: Counter[str] = Counter()
        self._too_long = too_long
        self._tokenizer, self._model_name, self._variables = tokenizer, model_name, template_kwargs or {}
        self._chat: ChatTemplate | None = None
        self._encoder = Encoder(tokenizer, self.notes, fast=fast)
        self._verifier = Verifier(tokenizer, exact=self._encoder.pieces_add_up, fast=fast)

    def render(self, records: Sequence[AnyRecord]) -> list[list[Result]]:
        """The samples of each record, in order: one, but for answers that need a conversation of their own and chunks.

        Raises:
            ModelError: there are conversations, and the model has no chat template or one that does not compile.
        """
        drafts = [[] if isinstance(record, TextRecord) else self._draft(record) for record in records]
        chats = [chat for draft in drafts if isinstance(draft, list) for side in draft for chat in side]
        tokens = iter(self._encoder.conversations(chats))
        documents = iter(self._encoder.documents([r.text for r in records if isinstance(r, TextRecord)]))
        results: list[list[Result]] = []
        for record, draft in zip(records, drafts, strict=True):
            if isinstance(draft, RowFault):
                results.append([_reject(record, draft)])
            elif isinstance(record, TextRecord):
                results.append(self._document(record, next(documents)))
            else:
                sides = [[(chat, part) for chat in side for part in next(tokens)] for side in draft]
                results.append(self._conversation(record, sides))
        return results

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._verifier.decode(ids)

    def _template(self) -> ChatTemplate:
        """Made when the first conversation comes: plain text needs none."""
        if self._chat is None:
            self._chat = ChatTemplate(self._tokenizer, self._model_name, self._variables, self.notes)
        return self._chat

    def _draft(self, record: Record | Pair | Vote) -> _Draft:
        template = self._template()
        draft = []
        for what, side in _sides(record):
            try:
                draft.append(template.render(side))
            except RowFault as fault:
                return RowFault(fault.reason, what + fault.detail)
        return draft

    def _conversation(self, record: Record | Pair | Vote, sides: list[list[_Part]]) -> list[Result]:
        if isinstance(record, Record):
            if len(sides[0]) > 1:
                self.notes[_FURTHER] += len(sides[0]) - 1
            return [self._sample(record, _numbered(record, n), *part) for n, part in enumerate(sides[0], start=1)]
        samples: list[Sample] = []
        for (what, _), side in zip(_sides(record), sides, strict=True):
            if len(side) > 1:
                return [_reject(record, RowFault("a preference's answers do not stay in one conversation"))]
            sample = self._sample(record, record.id, *side[0])
            if isinstance(sample, Reject):
                return [replace(sample, detail=what + sample.detail)]
            samples.append(sample)
        if isinstance(record, Vote):
            return [VoteSample(record.id, samples[0], record.liked)]
        if not _same_prompt(*(side[0][0] for side in sides)):
            return [_reject(record, RowFault("chosen and rejected have different prompts in the chat template"))]
        return [PairSample(record.id, *samples)]

    def _sample(self, record: AnyRecord, sample_id: str, chat: ChatText, tokens: Tokens | RowFault) -> Sample | Reject:
        """The sample, checked and short enough."""
        if isinstance(tokens, RowFault):
            return _reject(record, tokens)
        if tokens.spans[0][0] == 0:
            return _reject(record, RowFault("the answer has no token before it"))
        for (start, end), text in zip(tokens.spans, tokens.texts, strict=True):
            decoded = self._verifier.difference(tokens.ids[start:end], text)
            if decoded is not None:
                return _reject(record, RowFault("the tokens of the answer decode to another text", repr(decoded[:40])))
        sample = Sample(sample_id, tokens.ids, tokens.spans)
        (fit,) = self._fitted(record, sample, lead=self._template().lead(chat.text))
        return fit

    def _document(self, record: TextRecord, ids: list[int] | RowFault) -> list[Result]:
        if isinstance(ids, RowFault):
            return [_reject(record, ids)]
        if len(ids) < 2:
            return [_reject(record, RowFault("too short to learn from", f"{len(ids)} token"))]
        sample = Sample(record.id, ids, [(1, len(ids))])
        return [*self._fitted(record, sample, lead=self._encoder.lead, document=True)]

    def _fitted(self, record: AnyRecord, sample: Sample, *, lead: int, document: bool = False) -> list[Sample | Reject]:
        try:
            pieces = fitted(sample, self.max_length, self._too_long, lead=lead, document=document)
        except LengthFault as fault:
            return [Reject(record.origin, fault.reason, fault.detail, counts=False)]
        if len(pieces) == 1:
            return [*pieces]
        return [Sample(_numbered(record, n), piece.input_ids, piece.spans) for n, piece in enumerate(pieces, start=1)]


def _sides(record: Record | Pair | Vote) -> tuple[tuple[str, Record], ...]:
    """The conversations of a record, each with what a fault's detail begins with."""
    if isinstance(record, Pair):
        return ("chosen: ", record.chosen), ("rejected: ", record.rejected)
    return (("", record if isinstance(record, Record) else record.record),)


def _same_prompt(chosen: ChatText, rejected: ChatText) -> bool:
    starts = [chat.answers[0].start for chat in (chosen, rejected)]
    return chosen.text[: starts[0]] == rejected.text[: starts[1]]


def _numbered(record: AnyRecord, n: int) -> str:
    return record.id if n == 1 else f"{record.id}/{n}"


def _reject(record: AnyRecord, fault: RowFault) -> Reject:
    return Reject(record.origin, fault.reason, fault.detail)
