"""Which format a file has, judged by its first rows; and whether the columns that were asked for are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import ConfigError, DataError, nearest
from configs.schema.dataset import Learn, Preference, RecordFormat
from data_prep.formats import FORMATS, Format
from data_prep.formats.base import TURN_KEYS, ConversationFormat
from data_prep.formats.suggest import suggest
from data_prep.formats.turns import SHAREGPT, Keys, has_turns
from data_prep.records import ROLES

SAMPLE_ROWS = 20
"""Rows of a file that are looked at before it is read."""

_OTHER_NAMES = {"images": "image", "label": "kto_tag"}
"""Column of ours -> a name that means nothing else beside a conversation."""


def choose(
    path: str,
    samples: Sequence[Mapping[str, Any]],
    wanted: RecordFormat,
    columns: Mapping[str, str],
    system: str | None,
    *,
    roles: Mapping[str, str] | None = None,
    preference: Preference = Preference.pairs,
    learn: Learn = Learn.all,
) -> tuple[Format, str]:
    """The format that reads a file, and why it was chosen.

    Args:
        path: the file, as the user named it.
        samples: its first usable rows, at least one.
        wanted: the configured format.
        columns: the configured mapping, our name -> theirs.
        system: system turn for rows that have none.
        roles: the configured mapping, their name of a role -> ours.
        preference: what becomes of preference pairs.
        learn: which assistant turns are learned.

    Raises:
        ConfigError: `columns` names a column of ours that does not exist, or `roles` a role.
        DataError: the format cannot be told, or the file lacks a column.
    """
    found = list(dict.fromkeys(str(key) for row in samples for key in row))
    _check_mapping(columns, wanted)
    _check_roles(roles or {})
    view = _view(samples, columns)
    aliases = _aliases(view, columns)
    if wanted is RecordFormat.auto:
        name, why = _recognise(path, _named(view, columns), samples, found, columns)
    else:
        name, why = wanted.value, f"dataset.format={wanted.value}"
    kind = FORMATS[name]
    columns = {o: columns.get(other, other) for o, other in aliases.items() if o in _columns_of(kind)} | dict(columns)
    chosen = kind(columns, system, roles=roles, preference=preference, learn=learn)
    _check_columns(path, found, chosen)
    unread = [column or "''" for column in found if column not in chosen.reads]
    called = {o: other for o, other in aliases.items() if chosen.columns.get(o) == other}
    why += "".join(f", here '{other}'" for other in called.values()) if wanted is RecordFormat.auto else ""
    return chosen, f"{name} ({why})" + (f"; not read: {', '.join(unread)}" if unread else "")


def _columns_of(kind: type[Format]) -> tuple[str, ...]:
    return (*kind.required, *kind.optional)


def _check_mapping(columns: Mapping[str, str], wanted: RecordFormat) -> None:
    formats = list(FORMATS.values()) if wanted is RecordFormat.auto else [FORMATS[wanted.value]]
    known = list(dict.fromkeys(c for f in formats for c in _columns_of(f)))
    known += TURN_KEYS if any(issubclass(f, ConversationFormat) for f in formats) else ()
    for ours in columns:
        if ours not in known:
            near = nearest(ours, known)
            raise ConfigError(
                f"dataset.columns.{ours}",
                "no such column of ours" + (f"; did you mean '{near}'?" if near else ""),
                allowed=", ".join(known),
                remedy="write our name first, then theirs: dataset.columns={prompt: question}",
            )


def _check_roles(roles: Mapping[str, str]) -> None:
    for theirs, ours in roles.items():
        if ours not in ROLES:
            raise ConfigError(
                f"dataset.roles.{theirs}",
                f"no such role: '{ours}'",
                allowed=", ".join(ROLES),
                remedy="write their name first, then ours: dataset.roles={Kunde: user}",
            )


def _check_columns(path: str, found: list[str], chosen: Format) -> None:
    needed = {ours: chosen.theirs(ours) for ours in chosen.required} | chosen.columns
    for ours, theirs in needed.items():
        if theirs in found or ours in TURN_KEYS:
            continue
        near = nearest(theirs, found)
        shown = f"'{theirs}'" + (f" (our '{ours}')" if ours != theirs else "")
        raise DataError(
            path,
            f"no column {shown} for format {chosen.name}; found: {', '.join(found) or 'none'}"
            + (f"; nearest: '{near}'" if near else ""),
            remedy=f"dataset.columns={{{ours}: {near or '<your column>'}}}, or another dataset.format",
        )


def _view(samples: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> dict[str, Any]:
    """Column -> the first value of it that is not null, mapped ones under our name only."""
    values: dict[str, Any] = {}
    for row in samples:
        for key, value in row.items():
            if values.get(key) is None:
                values[str(key)] = value
    mapped = {ours: theirs for ours, theirs in columns.items() if theirs in values and ours not in TURN_KEYS}
    own = {key: value for key, value in values.items() if key not in mapped.values()}
    return own | {ours: values[theirs] for ours, theirs in mapped.items()}


def _recognise(
    path: str,
    view: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    found: list[str],
    columns: Mapping[str, str],
) -> tuple[str, str]:
    """(format, why)."""
    reasons = _reasons(view, columns)
    if len(reasons) == 1:
        (name, why), *_ = reasons.items()
        return name, why
    where = f"the format cannot be told for certain from the columns {', '.join(found) or '(none)'}"
    if not reasons:
        raise DataError(path, f"{where}; none of the known shapes fits", remedy=suggest(view))
    of_rows = [tuple(_reasons(_named(_view([row], columns), columns), columns)) for row in samples]
    if len(set(of_rows)) > 1 and all(len(names) == 1 for names in of_rows):
        counts = Counter(name for (name,) in of_rows)
        shapes = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        raise DataError(
            path,
            f"its first {len(samples)} rows are of several shapes: {shapes}",
            allowed="one shape a file",
            remedy="write each shape into a file of its own; dataset.format=NAME leaves the other rows out",
        )
    candidates = "; ".join(f"{name} ({why})" for name, why in reasons.items())
    remedy = " or ".join(f"dataset.format={name}" for name in reasons)
    raise DataError(path, f"{where}; could be: {candidates}", remedy=f"say which is meant: {remedy}")


def _reasons(view: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Format -> why it may be the one."""
    reasons = {name: why for name, kind in FORMATS.items() if (why := kind.recognise(view, _keys(columns)))}
    ranks = {name: FORMATS[name].rank(view) for name in reasons}
    return {name: why for name, why in reasons.items() if ranks[name] == max(ranks.values())}


def _keys(columns: Mapping[str, str]) -> Keys:
    return columns.get("role", "role"), columns.get("content", "content")


def _named(view: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {**view, **{ours: view[other] for ours, other in _aliases(view, columns).items()}}


def _aliases(view: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Ours -> the name in `view` that stands for it in common exports, where the values leave no doubt."""
    found = {ours: other for ours, other in _OTHER_NAMES.items() if ours not in view and other in view}
    for ours, keys in (("messages", _keys(columns)), ("conversations", SHAREGPT)):
        for other in ("messages", "conversations", "conversation"):
            if ours not in view and has_turns(view.get(other), keys):
                found.setdefault(ours, other)
    return found
