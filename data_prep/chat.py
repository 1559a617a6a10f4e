r"""A conversation as the text its chat template makes of it, with the characters that are answers.

The template renders the conversation whole, and once more for each turn to learn: the turns before it plus the
generation prompt. That text, which is what inference starts from, must be a prefix of the whole; what follows it is
the answer. A template with ``{% generation %}`` marks says itself where answers are. An answer ends with the first
special token after the assistant's text: the end token, which is learned too; a line break after it is not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from configs.errors import ModelError
from data_prep.records import Record, RowFault, answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""Half-open; of characters or of token indices."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class ChatText:
    """A conversation's text and, per answer in order, its characters, end token included."""

    text: str
    spans: list[Span]


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: with the template to use.
        model_name: how messages name the model.

    Raises:
        ModelError: there is no template, or it does not compile.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_name: str) -> None:
        self._tokenizer: Any = tokenizer
        if not isinstance(tokenizer.chat_template, str):
            raise ModelError(
                model_name,
                "its tokenizer has no chat template, and the records are conversations",
                remedy="template.path=<Jinja file>; or dataset.format=text for plain text",
            )
        self._template: str = tokenizer.chat_template
        self._marked = _GENERATION_MARK.search(self._template) is not None
        specials = _special_tokens(tokenizer)
        self._end = re.compile(r"\s*(?:" + "|".join(map(re.escape, specials)) + ")") if specials else None
        frame = {tokenizer.bos_token, tokenizer.eos_token}
        control = [token for token in specials if token in frame or token in self._template]
        self._control = re.compile("|".join(map(re.escape, control))) if control else None
        self._check_compiles(model_name)

    def render(self, record: Record) -> ChatText:
        """The text of a conversation and where its answers are.

        Raises:
            RowFault: the template refuses it, or does not keep prompts or answers as they are.
        """
        self._refuse_control_tokens(record)
        messages = [{"role": m.role, "content": m.content} for m in record.messages]
        try:
            return self._render(messages, record)
        except RowFault:
            raise
        except Exception as error:  # a template is a program of somebody's: it may divide by zero
            raise RowFault("the chat template refuses the conversation", str(error) or type(error).__name__) from None

    def _check_compiles(self, model_name: str) -> None:
        from jinja2.exceptions import TemplateSyntaxError

        try:
            self._text([{"role": "user", "content": "a"}], prompt=True)
        except TemplateSyntaxError as error:
            raise ModelError(model_name, f"its chat template does not compile: {error}") from error
        except Exception:
            return  # it compiles; what it thinks of this conversation does not matter

    def _refuse_control_tokens(self, record: Record) -> None:
        """Text that spells a turn's end would end the turn: at best noise, at worst an injected one."""
        for number, message in enumerate(record.messages, start=1):
            if self._control is not None and (match := self._control.search(message.content)):
                raise RowFault("the text holds a control token of the template", f"turn {number}: {match[0]}")

    def _render(self, messages: list[dict[str, str]], record: Record) -> ChatText:
        marks: list[Span] = []
        if self._marked:
            whole, marks = self._with_marks(messages)
        else:
            whole = self._text(messages, prompt=False)
        spans = []
        for i, content in answers(record):
            start, limit = _mark(messages, i, marks) if self._marked else (self._start(messages, i, whole), len(whole))
            end = self._answer_end(whole, start, content)
            if end > limit:
                raise RowFault("the template's generation marks leave the end token out", f"turn {i + 1}")
            spans.append((start, end))
        return ChatText(whole, spans)

    def _text(self, messages: list[dict[str, str]], *, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def _with_marks(self, messages: list[dict[str, str]]) -> tuple[str, list[Span]]:
        """The text and the marked characters: what ``return_assistant_tokens_mask`` makes its mask of."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[messages],
            chat_template=self._template,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in marks[0]]

    def _start(self, messages: list[dict[str, str]], i: int, whole: str) -> int:
        prompt = self._text(messages[:i], prompt=True)
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
            raise RowFault(
                "the chat template changes the assistant's text", f"'{body[:20]}' became '{whole[begin:][:20]}'"
            )
        match = self._end.match(whole, begin + len(body)) if self._end else None
        if match is None:
            raise RowFault("no end token after the answer", f"followed by {whole[begin + len(body) :][:20]!r}")
        return match.end()


def _special_tokens(tokenizer: Any) -> list[str]:
    """Texts of the special tokens, longer ones first so that a search finds the whole token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token))


def _mark(messages: list[dict[str, str]], i: int, marks: list[Span]) -> Span:
    """The mark of turn `i`: templates mark every assistant turn, in order."""
    turns = [k for k, m in enumerate(messages) if m["role"] == "assistant"]
    if len(marks) != len(turns):
        found = f"{len(marks)} marks, {len(turns)} assistant turns"
        raise RowFault("the template's generation marks do not match the answers", found)
    return marks[turns.index(i)]
