"""Texts as token ids, with the tokens of the answers in them.

A conversation's text is cut where answers begin and end. Its beginning, up to the first answer, is tokenised as it is,
so its tokens are those of inference, even where prompt and answer tokenised at once would merge characters across the
border. What follows an answer is tokenised behind the answer's end token, since some tokenizers treat white space after
a special token in a way of their own. An answer is tokenised by itself; by tokenizers that put something before every
text they are given (SentencePiece's space) behind the end of its prompt, and one that merges with that is rejected.

At inference the prompt of a later turn is one text, earlier answers included. If one of those would merge with its own
prompt there, it becomes a sample of its own, so that the later one is learned from the tokens that inference has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from data_prep.answers import Answer
from data_prep.chat import ChatText
from data_prep.long_texts import is_long, pieces_of, refuse_longer
from data_prep.records import RowFault
from data_prep.rendered import Span
from data_prep.template import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = 64
"""Characters of an answer that are looked at for whether it merges with what stands before it."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A text's token ids, the token spans of its answers, and what these must decode to."""

    ids: list[int]
    spans: list[Span]
    texts: list[str]


class Encoder:
    """Tokenises in batches.

    Args:
        tokenizer: the model's.
        notes: counts what a reader of the manifest should know.
        fast: go to the Rust tokenizer directly where there is one; the tokens are the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, notes: Counter[str], *, fast: bool = True) -> None:
        self._tokenizer: Any = tokenizer
        self._notes = notes
        specials = special_tokens(tokenizer)
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._backend = _backend(tokenizer) if fast else None
        self.pieces_add_up = pieces_add_up(tokenizer)
        self._frame = self._around()
        """Tokens that the tokenizer puts before and behind every document; None: that cannot be told."""
        self.lead = len(self._frame[0]) if self._frame else 0
        """Tokens that it puts before them."""

    def conversations(self, chats: Sequence[ChatText]) -> list[list[Tokens | RowFault]]:
        """Of each conversation its tokens, then those of answers that became samples of their own."""
        divided = self._divided(chats) if self.pieces_add_up else [[chat] for chat in chats]
        flat = [chat for parts in divided for chat in parts]
        pieces = [self._pieces(chat) for chat in flat]
        queries = [text for row in pieces for context, piece in row for text in ((context + piece), context)]
        ids = iter(self.ids(queries))
        tokens = iter(
            [_joined(chat, [(next(ids), next(ids)) for _ in row]) for chat, row in zip(flat, pieces, strict=True)]
        )
        return [[next(tokens) for _ in parts] for parts in divided]

    def documents(self, texts: Sequence[str]) -> list[list[int] | RowFault]:
        """Token ids of plain texts, with the special tokens that the tokenizer frames a text with, and an end token.

        What spells a special token in a text is ordinary text: a document cannot end itself.
        """
        spelled = {i for i, text in enumerate(texts) if self._special.search(text)}
        short = [text for i, text in enumerate(texts) if i not in spelled and not is_long(text)]
        plain = iter(self.ids(short, frame=True))
        rows = [
            next(plain) if i not in spelled and not is_long(text) else self._alone(text, ordinary=i in spelled)
            for i, text in enumerate(texts)
        ]
        end = self._tokenizer.eos_token_id
        return [[*row, end] if isinstance(row, list) and end is not None and row[-1:] != [end] else row for row in rows]

    def ids(self, texts: Iterable[str], *, frame: bool = False) -> list[list[int]]:
        """Token ids of texts, each distinct text tokenised once: equal texts share a list, which is not to be changed.

        Args:
            texts: texts, in which special tokens may be spelled.
            frame: whether the tokenizer puts its special tokens around each.
        """
        texts = list(texts)
        distinct = list(dict.fromkeys(text for text in texts if text or frame))
        rows: Iterable[list[int]] = ()
        if self._backend is not None:
            rows = (e.ids for e in self._backend.encode_batch_fast(distinct, add_special_tokens=frame))
        elif distinct:
            rows = self._tokenizer(distinct, add_special_tokens=frame, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        found = dict(zip(distinct, rows, strict=True))
        return [found[text] if text in found else [] for text in texts]

    def _alone(self, text: str, *, ordinary: bool) -> list[int] | RowFault:
        """A document's tokens; `ordinary`: it spells special tokens, which are ordinary text."""
        try:
            if ordinary:
                return self._as_ordinary_text(text)
            return self._in_pieces(text, lambda piece, frame: self.ids([piece], frame=frame)[0])
        except RowFault as fault:
            return fault

    def _in_pieces(self, text: str, encode: Callable[[str, bool], list[int]]) -> list[int]:
        """A document's tokens, by a function of a text and whether it is framed: in pieces if these add up.

        Raises:
            RowFault: it is too long to be tokenised whole, and cannot be cut.
        """
        pieces = pieces_of(text, self.ids) if self.pieces_add_up else [text]
        refuse_longer(max(map(len, pieces)), "a stretch without a place to cut")
        if len(pieces) == 1 or self._frame is None:
            return encode(text, True)
        before, behind = self._frame
        return [*before, *chain.from_iterable(encode(piece, False) for piece in pieces), *behind]

    def _as_ordinary_text(self, text: str) -> list[int]:
        def encode(piece: str, frame: bool) -> list[int]:
            found: list[int] = self._tokenizer(
                piece, split_special_tokens=True, add_special_tokens=frame, return_attention_mask=False, verbose=False
            )["input_ids"]
            return found

        ids = self._in_pieces(text, encode)
        if self._backend is not None:
            self._backend.encode_special_tokens = False  # the call above sets it, and it stays
        spelled = sorted({match[0] for match in self._special.finditer(text)})
        framed = self.ids([""], frame=True)[0]
        for token in spelled:
            number = self._tokenizer.convert_tokens_to_ids(token)
            if ids.count(number) > framed.count(number):
                raise RowFault("the text holds a control token", token)
        self._notes["documents that spell a special token: it is ordinary text"] += 1
        return ids

    def _around(self) -> tuple[list[int], list[int]] | None:
        framed, bare = self.ids(["a"], frame=True)[0], self.ids(["a"])[0]
        begins = (k for k in range(len(framed)) if framed[k : k + len(bare)] == bare)
        return next(((framed[:k], framed[k + len(bare) :]) for k in begins), None)

    def _divided(self, chats: Sequence[ChatText]) -> list[list[ChatText]]:
        """Each conversation without the answers that would merge with their prompts, and those on their own.

        The last answer of a conversation is in no other's prompt, so it stays.
        """
        borders = [
            (n, answer, self._left(chat.text, lower, answer.start), chat.text[answer.start : answer.start + _HEAD])
            for n, chat in enumerate(chats)
            for lower, answer in _with_lower(chat.answers[:-1])
        ]
        ids = iter(self.ids([text for _, _, left, head in borders for text in (left + head, left)]))
        odd: dict[int, list[Answer]] = {}
        for n, answer, _, _ in borders:
            both, left_ids = next(ids), next(ids)
            if both[: len(left_ids)] != left_ids:
                odd.setdefault(n, []).append(answer)
        return [_without(chat, odd[n]) if n in odd else [chat] for n, chat in enumerate(chats)]

    def _pieces(self, chat: ChatText) -> list[tuple[str, str]]:
        """(what stands before it, piece) of the pieces of a text: context and answer in turn, a context last."""
        pieces, at, context = [], 0, ""
        for answer in chat.answers:
            left = "" if self.pieces_add_up else self._left(chat.text, at - len(context), answer.start)
            pieces += [(context, chat.text[at : answer.start]), (left, chat.text[answer.start : answer.end])]
            at, context = answer.end, chat.text[answer.token : answer.end]
        return [*pieces, (context, chat.text[at:])]

    def _left(self, text: str, lower: int, end: int) -> str:
        """What stands before `end` that can change how the text behind it is tokenised: from a special token on."""
        for match in self._special.finditer(text, lower, end):
            lower = match.start()
        return text[lower:end]


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


def _backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, set as transformers sets it; None where there is none or the wrapper does more than call it.

    It is asked directly because the wrapper copies every encoding into dicts of lists, and computes offsets that
    nobody reads: together as long as tokenizing takes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not tokenizer.is_fast or not hasattr(backend, "encode_batch_fast"):
        return None
    probes = ["a b", "\n a", "é授权🙂", f"{tokenizer.eos_token or ''}a\n\n", "</s> <think>\n"]
    for frame in (False, True):
        expected = tokenizer(probes, add_special_tokens=frame, verbose=False)["input_ids"]  # sets the backend, too
        if [e.ids for e in backend.encode_batch_fast(probes, add_special_tokens=frame)] != expected:
            return None
    return backend


def _joined(chat: ChatText, encoded: list[tuple[list[int], list[int]]]) -> Tokens | RowFault:
    """The pieces' tokens in a row; of each piece its ids behind its context, and the context's."""
    ids: list[int] = []
    spans: list[Span] = []
    for n, (both, context) in enumerate(encoded):
        if context and both[: len(context)] != context:
            return RowFault("a token crosses the border of an answer")
        begin = len(ids)
        ids += both[len(context) :] if context else both
        if n % 2:
            spans.append((begin, len(ids)))
    return Tokens(ids, spans, [chat.text[a.start : a.end] for a in chat.answers])


def _with_lower(answers: Sequence[Answer]) -> Iterable[tuple[int, Answer]]:
    """Each answer, with where the end token of the answer before it begins."""
    lower = 0
    for answer in answers:
        yield lower, answer
        lower = answer.token


def _without(chat: ChatText, odd: list[Answer]) -> list[ChatText]:
    rest = ChatText(chat.text, [answer for answer in chat.answers if answer not in odd])
    return [rest, *(ChatText(chat.text[: answer.end], [answer]) for answer in odd)]
