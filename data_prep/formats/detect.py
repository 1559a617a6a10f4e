"""Which format a file has, judged by its first rows; and whether the columns that were asked for are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import ConfigError, DataError, nearest
from configs.schema.dataset import RecordFormat
from data_prep.formats import FORMATS, Format
from data_prep.formats.base import has_turns

SAMPLE_ROWS = 20
"""Rows of a file that are looked at before it is read."""


def choose(
    path: str,
    samples: Sequence[Mapping[str, Any]],
    wanted: RecordFormat,
    columns: Mapping[str, str],
    system: str | None,
) -> tuple[Format, str]:
    """The format that reads a file, and why it was chosen.

    Args:
        path: the file, as the user named it.
        samples: its first usable rows, at least one.
        wanted: the configured format.
        columns: the configured mapping, our name -> theirs.
        system: system turn for rows that have none.

    Raises:
        ConfigError: `columns` names a column of ours that does not exist.
        DataError: the format cannot be told, or the file lacks a column.
    """
    found = list(dict.fromkeys(str(key) for row in samples for key in row))
    _check_mapping(columns, wanted)
    if wanted is RecordFormat.auto:
        name, aliases, why = _recognise(path, samples, found, columns)
        columns = {**aliases, **columns}
    else:
        name, why = wanted.value, f"dataset.format={wanted.value}"
    chosen = FORMATS[name](columns, system)
    _check_columns(path, found, chosen)
    return chosen, f"{name} ({why})"


def _check_mapping(columns: Mapping[str, str], wanted: RecordFormat) -> None:
    formats = list(FORMATS.values()) if wanted is RecordFormat.auto else [FORMATS[wanted.value]]
    known = list(dict.fromkeys(c for f in formats for c in (*f.required, *f.optional)))
    for ours in columns:
        if ours not in known:
            near = nearest(ours, known)
            raise ConfigError(
                f"dataset.columns.{ours}",
                "no such column of ours" + (f"; did you mean '{near}'?" if near else ""),
                allowed=", ".join(known),
                remedy="write our name first, then theirs: dataset.columns={prompt: question}",
            )


def _check_columns(path: str, found: list[str], chosen: Format) -> None:
    needed = {ours: chosen.theirs(ours) for ours in chosen.required} | chosen.columns
    for ours, theirs in needed.items():
        if theirs in found:
            continue
        near = nearest(theirs, found)
        shown = f"'{theirs}'" + (f" (our '{ours}')" if ours != theirs else "")
        raise DataError(
            path,
            f"no column {shown} for format {chosen.name}; found: {', '.join(found) or 'none'}"
            + (f"; nearest: '{near}'" if near else ""),
            remedy=f"dataset.columns={{{ours}: {near or '<your column>'}}}, or another dataset.format",
        )


def _recognise(
    path: str, samples: Sequence[Mapping[str, Any]], found: list[str], columns: Mapping[str, str]
) -> tuple[str, dict[str, str], str]:
    """(format, column aliases, why)."""
    view: dict[str, Any] = {}
    for row in samples:
        for key, value in row.items():
            if view.get(key) is None:
                view[str(key)] = value
    view |= {ours: view[theirs] for ours, theirs in columns.items() if theirs in view}
    aliases = _aliases(view)
    view |= {ours: view[theirs] for ours, theirs in aliases.items()}
    reasons = {name: why for name, f in FORMATS.items() if (why := f.recognise(view))}
    if len(reasons) > 1:
        reasons.pop("text", None)
    if {"chosen", "rejected"} <= view.keys():
        reasons = {"preference pairs, which are not read yet": "columns 'chosen' and 'rejected'", **reasons}
    if len(reasons) == 1:
        (name, why), *_ = reasons.items()
        if name in FORMATS:
            return name, aliases, why
    if reasons:
        candidates = "could be: " + "; ".join(f"{name} ({why})" for name, why in reasons.items())
    else:
        candidates = "none of the known shapes fits"
    raise DataError(
        path,
        f"the format cannot be told for certain from the columns {', '.join(found) or '(none)'}; {candidates}",
        allowed=f"dataset.format={'|'.join(FORMATS)}",
        remedy="set dataset.format, and dataset.columns={<ours>: <theirs>} where names differ",
    )


def _aliases(view: Mapping[str, Any]) -> dict[str, str]:
    """Turns of one shape under the other shape's column name are common in exports."""
    if "messages" not in view and has_turns(view.get("conversations"), ("role", "content")):
        return {"messages": "conversations"}
    if "conversations" not in view and has_turns(view.get("messages"), ("from", "value")):
        return {"conversations": "messages"}
    return {}
