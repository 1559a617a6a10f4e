"""A chat template: a program of somebody's that makes one text of a conversation in OpenAI's form."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, ModelError
from data_prep.rendered import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turn = dict[str, Any]
"""A message in OpenAI's form."""

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OURS = ("messages", "tools", "documents", "add_generation_prompt", "tokenize")
DAY = datetime.date(2024, 7, 26)
"""Templates that write today's date get this one, which Llama's write where they cannot ask: the same records shall
give the same samples tomorrow."""


class Template:
    """The chat template of a tokenizer, compiled.

    Args:
        tokenizer: with the template to use.
        model_name: how messages name the model.
        variables: what the template is given besides the conversation.

    Raises:
        ModelError: there is no template, or it does not compile.
        ConfigError: `variables` holds a name that is not free.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model_name: str, variables: Mapping[str, Any]) -> None:
        if not isinstance(tokenizer.chat_template, str):
            raise ModelError(
                model_name,
                "its tokenizer has no chat template, and the records are conversations",
                remedy="template.path=<Jinja file>; or dataset.format=text for plain text",
            )
        for name in _OURS:
            if name in variables:
                raise ConfigError(f"template.kwargs.{name}", "is given to the template by crosstune itself")
        self.source: str = tokenizer.chat_template
        self.marked = _GENERATION_MARK.search(self.source) is not None
        self.knows_tools = re.search(r"\btools\b", self.source) is not None
        self.knows_calls = re.search(r"\btool_calls\b", self.source) is not None
        self.knows_reasoning = re.search(r"\breasoning_content\b|(?:\.|\[['\"])thinking\b", self.source) is not None
        self.dated = "strftime_now" in self.source
        self._tokenizer: Any = tokenizer
        self._own = dict(variables)
        self._variables = {**tokenizer.special_tokens_map, **variables}
        self._compiled = self._compile(model_name)
        self._shared = {**getattr(self._compiled, "globals", {}), "documents": None, **self._variables}
        self._text_arguments: bool | None = None
        self._probe()

    def text(self, turns: list[Turn], tools: list[dict[str, Any]] | None = None, *, prompt: bool) -> str:
        """The conversation's text; with `prompt` followed by what the model is asked to go on from.

        Raises:
            Exception: whatever the template's program raises.
        """
        if self._compiled is None:
            text: str = self._tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=prompt, **self._own
            )
            return text
        given = {**self._shared, "messages": turns, "tools": tools, "add_generation_prompt": prompt}
        context = self._compiled.new_context(given, shared=True)  # `render` would copy all of it on each call
        return "".join(self._compiled.root_render_func(context))

    def text_with_marks(self, turns: list[Turn], tools: list[dict[str, Any]] | None) -> tuple[str, list[Span]]:
        """As `text`, with the characters between generation marks: what transformers makes its masks of."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[turns],
            tools=tools,
            chat_template=self.source,
            return_assistant_tokens_mask=True,
            **self._variables,
        )
        return texts[0], [(start, end) for start, end in marks[0]]

    @property
    def takes_arguments_as_text(self) -> bool:
        """Whether it wants the arguments of calls as JSON text and fails on objects (DeepSeek V3's does)."""
        if self._text_arguments is None:
            self._text_arguments = not self._shows_call({"a": 1}) and self._shows_call('{"a": 1}')
        return self._text_arguments

    def _shows_call(self, arguments: Any) -> bool:
        call = {"id": "123456789", "type": "function", "function": {"name": "a", "arguments": arguments}}
        turns: list[Turn] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            self.text(turns, prompt=False)
        except Exception:  # a probe: the program may raise anything, and rows will show it
            return False
        return True

    def _compile(self, model_name: str) -> Any:
        """The jinja2 template that transformers renders with; None where the tokenizer renders in a way of its own.

        The public way copies every conversation anew on each call, which costs as much as rendering it. Ours hold
        plain JSON values already, which is what that copy is there to ensure.
        """
        from jinja2.exceptions import TemplateSyntaxError
        from transformers import PreTrainedTokenizerBase
        from transformers.utils import chat_template_utils

        compile_template = getattr(chat_template_utils, "_compile_jinja_template", None)
        method = type(self._tokenizer).apply_chat_template
        if compile_template is None or method is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        try:
            compiled = compile_template(self.source)
        except TemplateSyntaxError as error:
            raise ModelError(model_name, f"its chat template does not compile: {error}") from error
        if self.dated:
            compiled.globals["strftime_now"] = DAY.strftime  # of this template, wherever the process renders it
        return compiled

    def _probe(self) -> None:
        """Looks at an example; that the program fails on it says nothing about other conversations."""
        turns: list[Turn] = [{"role": "user", "content": "a"}]
        self.answer_opener = self.empty_block = ""
        """What it puts before an answer; of that, what it does not put into prompts, up to the answer's text."""
        try:
            bare, prompt = self.text(turns, prompt=False), self.text(turns, prompt=True)
            whole = self.text([*turns, {"role": "assistant", "content": "b"}], prompt=False)
        except Exception:
            return
        self.answer_opener = prompt.removeprefix(bare)
        before, found, _ = whole.removeprefix(prompt).partition("b")
        if whole.startswith(prompt) and found and "think" in before.lower():
            self.empty_block = before


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts of the special tokens, longer ones first so that a search finds the whole token."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda token: (-len(token), token))
