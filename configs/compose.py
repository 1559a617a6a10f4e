"""Overrides and YAML -> the typed config of a command; every fault of it listed at once.

    cfg = compose("train", ["model.path=/models/m", "dataset.path=data.jsonl", "tuning=full"])
    save_resolved(cfg, run_dir / "resolved.yaml");  cfg == load_resolved(run_dir / "resolved.yaml")

Nothing behind this module sees a DictConfig.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.check import apply, options_with
from configs.construct import construct
from configs.docs import field_docs
from configs.errors import ConfigError, CrosstuneError, raise_all
from configs.files import write_whole
from configs.groups import EXPERIMENT, ROOTS, SCHEMAS, groups_of, spoken
from configs.layers import Layer, Typed, check_choices, layers, parse_overrides

T = TypeVar("T")


def compose(command: str, overrides: Sequence[str], *, config_dir: Path | None = None) -> Any:
    """The typed config of a command.

    Args:
        command: a key of `configs.groups.ROOTS`.
        overrides: in Hydra's grammar: ``group=option``, ``key.sub=value``, ``+dict.key=value``, ``~dict.key``.
        config_dir: folder with experiments and group options of the user's own.

    Returns:
        An instance of the command's root dataclass (`configs.schema.roots`).

    Raises:
        ConfigError: one fault.
        ErrorGroup: several faults.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise ConfigError(
            "--config-dir", f"no folder '{config_dir}'", remedy="name a folder with experiment/<name>.yaml"
        )
    typed, faults = parse_overrides(command, overrides)
    choices, more = check_choices(command, [item for item in typed if item.is_group], config_dir)
    faults += more
    stack = layers(command, choices, config_dir)
    whole = "run" if any(item.key == EXPERIMENT for item in choices) else command
    config = OmegaConf.structured(ROOTS[whole])
    replaced = {item.key for item in choices}
    for layer in stack:
        faults += _merge(config, _without_other_options(config, layer, replaced))
    config = _cut(config, ROOTS[command])
    for item in typed:
        if not item.is_group:
            faults += _override(config, item, command)
    lost = len(choices) < sum(item.is_group for item in typed)
    return _finish(config, faults, command, ask_for_missing=not lost)


def amend(cfg: T, overrides: Sequence[str], *, config_dir: Path | None = None) -> T:
    """A copy of a typed config with overrides on top; ``group=option`` replaces the whole group.

    Raises:
        ConfigError: one fault.
        ErrorGroup: several faults.
    """
    command = command_of(cfg)
    typed, faults = parse_overrides(command, overrides)
    choices, more = check_choices(command, [item for item in typed if item.is_group], config_dir)
    faults += more
    config: DictConfig = OmegaConf.structured(cfg)
    chosen = {item.key for item in choices}
    for layer in layers(command, choices, config_dir) if choices else []:
        if layer.package in chosen:
            faults += _merge(config, layer)
    for item in typed:
        if not item.is_group:
            faults += _override(config, item, command)
    amended: T = _finish(config, faults, command)
    return amended


def command_of(cfg: object) -> str:
    """The command whose root a typed config is."""
    return next(command for command, root in ROOTS.items() if type(cfg) is root)


def _without_other_options(config: DictConfig, layer: Layer, replaced: set[str]) -> Layer:
    """An experiment's layer without what it says about an option that the command line replaced by another.

    ``experiment=licenses tuning=full``: the experiment's `tuning.rank` belongs to the LoRA that was not wanted.
    """
    if layer.package or layer.source is None:
        return layer
    values = dict(layer.values)
    for group in replaced & values.keys():
        if isinstance(inner := values[group], dict):
            values[group] = {k: v for k, v in inner.items() if k in config[group] or not options_with(group, str(k))}
    return replace(layer, values=values)


def _merge(config: DictConfig, layer: Layer) -> list[ConfigError]:
    if layer.schema is None:
        return apply(config, layer.values, layer.source, layer.package)
    if layer.package:
        config[layer.package] = OmegaConf.structured(layer.schema)
    return []


def _cut(config: DictConfig, root: type[Any]) -> DictConfig:
    """The part of a run's config that another command knows; what only that command has is at its default."""
    if OmegaConf.get_type(config) is root:
        return config
    part: DictConfig = OmegaConf.structured(root)
    for f in fields(root):
        if f.name in config:
            part[f.name] = config._get_node(f.name)
    return part


def _override(config: DictConfig, item: Typed, command: str) -> list[CrosstuneError]:
    if item.deletes:
        return _delete(config, item.key)
    if item.key in (*SCHEMAS, EXPERIMENT) and item.key not in groups_of(command):
        if item.key not in config:
            return [
                ConfigError(
                    item.key, f"`crosstune {spoken(command)}` has no such group", allowed=", ".join(groups_of(command))
                )
            ]
    parts = item.key.split(".")
    for length in range(1, len(parts)):  # a key inside a free dictionary, whose own names may hold dots no further
        node = OmegaConf.select(config, ".".join(parts[:length]), throw_on_missing=False)
        if isinstance(node, DictConfig) and not is_dataclass(OmegaConf.get_type(node)):
            return _set_in_dict(node, item)
    nested: Any = _as_typed(config, item)
    for part in reversed(parts):
        nested = {part: nested}
    return list(apply(config, nested, None))


def _as_typed(config: DictConfig, item: Typed) -> Any:
    """The value; for a key that holds text, a number as it was typed: `run_dir=007`, a revision `12e4567`."""
    if isinstance(item.value, bool) or not isinstance(item.value, int | float):
        return item.value
    parent, _, name = item.key.rpartition(".")
    node = OmegaConf.select(config, parent, throw_on_missing=False) if parent else config
    owner = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    holds_text = is_dataclass(owner) and get_type_hints(owner).get(name) in (str, str | None)
    return item.text.partition("=")[2].strip() if holds_text else item.value


def _set_in_dict(node: DictConfig, item: Typed) -> list[CrosstuneError]:
    inner = item.key[len(str(node._get_full_key(None))) + 1 :]
    try:
        OmegaConf.update(node, inner, item.value, merge=True, force_add=True)
    except OmegaConfBaseException as error:
        return [ConfigError(item.key, str(error).splitlines()[0])]
    return []


def _delete(config: DictConfig, key: str) -> list[CrosstuneError]:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else None
    if not isinstance(node, DictConfig) or is_dataclass(OmegaConf.get_type(node)):
        return [ConfigError(f"~{key}", "only entries of a dictionary can be taken out", remedy=f"set it: {key}=...")]
    if last not in node:
        return [ConfigError(f"~{key}", "is not there", allowed=", ".join(str(name) for name in node) or "nothing")]
    del node[last]
    return []


def _finish(config: DictConfig, faults: Sequence[CrosstuneError], command: str, *, ask_for_missing: bool = True) -> Any:
    """Missing values, the schemas' own checks, and the typed object, or everything that is wrong.

    `ask_for_missing` is off where an option was at fault: it may well have set what is missing now.
    """
    found = list(faults)
    named = {fault.where.rpartition(" ")[2] for fault in found}
    for key in sorted(_missing_keys(config)) if ask_for_missing else ():
        if key not in named:
            found.append(_missing(config, key, command))
    cfg = construct(config, found)
    raise_all(found)
    return cfg


def _missing_keys(config: DictConfig) -> set[str]:
    """Keys without a value; none where a `${...}` leads nowhere, which `construct` tells by its key."""
    try:
        return OmegaConf.missing_keys(config)
    except OmegaConfBaseException:
        return set()


def _missing(config: DictConfig, key: str, command: str) -> ConfigError:
    parent, _, name = key.rpartition(".")
    owner = OmegaConf.get_type(OmegaConf.select(config, parent) if parent else config)
    assert isinstance(owner, type)
    doc = field_docs(owner).get(name)
    remedy = f"add it: crosstune {spoken(command)} {key}=..."
    return ConfigError(key, "not set, and there is no default", allowed=doc, remedy=remedy)


def to_yaml(cfg: object) -> str:
    """A typed config as YAML, its command first."""
    values = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    assert isinstance(values, dict)
    content = {"command": command_of(cfg), **_escaped(values)}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _escaped(value: Any) -> Any:
    """Values are resolved by now: a ``${`` that is left in a text is meant as it stands."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def save_resolved(cfg: object, path: Path) -> None:
    """Writes a typed config as readable YAML with every key; `load_resolved` gives an equal object.

    Raises:
        StorageError: the path cannot be written.
    """
    text = "# Every setting of this run, as `crosstune` resolved it.\n" + to_yaml(cfg)
    write_whole(path, text)


def load_resolved(path: Path) -> Any:
    """The typed config that `save_resolved` wrote.

    Raises:
        ConfigError: the file is not there, is no such file, or was edited into something that does not fit.
        ErrorGroup: several such faults.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file", remedy="name a file resolved.yaml of a run") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(str(path), f"not readable: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or content.get("command") not in ROOTS:
        found = content.get("command") if isinstance(content, dict) else type(content).__name__
        raise ConfigError(f"{path}: command", f"'{found}'", allowed=", ".join(ROOTS))
    command = content.pop("command")
    config = OmegaConf.structured(ROOTS[command])
    for group, schemas in SCHEMAS.items():
        if isinstance(values := content.get(group), dict) and group in config:
            config[group] = OmegaConf.structured(_schema_of(values, list(schemas.values()), config[group]))
    return _finish(config, list(apply(config, content, str(path))), command)


def _schema_of(values: dict[Any, Any], schemas: Sequence[type[Any]], default: DictConfig) -> type[Any]:
    """The schema of a saved group: the one with its `_target_`, or, under a class of the user's, with all its keys."""
    for schema in schemas:
        if getattr(schema, "_target_", None) == values.get("_target_"):
            return schema
    covering = [schema for schema in schemas if {f.name for f in fields(schema)} >= set(values)]
    return covering[0] if covering else type(OmegaConf.to_object(default))


def build(node: Any, base: type[T], *args: Any, **kwargs: Any) -> T:
    """An instance of the class that a group's `_target_` names: ``cls(node, *args, **kwargs)``.

    Raises:
        ConfigError: there is no such class, or it is not a subclass of `base`.
    """
    from hydra.utils import get_class

    target = node._target_
    try:
        cls = get_class(target)
    except Exception as error:  # hydra wraps whatever the import raised
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise ConfigError(
            "_target_", f"cannot load '{target}': {reason}", remedy="a dotted class on the Python path"
        ) from error
    if not issubclass(cls, base):
        raise ConfigError(
            "_target_", f"'{target}' is no {base.__name__}", allowed=f"subclasses of {base.__module__}.{base.__name__}"
        )
    instance: T = cls(node, *args, **kwargs)
    return instance
