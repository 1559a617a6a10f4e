"""Lists of turns as messages: ``{"role", "content"}``, ``{"from", "value"}``, or keys that a config names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from data_prep.formats.images import content_of, references_of
from data_prep.formats.reasoning import has_reasoning, reasoning_of, split_reasoning
from data_prep.formats.tools import calls_of
from data_prep.records import Message, RowFault, ToolCall, kind_of, optional_text, shown, text_of

Keys = tuple[str, str]
"""Of a turn: where its role and where its content stand."""

OPENAI: Keys = ("role", "content")
SHAREGPT: Keys = ("from", "value")

ROLE_NAMES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "用户", "人类"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "助手", "助理"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "tool_response", "工具"), "tool"),
}
"""Names of roles that exports use, in lower case -> ours."""

_CALL_ROLES = ("function_call", "tool_call")
"""ShareGPT's: the assistant's turn is nothing but a call, or several."""

_CALL_FIELDS = ("tool_calls", "function_call")
NOT_READ = ("audio", "audios", "video", "videos")
"""Fields and columns that change what the model hears or sees: what fills one is refused, not read in part."""


class TurnReader:
    """Reads lists of turns.

    Args:
        keys: of a turn.
        roles: the config's names of roles -> ours, besides `ROLE_NAMES`.
    """

    def __init__(self, keys: Keys, roles: Mapping[str, str]) -> None:
        self._role, self._content = keys
        self._roles = {**ROLE_NAMES, **roles}

    def read(self, value: Any, column: str) -> list[Message]:
        """The turns in a column. A turn that is only a call belongs to the assistant's turn right before it.

        Raises:
            RowFault: it is no list of turns, or a turn cannot be used.
        """
        if not isinstance(value, list):
            raise RowFault("turns are not a list", f"{column} is {kind_of(value)}")
        messages: list[Message] = []
        for number, turn in enumerate(value, start=1):
            what = f"turn {number}"
            if not isinstance(turn, dict):
                raise RowFault("a turn is not an object", f"{column}, {what} is {kind_of(turn)}")
            message = self._message(turn, what)
            if message.calls and messages and messages[-1].role == "assistant" and turn[self._role] in _CALL_ROLES:
                message = _joined(messages.pop(), message, what)
            messages.append(message)
        return messages

    def _message(self, turn: dict[str, Any], what: str) -> Message:
        name = text_of(self._value(turn, self._role, what), f"{self._role} of {what}")
        role = self._roles.get(name) or self._roles.get(name.lower())
        if role == "assistant":
            return self._assistant(turn, what)
        if role is None and name in _CALL_ROLES:
            return self._only_calls(turn, what)
        if role is None:
            raise RowFault("unknown role", f"{what}: {shown(name)}; dataset.roles says what it means")
        text, images = content_of(self._value(turn, self._content, what), what)
        if len(turn) == 2:
            return Message(role, text, images=images)
        if has_reasoning(turn) or any(turn.get(field) for field in _CALL_FIELDS):
            raise RowFault("a call or reasoning that is not the assistant's", f"{what} is {role}'s")
        images = _images(turn, images, what)
        if role != "tool":
            return Message(role, text, images=images)
        tool = optional_text(turn.get("name"), f"name of {what}") or None
        call_id = optional_text(turn.get("tool_call_id"), f"tool_call_id of {what}") or None
        return Message(role, text, name=tool, call_id=call_id, images=images)

    def _assistant(self, turn: dict[str, Any], what: str) -> Message:
        plain = len(turn) == 2 and self._content in turn
        calls = () if plain else _calls(turn, what)
        content = turn.get(self._content) if calls else self._value(turn, self._content, what)
        text, images = content_of("" if calls and content is None else content, what)
        reasoning, text = split_reasoning(text, what)
        if plain:
            return Message("assistant", text, True, reasoning, (), None, None, images)
        reasoning = reasoning_of(turn, reasoning, what)
        images = _images(turn, images, what)
        return Message("assistant", text, _trained(turn, what), reasoning, calls, images=images)

    def _only_calls(self, turn: dict[str, Any], what: str) -> Message:
        value, inline = self._value(turn, self._content, what), ""
        if isinstance(value, str):
            inline, value = split_reasoning(value, what)
        calls = calls_of(value, what)
        if not calls:
            raise RowFault("a function call is not JSON", f"{what} is empty")
        return Message("assistant", "", _trained(turn, what), reasoning_of(turn, inline, what), calls)

    def _value(self, turn: dict[str, Any], key: str, what: str) -> Any:
        if key not in turn:
            raise RowFault(f"a turn lacks '{key}'", f"{what} has {', '.join(map(shown, list(turn)[:8])) or 'nothing'}")
        return turn[key]


def has_turns(value: Any, keys: Keys) -> bool:
    """Whether a value looks like a list of turns with these keys."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and all(k in value[0] for k in keys)


def _joined(said: Message, called: Message, what: str) -> Message:
    """One assistant turn of what was said, or called already, and a call right after it."""
    if called.reasoning or said.train != called.train:
        raise RowFault("roles out of order", f"{what}: a call with its own reasoning or mark after an assistant's turn")
    return replace(said, calls=said.calls + called.calls)


def _calls(turn: dict[str, Any], what: str) -> tuple[ToolCall, ...]:
    return tuple(call for field in _CALL_FIELDS for call in calls_of(turn.get(field), f"{field} of {what}"))


def _images(turn: dict[str, Any], images: tuple[str, ...], what: str) -> tuple[str, ...]:
    for field in NOT_READ:
        if turn.get(field):
            raise RowFault(f"'{field}' is not read", what)
    own = references_of(turn.get("images"), f"images of {what}")
    if own and images:
        raise RowFault("images are given twice", what)
    return tuple(own) if own else images


def _trained(turn: dict[str, Any], what: str) -> bool:
    for field in ("train", "weight"):
        value = turn.get(field)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            met = value if isinstance(value, int | float) else shown(value)
            raise RowFault(f"'{field}' is neither 0 nor 1", f"{what}: {met}")
        if not value:
            return False
    return True
