"""What to write where no known shape fits a file: the setting that makes one fit, as far as its columns show it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.formats.turns import ROLE_NAMES, SHAREGPT

_ASKED = ("question", "query", "problem", "prompt", "instruction", "user", "input", "问题", "提问", "指令", "输入")
_SAID = ("answer", "response", "completion", "output", "reply", "assistant", "solution", "回答", "答案", "回复", "输出")
_BESIDE = ("input", "context")
"""Names that exports give to the columns, in lower case; only for advice, which a person reads."""

_GENERAL = (
    "say which columns are meant: 'dataset.columns={prompt: ASKED, completion: ANSWERED}', "
    "'dataset.columns={messages: TURNS, role: WHO, content: TEXT}' or 'dataset.columns={text: DOCUMENT}'"
)


def suggest(view: Mapping[str, Any]) -> str:
    """A remedy to copy.

    Args:
        view: column -> a value of it.
    """
    return _turns(view) or _preference(view) or _pair(view) or _document(view) or _GENERAL


def _turns(view: Mapping[str, Any]) -> str | None:
    for column, value in view.items():
        if isinstance(value, dict) and any(_are_objects(inner) for inner in value.values()):
            return f"take what is in '{column}' out of it: the columns must be at the top of a row"
        if isinstance(value, str) and value.lstrip().startswith(("[{", "[ {")):
            return f"'{column}' holds JSON written as text: write the list itself"
        if not _are_objects(value):
            continue
        if all(key in value[0] for key in SHAREGPT):
            return _columns({"conversations": column})
        keys = {str(key): content for key, content in value[0].items() if isinstance(content, str)}
        role = next((key for key, content in keys.items() if content.lower() in ROLE_NAMES), None)
        content = [key for key in keys if key != role]
        if role is None or len(content) != 1:
            keys_shown = ", ".join(map(str, value[0]))
            guess = _columns({"messages": column, "role": "WHO", "content": "TEXT"})
            return f"'{column}' holds objects of {keys_shown}: {guess}"
        mapping = {"messages": column, "role": role, "content": content[0]}
        return _columns(mapping)
    return None


def _preference(view: Mapping[str, Any]) -> str | None:
    if not {"chosen", "rejected"} <= view.keys():
        return None
    asked = _first(view, _ASKED)
    return _columns({"prompt": asked}) if asked else "name the column of the prompt: 'dataset.columns={prompt: ASKED}'"


def _pair(view: Mapping[str, Any]) -> str | None:
    asked, said, beside = _first(view, _ASKED), _first(view, _SAID), _first(view, _BESIDE)
    if not asked or not said:
        return None
    if "history" in view or (beside and beside != asked):
        mapping = {"instruction": asked, "output": said} | ({"input": beside} if beside and beside != asked else {})
        return _columns(mapping)
    return _columns({"prompt": asked, "completion": said})


def _document(view: Mapping[str, Any]) -> str | None:
    texts = [column for column, value in view.items() if isinstance(value, str)]
    return f"if it is plain text: {_columns({'text': texts[0]})}" if len(view) == len(texts) == 1 else None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _first(view: Mapping[str, Any], names: Iterable[str]) -> str | None:
    columns = {column.lower(): column for column, value in view.items() if isinstance(value, str)}
    return next((columns[name] for name in names if name in columns), None)


def _columns(mapping: Mapping[str, str]) -> str:
    words = ", ".join(f"{ours}: {theirs}" for ours, theirs in mapping.items() if ours != theirs)
    return f"'dataset.columns={{{words}}}'"
