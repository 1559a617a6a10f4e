"""Holds raw values against the typed schema, key by key, and words what does not fit.

Works on one source at a time (a YAML file, one override), takes over what fits and returns a fault for what does not,
so that a user sees all of them at once. What values mean together is checked by the schemas themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError, nearest
from configs.groups import CONFIG_ROOT, SCHEMAS, options_of


def apply(config: DictConfig, values: Mapping[Any, Any], source: str | None, prefix: str = "") -> list[ConfigError]:
    """Writes `values` into the typed `config`, below `prefix`.

    Args:
        config: the whole config; changed in place.
        values: nested plain values, as read from YAML or parsed from an override.
        source: file the values come from; None for the command line.
        prefix: dotted key of the node that `values` belongs to; empty for the root.

    Returns:
        A fault for each key that is unknown or whose value does not fit; these keys keep their former value.
    """
    node = OmegaConf.select(config, prefix) if prefix else config
    schema = OmegaConf.get_type(node)
    hints = get_type_hints(schema)
    faults: list[ConfigError] = []
    for raw_key, value in values.items():
        key, dotted = str(raw_key), f"{prefix}.{raw_key}" if prefix else str(raw_key)
        if key not in hints:
            faults.append(_unknown(config, dotted, source))
        elif is_dataclass(hints[key]):
            if isinstance(value, Mapping):
                faults += apply(config, value, source, dotted)
            else:
                faults.append(_not_a_group_value(dotted, value, source))
        else:
            fault = _assign(node, key, value, hints[key], _place(dotted, source))
            faults += [fault] if fault else []
    return faults


def _assign(node: DictConfig, key: str, value: Any, hint: Any, place: str) -> ConfigError | None:
    kind, optional = _plain(hint)
    if isinstance(value, bool) and isinstance(kind, type) and issubclass(kind, Enum):
        value = "on" if value else "off"  # YAML 1.1 reads a bare on/off as a truth value
    if get_origin(kind) is list and isinstance(value, str) and "${" not in value:
        value = [value]  # one word is a list of one
    interpolated = isinstance(value, str) and "${" in value
    if not interpolated and not _fits(value, kind, optional):
        return ConfigError(place, f"{_shown(value)} does not fit", allowed=_allowed(kind, optional))
    try:
        before = node._get_node(key)
        if isinstance(before, DictConfig) and isinstance(value, Mapping):
            for name, item in value.items():
                before[str(name)] = item
        else:
            node[key] = value
    except OmegaConfBaseException:
        return ConfigError(place, f"{_shown(value)} does not fit", allowed=_allowed(kind, optional))
    return None


def _fits(value: Any, kind: Any, optional: bool) -> bool:
    """What OmegaConf would let through and is not meant: nan, an enum's number, a nested value for text."""
    if value is None:
        return optional
    if isinstance(value, Mapping) or isinstance(value, list):
        return get_origin(kind) is (dict if isinstance(value, Mapping) else list)
    if kind is float:
        try:
            return not isinstance(value, bool) and math.isfinite(float(value))
        except ValueError:
            return False
    if isinstance(kind, type) and issubclass(kind, Enum):
        return isinstance(value, str) and value in kind.__members__
    return not (kind in (int, str) and isinstance(value, bool))


def _plain(hint: Any) -> tuple[Any, bool]:
    """A type hint without its `| None`, and whether it had one."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    if type(None) in get_args(hint):
        return parts[0], True
    return hint, False


def _allowed(kind: Any, optional: bool) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        text = ", ".join(kind.__members__)
    elif get_origin(kind) is list:
        (of,) = get_args(kind)
        names = f": {', '.join(of.__members__)}" if isinstance(of, type) and issubclass(of, Enum) else ""
        text = f"a list, e.g. [a,b], of {'these' if names else f'{_word(of)} values'}{names}"
    elif get_origin(kind) is dict:
        text = "names with values, e.g. {a: b}"
    else:
        text = _word(kind, article=True)
    return f"{text}, or null" if optional else text


def _word(kind: Any, *, article: bool = False) -> str:
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    bare = {int: "whole number", float: "number", bool: "true/false", str: "text"}
    return (words if article else bare).get(kind, str(kind))


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown(config: DictConfig, dotted: str, source: str | None) -> ConfigError:
    """The fault of a key that no schema has, with the likeliest key that was meant."""
    group, _, rest = dotted.partition(".")
    known = list(all_keys(config))
    owners = options_with(group, rest) if rest else []
    if owners:
        chosen = f"{group}={', '.join(owners[:-1])} or {owners[-1]}" if owners[1:] else f"{group}={owners[0]}"
        return ConfigError(_place(dotted, source), "not a key of the chosen option", remedy=f"choose {chosen}")
    parent, _, last = dotted.rpartition(".")
    if not parent and (meant := nearest(last, [str(key) for key in config])) in SCHEMAS:
        return ConfigError(_place(dotted, source), "unknown key", remedy=f"did you mean the group {meant}?")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == parent}
    meant = siblings.get(nearest(last, siblings) or "")
    meant = meant or next((key for key in known if key.rpartition(".")[2] == last), None) or nearest(dotted, known)
    if meant is None and siblings:
        return ConfigError(_place(dotted, source), "unknown key", allowed=", ".join(sorted(siblings)))
    remedy = f"did you mean {meant}?" if meant else "the keys there are: add --cfg job to the command"
    return ConfigError(_place(dotted, source), "unknown key", remedy=remedy)


def options_with(group: str, key: str) -> list[str]:
    """The options of a group whose schema has `key`."""
    found = []
    for option in options_of(group) if group in SCHEMAS else []:
        text = (CONFIG_ROOT / group / f"{option}.yaml").read_text(encoding="utf-8")
        schemas = [schema for name, schema in SCHEMAS[group].items() if name in text]
        if any(f.name == key for schema in schemas for f in fields(schema)):
            found.append(option)
    return found


def _not_a_group_value(dotted: str, value: Any, source: str | None) -> ConfigError:
    if source is None:
        return ConfigError(dotted, f"{_shown(value)} is no value for a group", remedy=f"set its keys: {dotted}.KEY=...")
    return ConfigError(
        _place(dotted, source),
        f"{_shown(value)} is no value for a group",
        remedy=f"choose an option under `defaults:` (`- override /{dotted}: {value}`), or nest its keys",
    )


def all_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a config, leaves only."""
    for key in map(str, config):
        node = config._get_node(key)
        dotted = f"{prefix}{key}"
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            yield from all_keys(node, f"{dotted}.")
        else:
            yield dotted


def _place(dotted: str, source: str | None) -> str:
    """The key, and for a key out of a file also ``file:line``."""
    if source is None:
        return dotted
    line = _line_of(Path(source), dotted.split("."))
    return f"{source}{f':{line}' if line else ''}: {dotted}"


@lru_cache(maxsize=4)
def _composed(text: str) -> Any:
    """The same file is asked for each of its keys."""
    return yaml.compose(text, Loader=yaml.SafeLoader)


def _line_of(file: Path, path: list[str]) -> int | None:
    """Line of a key in a YAML file. A group option's file leaves out the group's own name."""
    if not file.is_file():
        return None
    root = _composed(file.read_text(encoding="utf-8"))
    for tail in (path, path[1:]):
        node: Any = root
        line: int | None = None
        for part in tail:
            pairs = {k.value: (k, v) for k, v in node.value} if isinstance(node, yaml.MappingNode) else {}
            if part not in pairs:
                line = None
                break
            line, node = pairs[part][0].start_mark.line + 1, pairs[part][1]
        if line:
            return line
    return None
