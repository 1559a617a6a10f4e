r"""Chat template and loss spans: records in, token ids and the spans to learn out. Pure but for the tokenizer.

How a conversation becomes tokens:

1. The template renders it whole, and once more for each turn to learn: the turns before it plus the generation prompt. That
   text, which is what inference starts from, must be a prefix of the whole; what follows it is the answer. A template with
   ``{% generation %}`` marks says itself where answers are.
2. The answer ends with the first special token after the assistant's text: the end token, which is learned too. What
   comes after it, such as a line break, is not. Nothing is ever decided by a token's id, so pad == eos costs nothing.
3. The text is cut where answers begin and end, and the pieces are tokenised each by itself. The prompt's tokens are then
   those of inference, even where ``prompt + answer`` tokenised at once would merge characters across the border.
   Tokenizers that add something at the start of every text (a SentencePiece space) cannot be fed pieces: there the text
   is tokenised at once, and a row whose prompt tokens differ from inference's, or with a token across a border, is rejected.
4. The supervised tokens are decoded and compared with the assistant's text and end token. What differs is rejected.

It does not render tools, reasoning or images; it does not truncate.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import ModelError
from data_prep.records import AnyRecord, Record, Reject, RowFault, TextRecord, answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Half-open; of characters or of token indices."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A conversation's text and, per answer, its characters, end token included, and what they must say."""

    text: str
    spans: list[Span]
    says: list[str]


class Renderer:
    """Renders and tokenises batches of records.

    Args:
        tokenizer: with the chat template to use.
        max_length: tokens; longer samples are rejected.
        model_name: how messages name the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, model_name: str = "the model") -> None:
        self._tokenizer: Any = tokenizer
        self.max_length, self._model_name = max_length, model_name
        template = tokenizer.chat_template
        self._template: str | None = template if isinstance(template, str) else None
        specials = sorted({*tokenizer.all_special_tokens, *_added_specials(tokenizer)}, key=lambda t: (-len(t), t))
        self._end = re.compile(r"\s*(" + "|".join(map(re.escape, specials)) + ")") if specials else None
        ends = {t for t in (tokenizer.bos_token, tokenizer.eos_token) if t}
        control = [t for t in specials if t in ends or t in (self._template or "")]
        self._control = re.compile("|".join(map(re.escape, control))) if control else None
        self._pieces = pieces_add_up(tokenizer)

    def render(self, records: Sequence[AnyRecord]) -> list[Sample | Reject]:
        """One result per record, in order. Reasons are counted by kind, so they carry no figures; details do.

        Raises:
            ModelError: there are conversations, and the model has no chat template or one that does not compile.
        """
        results: list[Sample | Reject | None] = [None] * len(records)
        chats = [(i, r) for i, r in enumerate(records) if isinstance(r, Record)]
        rendered = self._texts([r for _, r in chats])
        good = [(i, r, t) for (i, r), t in zip(chats, rendered, strict=True) if isinstance(t, _Rendered)]
        for (i, _), fault in zip(chats, rendered, strict=True):
            if isinstance(fault, RowFault):
                results[i] = _reject(records[i], fault)
        tokenized = self._tokenize([t for _, _, t in good])
        for (i, record, text), tokens in zip(good, tokenized, strict=True):
            results[i] = self._checked(record, text, tokens)
        texts = [(i, r) for i, r in enumerate(records) if isinstance(r, TextRecord)]
        for (i, record), ids in zip(texts, self._ids([r.text for _, r in texts], specials=True), strict=True):
            results[i] = self._plain(record, ids)
        assert all(r is not None for r in results)
        return results  # type: ignore[return-value]

    # -- text ------------------------------------------------------------------------------------------------------

    def _texts(self, records: list[Record]) -> list[_Rendered | RowFault]:
        if not records:
            return []
        if self._template is None:
            raise ModelError(
                self._model_name,
                "its tokenizer has no chat template, and the records are conversations",
                remedy="template.path=<Jinja file>; or dataset.format=text for plain text",
            )
        return [self._guarded(record) for record in records]

    def _guarded(self, record: Record) -> _Rendered | RowFault:
        from jinja2.exceptions import TemplateError, TemplateSyntaxError

        try:
            self._refuse_control_tokens(record)
            return self._rendered(record)
        except RowFault as fault:
            return fault
        except TemplateSyntaxError as error:
            raise ModelError(self._model_name, f"its chat template does not compile: {error}") from error
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            return RowFault("the chat template refuses the conversation", str(error))

    def _refuse_control_tokens(self, record: Record) -> None:
        """Text that spells a turn's end would end the turn: at best noise, at worst an injected one."""
        if self._control is None:
            return
        for number, message in enumerate(record.messages, start=1):
            if match := self._control.search(message.content):
                raise RowFault("the text holds a control token of the template", f"turn {number}: {match[0]}")

    def _rendered(self, record: Record) -> _Rendered:
        messages = [{"role": m.role, "content": m.content} for m in record.messages]
        assert self._template is not None
        marked: list[Span] | None = None
        if _GENERATION_MARK.search(self._template):
            whole, marked = self._with_marks(messages)
        else:
            whole = self._template_text(messages, prompt=False)
        spans, says = [], []
        for i, content in answers(record):
            start = self._start(messages, i, whole) if marked is None else _marked_start(messages, i, marked)
            end = self._answer_end(whole, start, content)
            if marked is not None and end > _marked_end(messages, i, marked):
                raise RowFault("the template's generation marks leave the end token out", f"turn {i + 1}")
            spans.append((start, end))
            says.append(content)
        return _Rendered(whole, spans, says)

    def _template_text(self, messages: list[dict[str, str]], *, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def _with_marks(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The text and the marked character spans: what ``return_assistant_tokens_mask`` makes its mask of."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[messages],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], [tuple(m) for m in marks[0]]

    def _start(self, messages: list[dict[str, str]], i: int, whole: str) -> int:
        prompt = self._template_text(messages[:i], prompt=True)
        if not whole.startswith(prompt):
            raise RowFault(
                "the chat template changes what came before an answer",
                f"the prompt of turn {i + 1} is no prefix of the whole conversation",
            )
        return len(prompt)

    def _answer_end(self, whole: str, start: int, content: str) -> int:
        """End of the answer in the whole text: after the end token that follows the assistant's text."""
        body = content.strip()
        begin = len(whole) - len(whole[start:].lstrip())
        if not whole.startswith(body, begin):
            raise RowFault("the chat template changes the assistant's text", f"after '{whole[max(0, start - 20) : start]}'")
        match = self._end.match(whole, begin + len(body)) if self._end else None
        if match is None:
            raise RowFault("no end token after the answer", f"followed by {whole[begin + len(body) :][:20]!r}")
        return match.end()

    # -- tokens ----------------------------------------------------------------------------------------------------

    def _ids(self, texts: list[str], *, specials: bool = False) -> list[list[int]]:
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=specials, return_attention_mask=False, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _tokenize(self, rendered: list[_Rendered]) -> list[tuple[list[int], list[Span]] | RowFault]:
        """Token ids and token spans of each text."""
        return self._in_pieces(rendered) if self._pieces else [self._at_once(r) for r in rendered]

    def _in_pieces(self, rendered: list[_Rendered]) -> list[tuple[list[int], list[Span]] | RowFault]:
        cuts = [[0, *(c for span in r.spans for c in span), len(r.text)] for r in rendered]
        ids = iter(
            self._ids([r.text[a:b] for r, c in zip(rendered, cuts, strict=True) for a, b in zip(c, c[1:], strict=False)])
        )
        results: list[tuple[list[int], list[Span]] | RowFault] = []
        for r in rendered:
            tokens, spans = list(next(ids)), []
            for _ in r.spans:
                begin = len(tokens)
                tokens += next(ids)
                spans.append((begin, len(tokens)))
                tokens += next(ids)
            results.append((tokens, spans))
        return results

    def _at_once(self, rendered: _Rendered) -> tuple[list[int], list[Span]] | RowFault:
        encoded = self._tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        tokens, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        spans = []
        for start, end in rendered.spans:
            inside = [k for k, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            if not inside or offsets[inside[0]][0] < start or offsets[inside[-1]][1] > end:
                return RowFault("a token crosses the border of an answer")
            prompt = self._ids([rendered.text[:start]])[0]
            if tokens[: inside[0]] != prompt:
                return RowFault("the prompt alone has other tokens than before its answer")
            spans.append((inside[0], inside[-1] + 1))
        return tokens, spans

    # -- checks ----------------------------------------------------------------------------------------------------

    def _checked(
        self, record: Record, text: _Rendered, tokens: tuple[list[int], list[Span]] | RowFault
    ) -> Sample | Reject:
        if isinstance(tokens, RowFault):
            return _reject(record, tokens)
        ids, spans = tokens
        if len(ids) > self.max_length:
            return self._too_long(record, len(ids))
        if spans[0][0] == 0:
            return _reject(record, RowFault("the answer has no token before it"))
        for (start, end), (a, b) in zip(spans, text.spans, strict=True):
            decoded = self.decode(ids[start:end])
            if not _same_text(decoded, text.text[a:b], exact=self._pieces):
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

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


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


def _added_specials(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _marked(messages: list[dict[str, str]], i: int, marked: list[Span]) -> Span:
    """The mark of turn `i`: templates mark every assistant turn, in order."""
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    if len(marked) != len(turns):
        raise RowFault(
            "the template's generation marks do not match the answers", f"{len(marked)} marks, {len(turns)} assistant turns"
        )
    return marked[turns.index(i)]


def _marked_start(messages: list[dict[str, str]], i: int, marked: list[Span]) -> int:
    return _marked(messages, i, marked)[0]


def _marked_end(messages: list[dict[str, str]], i: int, marked: list[Span]) -> int:
    return _marked(messages, i, marked)[1]


def _same_text(decoded: str, expected: str, *, exact: bool) -> bool:
    """Equal, or equal but for Unicode composition, which some tokenizers normalise; SentencePiece drops a first space."""
    if decoded == expected:
        return True
    if not exact:
        decoded, expected = decoded.strip(), expected.strip()
    return unicodedata.normalize("NFC", decoded) == unicodedata.normalize("NFC", expected)


def _reject(record: AnyRecord, fault: RowFault) -> Reject:
    return Reject(record.origin, fault.reason, fault.detail)


