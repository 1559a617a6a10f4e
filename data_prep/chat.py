r"""A conversation as the text its chat template makes of it, with the characters that are answers.

The template renders the conversation whole, and once more for each turn to learn: the turns before it plus the
generation prompt. That text, which is what inference starts from, must be a prefix of the whole; what follows it is
the answer (`answers.py`). ``{% generation %}`` marks must agree with that.

Templates that drop or change earlier turns, mostly their reasoning, show an answer as the assistant wrote it only in
the conversation cut after it. Such a turn becomes a conversation of its own, learned alone, and stays in the whole as
context. Where a template opens its prompts with a reasoning marker that it does not write before answers without
reasoning, they are learned from behind the place where the marker would be, and a note counts them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep import long_texts
from data_prep.answers import Answer, AnswerFinder, Part, parts_of, without_marker
from data_prep.openai_form import Tools, openai_form, openai_turn, spoken
from data_prep.records import Message, Record, RowFault, texts_of
from data_prep.rendered import Span
from data_prep.scaffold import Placeholders
from data_prep.template import DAY, Template, Turn, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOVED = "the chat template changes what came before an answer"
_NO_MARKER = "answers without the reasoning marker that the generation prompt ends with"


@dataclass(frozen=True, slots=True)
class ChatText:
    """A conversation's text and the answers in it that are learned, in order."""

    text: str
    answers: list[Answer]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with the template to use.
        model_name: how messages name the model.
        variables: what the template is given besides the conversation.
        notes: counts what a reader of the manifest should know, by conversation or answer.
        image: text of the token that the template writes for an image; None: the model does not see.
        blind: why it does not.

    Raises:
        ModelError: there is no template, or it does not compile.
        ConfigError: `variables` holds a name that is not free.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model_name: str,
        variables: Mapping[str, Any],
        notes: Counter[str],
        *,
        image: str | None = None,
        blind: str = "",
    ) -> None:
        self._image, self._blind = image, blind
        self._template = Template(tokenizer, model_name, variables)
        self._notes = notes
        specials = special_tokens(tokenizer)
        self._finder = AnswerFinder(specials, tokenizer.eos_token, self._template.empty_block)
        self._control = re.compile("|".join(map(re.escape, specials)) or r"(?!)")
        self._control_begins = sorted({token[0] for token in specials})
        self._bos = _begin_token(tokenizer, self._template)

    def render(self, record: Record) -> list[ChatText]:
        """The text of a conversation with its answers, then those of its turns that need a conversation of their own.

        Raises:
            RowFault: the template refuses it, or does not keep prompts or answers as they are; or it is longer than any
                model reads.
        """
        long_texts.refuse_longer(sum(map(len, texts_of(record))), "a conversation")
        self._refuse_images(record)
        self._refuse_control_tokens(record)
        try:
            turns, tools = openai_form(record, self._template, self._notes)
            found = self._rendered(_Talk(self._template, record, turns, tools))
        except RowFault:
            raise
        except Exception as error:  # a template is a program of somebody's: it may divide by zero
            raise RowFault("the chat template refuses the conversation", str(error) or type(error).__name__) from None
        if self._template.dated:
            self._notes[f"conversations rendered as of {DAY}: the chat template writes today's date"] += 1
        return found

    def lead(self, text: str) -> int:
        """Tokens at the beginning of a conversation's text that stay when its beginning is cut off."""
        return int(self._bos is not None and text.startswith(self._bos))

    def _refuse_images(self, record: Record) -> None:
        for number, message in enumerate(record.messages, start=1):
            if message.images and self._image is None:
                why = f"; {self._blind}" if self._blind else ""
                raise RowFault("images need a model that sees", f"turn {number}: {len(message.images)} of them{why}")
            if message.images and message.role == "assistant":
                raise RowFault("an image in an assistant's turn", f"turn {number}: models answer in text")

    def _refuse_control_tokens(self, record: Record) -> None:
        """Text that spells a special token becomes that token: at best noise, at worst the injected end of a turn."""
        for number, message in enumerate(record.messages, start=1):
            plain = not (message.reasoning or message.calls or message.name)
            self._refuse_control(message.content if plain else _all_text(message), f"turn {number}")
        if record.tools:
            self._refuse_control("\n".join(_strings(record.tools)), "tools")

    def _refuse_control(self, text: str, where: str) -> None:
        if any(character in text for character in self._control_begins) and (found := self._control.search(text)):
            raise RowFault("the text holds a control token", f"{where}: {found[0]}")

    def _rendered(self, talk: _Talk) -> list[ChatText]:
        whole: list[Answer] = []
        own: list[ChatText] = []
        for i, message in enumerate(talk.record.messages):
            if message.train:
                answer, upto = self._answer(talk, i)
                if upto < talk.length:
                    own.append(ChatText(talk.text(upto), [answer]))
                    continue
                if whole and answer.start < whole[-1].end:
                    raise RowFault(MOVED, f"turn {i + 1} begins before the answer before it ends")
                whole.append(answer)
        self._check_images(talk)
        return [ChatText(talk.text(talk.length), whole), *own] if whole else own

    def _check_images(self, talk: _Talk) -> None:
        """Every image of the turns is shown, by one token."""
        given = sum(len(message.images) for message in talk.record.messages)
        if not given:
            return
        assert self._image is not None
        shown = talk.text(talk.length).count(self._image)
        if shown != given:
            raise RowFault("the chat template does not show the images", f"{given} images, {shown} times {self._image}")

    def _answer(self, talk: _Talk, i: int) -> tuple[Answer, int]:
        """Answer `i`, and the number of turns of the conversation it was found in: all, else those up to it.

        Raises:
            RowFault: it is in neither as the assistant wrote it; the whole's fault is told.
        """
        first: RowFault | None = None
        for upto, prompt, bare in _places(talk, i):
            try:
                answer = self._find(talk, upto, prompt, i)
            except RowFault as fault:
                first = first or fault
                continue
            self._notes.update([_NO_MARKER] if bare else [])
            return answer, upto
        assert first is not None
        raise first

    def _find(self, talk: _Talk, upto: int, prompt: str, i: int) -> Answer:
        """Answer `i` behind `prompt` in the conversation of the first `upto` turns."""
        message = talk.record.messages[i]
        text = _after(talk.text(upto), prompt, i)
        calls = message.calls if self._template.knows_calls else ()
        content = spoken(message, self._template)
        if calls or message.reasoning:
            parts = parts_of(message.reasoning, content, calls)
            answer = self._find_parts(talk, upto, prompt, i, parts)
        else:
            answer = self._finder.content(text, len(prompt), content)
        return self._within_mark(text, answer, talk.mark(upto, i)) if self._template.marked else answer

    def _find_parts(self, talk: _Talk, upto: int, prompt: str, i: int, parts: list[Part]) -> Answer:
        """An answer with reasoning or calls: the conversation cut after it shows where it ends."""
        cut = _after(talk.text(i + 1), prompt, i)
        reasoned = bool(talk.record.messages[i].reasoning)
        answer, ended = self._finder.parts(cut, len(prompt), parts, reasoned=reasoned)
        held = Placeholders(talk.record.messages[i])
        shown = _after(talk.text_with(i, held.message), prompt, i)
        held.check(shown[len(prompt) :], cut[len(prompt) :])
        if upto == i + 1 and ended:
            return answer
        said = cut[answer.start : answer.end]
        return self._finder.again(talk.text(upto), len(prompt), said, answer.token - answer.start)

    def _within_mark(self, text: str, answer: Answer, mark: Span) -> Answer:
        """The answer, which must be marked but for white space and an empty reasoning block before it."""
        start, end = mark
        if answer.end > end:
            raise RowFault("the template's generation marks leave the end token out", repr(text[end : answer.end][:20]))
        if start <= answer.start:
            return answer
        gap = text[answer.start : start]
        if gap.strip() and len(gap) not in self._finder.blocks(gap, 0):
            raise RowFault("the template's generation marks leave a part of the answer out", repr(gap[:20]))
        return Answer(start, answer.token, answer.end)


class _Talk:
    """A conversation and the texts of its beginnings, each rendered once."""

    __slots__ = ("_marks", "_prompts", "_template", "_texts", "_tools", "_turns", "_shift", "length", "record")

    def __init__(self, template: Template, record: Record, turns: list[Turn], tools: Tools) -> None:
        self.record = record
        self.length = len(record.messages)
        self._template, self._turns, self._tools = template, turns, tools
        self._shift = len(turns) - self.length
        """1 where a system turn was put before the record's own turns."""
        self._texts: dict[int, str] = {}
        self._prompts: dict[int, str] = {}
        self._marks: dict[int, list[Span]] = {}

    def text(self, upto: int) -> str:
        """Of the record's first turns."""
        if upto not in self._texts:
            turns = self._turns[: upto + self._shift]
            if self._template.marked:
                self._texts[upto], self._marks[upto] = self._template.text_with_marks(turns, self._tools)
            else:
                self._texts[upto] = self._template.text(turns, self._tools, prompt=False)
        return self._texts[upto]

    def text_with(self, i: int, message: Message) -> str:
        """Of the first turns up to turn `i`, which is replaced."""
        turn = openai_turn(message, self._template, Counter())
        turns = [*self._turns[: i + self._shift], turn]
        return self._template.text(turns, self._tools, prompt=False)

    def prompt(self, i: int) -> str:
        """What inference starts from to make turn `i`."""
        if i not in self._prompts:
            self._prompts[i] = self._template.text(self._turns[: i + self._shift], self._tools, prompt=True)
        return self._prompts[i]

    def mark(self, upto: int, i: int) -> Span:
        """The generation mark of turn `i` in the text of the first turns: templates mark assistant turns, in order."""
        self.text(upto)
        turns = [k for k, m in enumerate(self.record.messages[:upto]) if m.role == "assistant"]
        marks = self._marks[upto]
        if len(marks) != len(turns):
            found = f"{len(marks)} marks, {len(turns)} assistant turns"
            raise RowFault("the template's generation marks do not match the answers", found)
        return marks[turns.index(i)]


def _places(talk: _Talk, i: int) -> Iterator[tuple[int, str, bool]]:
    """Where answer `i` may stand, the best first: the conversation's turns, the prompt, and whether that was shortened.

    A prompt that ends with a reasoning marker is also tried without it: in the whole at once if it opens a block, which
    answers without reasoning never had; after the conversation cut behind the answer if it closes one.
    """
    prompt = talk.prompt(i)
    yield talk.length, prompt, False
    bare, opens = without_marker(prompt)
    if bare is not None and opens:
        yield talk.length, bare, True
    if i + 1 < talk.length:
        yield i + 1, prompt, False
    if bare is not None and not opens:
        yield talk.length, bare, True
    if bare is not None and i + 1 < talk.length:
        yield i + 1, bare, True


def _after(text: str, prompt: str, i: int) -> str:
    if not text.startswith(prompt):
        raise RowFault(MOVED, f"the prompt of turn {i + 1} is no prefix of the conversation")
    return text


def _begin_token(tokenizer: PreTrainedTokenizerBase, template: Template) -> str | None:
    """The begin token, if the tokenizer's is one: ChatML models name the token so that opens every turn."""
    bos = tokenizer.bos_token
    return bos if isinstance(bos, str) and bos and bos not in template.answer_opener else None


def _all_text(message: Message) -> str:
    calls = [text for call in message.calls for text in (call.name, *_strings(call.arguments))]
    return "\n".join([message.reasoning, message.content, message.name or "", *calls])


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)
