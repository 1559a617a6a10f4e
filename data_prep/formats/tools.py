"""Functions that may be called, and calls of them, in every form that exports have, as OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from data_prep.records import RowFault, ToolCall, kind_of, optional_text, shown, text_of, unique_keys

MAX_DEPTH = 64
"""Nesting of a schema or of arguments that is still read; nobody means more."""

_STRICT = json.JSONDecoder(object_pairs_hook=unique_keys)

_TOOLS_TEXT = """You may call these functions. To call one, answer only with a JSON object of its name and arguments.
{tools}"""


def tools_text(tools: Iterable[dict[str, Any]]) -> str:
    """The functions as text, for a system turn where the chat template knows no tools."""
    return _TOOLS_TEXT.format(tools=json.dumps([tool["function"] for tool in tools], ensure_ascii=False))


def tools_of(value: Any, column: str) -> tuple[dict[str, Any], ...]:
    """The functions in a column: one or a list, bare or in ``{"type": "function", "function": ...}``, or JSON text.

    Raises:
        RowFault: it is something else.
    """
    if value is None:
        return ()
    value = _decoded(value, column, "tools are not JSON")
    if not value:
        return ()
    if not isinstance(value, list | dict):
        raise RowFault("tools are not a list of functions", f"{column} is {kind_of(value)}")
    tools = []
    for number, tool in enumerate(value if isinstance(value, list) else [value], start=1):
        what = f"{column}, function {number}"
        tool = _decoded(tool, what, "tools are not JSON")
        function = tool.get("function", _without_type(tool)) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or tool.get("type", "function") not in ("function", None):
            raise RowFault("tools are not a list of functions", what)
        if not text_of(function.get("name"), f"name of {what}").strip():
            raise RowFault("a function has no name", what)
        tools.append({"type": "function", "function": _json(function, what, "tools are not JSON")})
    return tuple(tools)


def calls_of(value: Any, what: str) -> tuple[ToolCall, ...]:
    """The calls in a turn's field: a list, or one, in OpenAI's form or as ``{"name", "arguments"}``; JSON text of that.

    Arguments are an object, or JSON text of one.

    Raises:
        RowFault: it is something else.
    """
    value = _decoded(value, what, "a function call is not JSON")
    if not value:
        return ()
    calls = value if isinstance(value, list) else [value]
    return tuple(_call(call, what) for call in calls)


def _without_type(tool: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tool.items() if key != "type"} if "type" in tool else tool


def _call(call: Any, what: str) -> ToolCall:
    call = _decoded(call, what, "a function call is not JSON")
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or call.get("type", "function") not in ("function", None):
        raise RowFault("a call is not a function's", f"{what}: {shown(function)}")
    if not text_of(function.get("name"), f"name of the function called in {what}").strip():
        raise RowFault("a function has no name", what)
    arguments = _decoded(function.get("arguments"), what, "arguments are not JSON")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowFault("arguments are not an object", f"{what}: {kind_of(arguments)}")
    call_id = optional_text(call.get("id"), f"id of the call in {what}")
    return ToolCall(function["name"], _json(arguments, what, "arguments are not JSON"), call_id or None)


def _decoded(value: Any, what: str, reason: str) -> Any:
    """JSON text as what it says, empty text as null; other values as they are."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return _STRICT.decode(value)
    except (ValueError, RecursionError) as error:
        raise RowFault(reason, f"{what}: {error}") from None


def _json(value: dict[str, Any], what: str, reason: str) -> dict[str, Any]:
    """`value`, which a template can write as JSON: no dates or numbers that JSON lacks, valid Unicode, not too deep."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault("invalid UTF-8", what) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise RowFault(reason, f"{what}: {error}") from None
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _refuse_deeper(value, MAX_DEPTH, what)
    return value


def _refuse_deeper(value: Any, levels: int, what: str) -> None:
    if not isinstance(value, dict | list):
        return
    if not levels:
        raise RowFault("nested too deeply", f"{what}: more than {MAX_DEPTH} levels")
    for inner in value.values() if isinstance(value, dict) else value:
        _refuse_deeper(inner, levels - 1, what)
