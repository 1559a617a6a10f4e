"""`crosstune prep inspect` and `crosstune prep --dry-run`: looking at data, before and after it is prepared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, ErrorGroup, nearest

if TYPE_CHECKING:
    from data_prep.inspect import Wanted

INSPECT_KEYS = {"n": "n", "split": "split", "id": "id", "rejects": "rejects", "model.path": "model"}
"""Key of `crosstune prep inspect` -> field of `Wanted`."""


def inspect(path: Path, words: Sequence[str]) -> dict[str, Any]:
    """`crosstune prep inspect PATH [key=value ...]`."""
    wanted = read_wanted(path, words)
    from rich.console import Console

    from data_prep.inspect import inspect as look

    found = look(wanted)
    found.show(Console())
    return found.to_json()


def read_wanted(path: Path, words: Sequence[str]) -> Wanted:
    """What is to be shown, read from ``key=value`` words.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
        ErrorGroup: several of them.
    """
    from data_prep.inspect import Wanted

    values: dict[str, Any] = {}
    faults: list[ConfigError] = []
    for word in words:
        key, _, value = word.partition("=")
        try:
            values[INSPECT_KEYS.get(key, key)] = _value(key, value)
        except ConfigError as fault:
            faults.append(fault)
    if values.get("rejects") and (other := {"id", "split"} & values.keys()):
        faults.append(ConfigError(min(other), "has no use with rejects=true", remedy="leave one of them out"))
    if faults:
        raise faults[0] if len(faults) == 1 else ErrorGroup(faults)
    return Wanted(path, **values)


def _value(key: str, value: str) -> Any:
    if key not in INSPECT_KEYS:
        near = nearest(key, INSPECT_KEYS)
        raise ConfigError(
            key, "unknown key", allowed=", ".join(INSPECT_KEYS), remedy=near and f"did you mean {near}=...?"
        )
    if key == "n":
        if not (value.isascii() and value.isdigit() and int(value)):
            raise ConfigError("n", f"'{value}'", allowed="a whole number, 1 or more")
        return int(value)
    if key == "rejects":
        if value not in ("true", "false"):
            raise ConfigError("rejects", f"'{value}'", allowed="true, false")
        return value == "true"
    if not value:
        raise ConfigError(key, "empty", remedy=f"{key}=...")
    return Path(value).expanduser() if key == "model.path" else value
