"""Records in, token ids and the spans to learn out. Pure but for the tokenizer.

The chat template makes a text of a conversation and shows where its answers are (`chat.py`), the text is tokenised
(`encode.py`), the tokens of each answer are decoded and compared with it (`verify.py`), and what is too long is treated
as configured (`length.py`). What differs is rejected. Nothing is ever decided by a token's id, so pad == eos costs
nothing. An image is one token of the template's text, which becomes as many as the model's processor makes of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from configs.schema.roots import TooLong
from data_prep.chat import ChatTemplate, ChatText
from data_prep.encode import Encoder, Tokens
from data_prep.images import Images, Looked
from data_prep.length import TOO_LONG, LengthFault, fitted
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
        images: looks at images and keeps them; None: the model does not see.
        blind: why it does not.
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
        images: Images | None = None,
        blind: str = "",
        fast: bool = True,
    ) -> None:
        self.max_length = max_length
        self.notes: Counter[str] = Counter()
        self._too_long = too_long
        self._tokenizer, self._model_name, self._variables = tokenizer, model_name, template_kwargs or {}
        self._images, self._blind = images, blind
        self._chat: ChatTemplate | None = None
        self._encoder = Encoder(tokenizer, self.notes, fast=fast)
        self._verifier = Verifier(tokenizer, exact=self._encoder.pieces_add_up, fast=fast)

    def render(self, records: Sequence[AnyRecord]) -> list[list[Result]]:
        """The samples of each record, in order: one, but for answers that need a conversation of their own and chunks.

        Raises:
            ModelError: there are conversations, and the model has no chat template or one that does not compile.
        """
        drafts = [[] if isinstance(record, TextRecord) else self._draft(record) for record in records]
        seen: dict[int, tuple[Looked, ...]] = {}
        for n, (record, draft) in enumerate(zip(records, drafts, strict=True)):
            if not isinstance(record, TextRecord) and not isinstance(draft, RowFault):
                try:
                    seen[n] = self._look(record)
                except RowFault as fault:
                    drafts[n] = fault
        chats = [chat for draft in drafts if isinstance(draft, list) for side in draft for chat in side]
        tokens = iter(self._encoder.conversations(chats))
        documents = iter(self._encoder.documents([r.text for r in records if isinstance(r, TextRecord)]))
        results: list[list[Result]] = []
        for n, (record, draft) in enumerate(zip(records, drafts, strict=True)):
            if isinstance(draft, RowFault):
                results.append([_reject(record, draft)])
            elif isinstance(record, TextRecord):
                results.append(self._document(record, next(documents)))
            else:
                sides = [[(chat, part) for chat in side for part in next(tokens)] for side in draft]
                results.append(self._conversation(record, sides, seen[n]))
        return results

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._verifier.decode(ids)

    def _template(self) -> ChatTemplate:
        """Made when the first conversation comes: plain text needs none."""
        if self._chat is None:
            image, blind = None, self._blind
            if self._images is not None:
                image = image_text(self._tokenizer, self._images.vision.image_token)
                blind = "" if image else "the image_token_id of config.json is no token of its own in the tokenizer"
            self._chat = ChatTemplate(
                self._tokenizer, self._model_name, self._variables, self.notes, image=image, blind=blind
            )
        return self._chat

    def _look(self, record: Record | Pair | Vote) -> tuple[Looked, ...]:
        """The images of a conversation, in order.

        Raises:
            RowFault: one cannot be used.
        """
        references = [image for _, side in _sides(record) for message in side.messages for image in message.images]
        if not references:
            return ()
        if not isinstance(record, Record):
            raise RowFault("images in preferences are not prepared", f"{len(references)} of them")
        assert self._images is not None  # `_draft` refuses them otherwise
        return tuple([self._images.look(reference, record.origin) for reference in references])

    def _draft(self, record: Record | Pair | Vote) -> _Draft:
        template = self._template()
        draft = []
        for what, side in _sides(record):
            try:
                draft.append(template.render(side))
            except RowFault as fault:
                return RowFault(fault.reason, what + fault.detail)
        return draft

    def _conversation(
        self, record: Record | Pair | Vote, sides: list[list[_Part]], images: tuple[Looked, ...]
    ) -> list[Result]:
        if isinstance(record, Record):
            if len(sides[0]) > 1:
                self.notes[_FURTHER] += len(sides[0]) - 1
            return [
                self._sample(record, _numbered(record, n), *part, images) for n, part in enumerate(sides[0], start=1)
            ]
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

    def _sample(
        self,
        record: AnyRecord,
        sample_id: str,
        chat: ChatText,
        tokens: Tokens | RowFault,
        images: tuple[Looked, ...] = (),
    ) -> Sample | Reject:
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
        if images:
            return self._with_images(record, sample, images)
        (fit,) = self._fitted(record, sample, lead=self._template().lead(chat.text))
        return fit

    def _with_images(self, record: AnyRecord, sample: Sample, images: tuple[Looked, ...]) -> Sample | Reject:
        """The sample with all tokens of the images that its conversation, which may be cut after a turn, shows.

        It is not truncated: what is left of an image is none.
        """
        assert self._images is not None
        vision = self._images.vision
        images = images[: sample.input_ids.count(vision.image_token)]
        sample = with_image_tokens(sample, vision.image_token, [vision.tokens(image.use.grid) for image in images])
        sample = replace(sample, images=tuple(image.use for image in images))
        length = len(sample.input_ids)
        if length > self.max_length:
            pieces = sum(vision.tokens(image.use.grid) for image in images)
            return Reject(record.origin, TOO_LONG, f"{length} tokens, {pieces} of them of images", counts=False)
        try:
            self._images.keep(images, record.origin)
        except RowFault as fault:
            return _reject(record, fault)
        return sample

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


def with_image_tokens(sample: Sample, image_token: int, tokens: Sequence[int]) -> Sample:
    """A sample in which the token of each image stands as often as the image needs.

    Args:
        sample: whose images are one token each; none of them is learned.
        image_token: its id.
        tokens: how often, for each image.
    """
    ids: list[int] = []
    places = [0]
    """Where each token of the sample has gone, and its end."""
    waiting = iter(tokens)
    for token in sample.input_ids:
        ids += [token] * next(waiting) if token == image_token else [token]
        places.append(len(ids))
    return replace(sample, input_ids=ids, spans=[(places[start], places[end]) for start, end in sample.spans])


def image_text(tokenizer: PreTrainedTokenizerBase, image_token: int) -> str | None:
    """The text that becomes the image token; None: the tokenizer has no such token."""
    text = tokenizer.convert_ids_to_tokens(image_token) if image_token < len(tokenizer) else None
    known = isinstance(text, str) and tokenizer(text, add_special_tokens=False)["input_ids"] == [image_token]
    return text if known else None


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
