"""Records in, token ids and the spans to learn out. Pure but for the tokenizer.

The text of a conversation (`chat.py`) is cut where answers begin and end, and the pieces are tokenised each by itself.
The prompt's tokens are then those of inference, even where prompt and answer tokenised at once would merge characters
across the border. Tokenizers that put something before every text they are given (SentencePiece's space) cannot be fed
pieces: there the text is tokenised at once, and a row whose prompt tokens differ from inference's, or that has a token
across a border, is rejected.

Then the supervised tokens are decoded and compared with the answer and its end token; what differs is rejected. Nothing
is ever decided by a token's id, so pad == eos costs nothing. It does not render tools, reasoning or images, and it does
not truncate.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.chat import ChatTemplate, ChatText, Span
from data_prep.records import AnyRecord, Record, Reject, RowFault, TextRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Tokens = tuple[list[int], list[Span]]
"""Token ids and the token spans of the answers."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A record as the model will see it."""

    id: str
    input_ids: list[int]
    spans: list[Span]
    """Token indices learned as targets: half-open, sorted, disjoint; never index 0, which nothing predicts."""

    @property
    def supervised(self) -> int:
        """Number of tokens learned."""
        return sum(end - start for start, end in self.spans)


class Renderer:
    """Renders and tokenises batches of records.

    Args:
        tokenizer: with the chat template to use.
        max_length: tokens; longer samples are rejected.
        model_name: how messages name the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, model_name: str = "the model") -> None:
        self.max_length = max_length
        self._tokenizer: Any = tokenizer
        self._model_name = model_name
        self._chat: ChatTemplate | None = None
        self._pieces = pieces_add_up(tokenizer)

    def render(self, records: Sequence[AnyRecord]) -> list[Sample | Reject]:
        """One result per record, in order.

        Raises:
            ModelError: there are conversations, and the model has no chat template or one that does not compile.
        """
        results: dict[int, Sample | Reject] = {}
        chats: list[tuple[int, Record, ChatText]] = []
        texts: list[tuple[int, TextRecord]] = []
        for i, record in enumerate(records):
            if isinstance(record, TextRecord):
                texts.append((i, record))
                continue
            try:
                chats.append((i, record, self._template().render(record)))
            except RowFault as fault:
                results[i] = _reject(record, fault)
        for (i, chat, text), tokens in zip(chats, self._tokenize([t for _, _, t in chats]), strict=True):
            results[i] = self._checked(chat, text, tokens)
        for (i, plain), ids in zip(texts, self._ids([r.text for _, r in texts], specials=True), strict=True):
            results[i] = self._plain(plain, ids)
        return [results[i] for i in range(len(records))]

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def _template(self) -> ChatTemplate:
        """Made when the first conversation comes: plain text needs none."""
        if self._chat is None:
            self._chat = ChatTemplate(self._tokenizer, self._model_name)
        return self._chat

    def _ids(self, texts: list[str], *, specials: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=specials, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _tokenize(self, chats: list[ChatText]) -> list[_Tokens | RowFault]:
        return self._in_pieces(chats) if self._pieces else [self._at_once(chat) for chat in chats]

    def _in_pieces(self, chats: list[ChatText]) -> list[_Tokens | RowFault]:
        texts: list[str] = []
        for chat in chats:
            cuts = [0, *(cut for span in chat.spans for cut in span), len(chat.text)]
            texts += [chat.text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        ids = iter(self._ids(texts))
        results: list[_Tokens | RowFault] = []
        for chat in chats:
            tokens, spans = list(next(ids)), []
            for _ in chat.spans:
                begin = len(tokens)
                tokens += next(ids)
                spans.append((begin, len(tokens)))
                tokens += next(ids)
            results.append((tokens, spans))
        return results

    def _at_once(self, chat: ChatText) -> _Tokens | RowFault:
        encoded = self._tokenizer(
            chat.text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        tokens, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        spans = []
        for start, end in chat.spans:
            inside = [k for k, (a, b) in enumerate(offsets) if a < end and b > start]
            if not inside or offsets[inside[0]][0] < start or offsets[inside[-1]][1] > end:
                return RowFault("a token crosses the border of an answer")
            if tokens[: inside[0]] != self._ids([chat.text[:start]])[0]:
                return RowFault("the prompt alone has other tokens than before its answer")
            spans.append((inside[0], inside[-1] + 1))
        return tokens, spans

    def _checked(self, record: Record, chat: ChatText, tokens: _Tokens | RowFault) -> Sample | Reject:
        if isinstance(tokens, RowFault):
            return _reject(record, tokens)
        ids, spans = tokens
        if len(ids) > self.max_length:
            return self._too_long(record, len(ids))
        if spans[0][0] == 0:
            return _reject(record, RowFault("the answer has no token before it"))
        for (start, end), (a, b) in zip(spans, chat.spans, strict=True):
            decoded = self.decode(ids[start:end])
            if not _same_text(decoded, chat.text[a:b], exact=self._pieces):
                return _reject(record, RowFault("the tokens of the answer decode to another text", repr(decoded[:40])))
        return Sample(record.id, ids, spans)

    def _plain(self, record: TextRecord, ids: list[int]) -> Sample | Reject:
        end = self._tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        if len(ids) > self.max_length:
            return self._too_long(record, len(ids))
        if len(ids) < 2:
            return _reject(record, RowFault("too short to learn from", f"{len(ids)} token"))
        return Sample(record.id, ids, [(1, len(ids))])

    def _too_long(self, record: AnyRecord, tokens: int) -> Reject:
        return Reject(record.origin, "longer than max_length", f"{tokens} tokens", counts=False)


def pieces_add_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's pieces tokenise to the text's tokens, at borders that nothing merges across.

    It fails for tokenizers that put a space before every text they are given.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    probes = [("\n", "a"), (".", "\n"), ("a", "\n")]
    if tokenizer.eos_token:
        probes += [(tokenizer.eos_token, "a"), (tokenizer.eos_token, "\n")]
    return all(ids(left + right) == ids(left) + ids(right) for left, right in probes)


def _same_text(decoded: str, expected: str, *, exact: bool) -> bool:
    """Equal but for Unicode composition, which some tokenizers normalise; SentencePiece drops a first space."""
    if decoded == expected:
        return True
    if not exact:
        decoded, expected = decoded.strip(), expected.strip()
    return unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", expected)


def _reject(record: AnyRecord, fault: RowFault) -> Reject:
    return Reject(record.origin, fault.reason, fault.detail)
