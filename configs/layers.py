"""Hydra's part: override grammar, and the YAML files and schemas that make up a config, in order.

Hydra merges these layers itself and stops at the first fault; `configs.compose` merges them one by one, so that it can
name every fault and the file it is in. A test holds both results equal for every shipped option.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError, CrosstuneError, nearest
from configs.groups import (
    CONFIG_ROOT,
    EXPERIMENT,
    ROOTS,
    SCHEMAS,
    groups_of,
    options_of,
    register_schemas,
)


@dataclass(frozen=True)
class Layer:
    """Values for one place of the config.

    Attributes:
        package: dotted key the values belong to; empty for the root.
        schema: dataclass that this place takes on; None if the layer has only values.
        values: plain nested values.
        source: file they come from; None for a schema.
    """

    package: str
    schema: type[Any] | None
    values: dict[str, Any]
    source: str | None


@dataclass(frozen=True)
class Typed:
    """One override, parsed: ``group=option`` (`is_group`), or a key with its value."""

    text: str
    key: str
    value: Any
    is_group: bool
    deletes: bool


def parse_overrides(command: str, texts: Sequence[str]) -> tuple[list[Typed], list[CrosstuneError]]:
    """Reads overrides in Hydra's grammar; a text that does not parse becomes a fault."""
    parser = OverridesParser.create()
    groups = groups_of(command)
    typed: list[Typed] = []
    faults: list[CrosstuneError] = []
    for text in texts:
        try:
            parsed = parser.parse_overrides([text])[0]
        except HydraException:
            if (read := _beyond_hydra(parser, text)) is not None:
                typed.append(read)
            else:
                faults += _doubled_key_fault(text) or [_syntax_fault(text)]
            continue
        if parsed.is_sweep_override():
            faults.append(_sweep_fault(text))
            continue
        if isinstance(parsed.value(), dict):
            faults += _doubled_key_fault(text)
        is_group = parsed.key_or_group in groups and not isinstance(parsed.value(), dict)
        typed.append(Typed(text, parsed.key_or_group, parsed.value(), is_group, parsed.is_delete()))
        faults += _package_fault(parsed)
    return typed, faults


def _beyond_hydra(parser: OverridesParser, text: str) -> Typed | None:
    """A value that Hydra's grammar has no words for: a text or a name in it with letters beyond ASCII, or spaces."""
    key, _, value = text.partition("=")
    try:
        read = _flow(value) if value.startswith(("{", "[")) else _letters(value)
        parsed = parser.parse_overrides([f"{key}=null"])[0]
    except (HydraException, yaml.YAMLError, OmegaConfBaseException):
        return None
    return None if read is None else Typed(text, parsed.key_or_group, read, False, False)


def _flow(value: str) -> Any:
    """What YAML reads in ``{...}`` or ``[...]``; None where OmegaConf would put something else in its place."""
    return None if "${" in value else OmegaConf.to_container(OmegaConf.create(value))


def _letters(value: str) -> str | None:
    plain = not value.isascii() and value == value.strip() and not set(value) & set("'\"\\$,=(){}[]")
    return value if plain else None


def _syntax_fault(text: str) -> ConfigError:
    key, equals, value = text.partition("=")
    if not equals:
        return ConfigError(text, "not an override", allowed="key=value, group=option, +key=value, ~key")
    if not key.isascii():
        return ConfigError(
            key,
            "a name with letters beyond ASCII cannot stand before =",
            remedy="write it in braces behind the key above: 'KEY={NAME: value}'",
        )
    if value.startswith(("{", "[")) and value.endswith(("}", "]")):
        return ConfigError(
            key,
            f"cannot read the value {value}",
            allowed="{name: value, name: value} or [value, value]",
            remedy='put what has spaces or signs in double quotes, and all of it in single ones: {a: "b (c)"}',
        )
    quoted = value.replace("'", "\\'")
    text = f"{key}='{quoted}'"
    # Inside double quotes a shell would still act on these; the remedy is there to be copied.
    word = shlex.quote(text) if set(text) & set('$`"\\!') else f'"{text}"'
    return ConfigError(key, f"cannot read the value {value}", remedy=f"quote it twice: {word}")


def _doubled_key_fault(text: str) -> list[CrosstuneError]:
    """Of two equal keys in ``{a: ..., a: ...}`` Hydra takes the last and says nothing; YAML, read so, objects."""
    key, _, value = text.partition("=")
    try:
        OmegaConf.create(value)
    except yaml.constructor.ConstructorError as error:
        if error.problem and error.problem.startswith("found duplicate key "):
            name = error.problem.removeprefix("found duplicate key ")
            return [ConfigError(key, f"'{name}' stands twice", remedy="give each a name of its own")]
    except (yaml.YAMLError, OmegaConfBaseException):
        pass  # Hydra's grammar is not quite YAML
    return []


def _sweep_fault(text: str) -> ConfigError:
    key, _, value = text.partition("=")
    return ConfigError(
        key,
        f"several values: {value}",
        remedy=f"for a list type '{key}=[{value}]', for a text with a comma \"{key}='{value}'\"",
    )


def _package_fault(parsed: Override) -> list[CrosstuneError]:
    if parsed.package is None:
        return []
    return [
        ConfigError(str(parsed.input_line), "an option cannot be moved to another place with @", allowed="group=option")
    ]


def check_choices(
    command: str, typed: Sequence[Typed], config_dir: Path | None
) -> tuple[list[Typed], list[CrosstuneError]]:
    """Splits off the group choices that name an option there is.

    Returns:
        The sound choices and a fault for each other.
    """
    sound, faults = [], []
    for item in typed:
        fault = (
            ConfigError(item.key, "a group cannot be taken out", remedy=f"choose another option: {item.key}=...")
            if item.deletes
            else _option_fault(item.key, item.value, item.key, config_dir)
        )
        if fault is None and item.key == EXPERIMENT and item.value is not None:
            file = _file_of(f"{EXPERIMENT}/{item.value}", config_dir)
            broken = _experiment_faults(file, config_dir)
            faults += broken
            if broken:
                continue
        if fault:
            faults.append(fault)
        else:
            sound.append(item)
    return sound, faults


def _option_fault(group: str, option: Any, place: str, config_dir: Path | None) -> CrosstuneError | None:
    options = options_of(group, config_dir)
    if option in options or (option is None and group == EXPERIMENT):
        return None
    meant = nearest(str(option), options)
    remedy = f"did you mean {group}={meant}?" if meant else None
    if "/" in str(option) and group in ("model", "dataset"):
        remedy = f"name a folder or file with {group}.path={option}"
    return ConfigError(place, f"no option '{option}'", allowed=", ".join(options), remedy=remedy)


def _experiment_faults(file: Path, config_dir: Path | None) -> list[CrosstuneError]:
    """Faults of an experiment's `defaults:` list, all of them; Hydra would stop at the first."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        return [_yaml_fault(file, error)]
    if not isinstance(content, dict):
        return [ConfigError(str(file), "holds no keys", allowed="`defaults:` and keys of a run")]
    if not isinstance(content.get("defaults", []), list):
        return [ConfigError(f"{file}: defaults", "not a list", allowed="- override /GROUP: OPTION")]
    faults: list[CrosstuneError] = []
    for entry in content.get("defaults", []):
        pair = next(iter(entry.items())) if isinstance(entry, dict) and entry else (None, None)
        group = str(pair[0]).removeprefix("override ").removeprefix("/")
        if pair[0] is None:
            continue
        place = f"{file}: defaults: {group}"
        if group not in SCHEMAS:
            meant = nearest(group, SCHEMAS)
            remedy = f"did you mean /{meant}?" if meant else None
            faults.append(ConfigError(place, "no such group", allowed=", ".join(SCHEMAS), remedy=remedy))
        elif fault := _option_fault(group, pair[1], place, config_dir):
            faults.append(fault)
    return faults


def _yaml_fault(file: Path | str, error: Exception) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    place = f"{file}:{mark.line + 1}" if mark else str(file)
    reason = getattr(error, "problem", None) or str(error).splitlines()[0]
    return ConfigError(place, f"not readable as YAML: {reason}")


def layers(command: str, choices: Sequence[Typed], config_dir: Path | None) -> list[Layer]:
    """The layers of a config in the order in which later ones win.

    Args:
        command: name of a root.
        choices: checked group choices.
        config_dir: the user's folder of experiments and options.

    Raises:
        ConfigError: a file's defaults list or YAML is at fault.
    """
    register_schemas()
    composed_as = "run" if any(item.key == EXPERIMENT for item in choices) else command
    texts = [f"{item.key}={'null' if item.value is None else item.value}" for item in choices]
    if config_dir is not None:
        escaped = str(config_dir.resolve()).replace("'", "\\'")
        texts.append(f"hydra.searchpath=['file://{escaped}']")
    with initialize_config_dir(str(CONFIG_ROOT), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        try:
            entries = loader.compute_defaults_list(composed_as, texts, RunMode.RUN).defaults
        except yaml.YAMLError as error:
            raise _yaml_fault(getattr(getattr(error, "problem_mark", None), "name", "config"), error) from None
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(
                "defaults", " ".join(str(error).split()), remedy="mend the file's `defaults:` list"
            ) from None
    return [
        _load(str(entry.config_path), entry.package or "", config_dir)
        for entry in entries
        if entry.config_path and not entry.config_path.startswith("hydra")
    ]


def _load(config_path: str, package: str, config_dir: Path | None) -> Layer:
    group, _, name = config_path.rpartition("/")
    schema = SCHEMAS.get(group, {}).get(name) or ROOTS.get(config_path.removesuffix("_schema"))
    if schema is not None and config_path.endswith("_schema"):
        return Layer(package, schema, {}, None)
    file = _file_of(config_path, config_dir)
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise _yaml_fault(file, error) from None
    if not isinstance(content, dict):
        raise ConfigError(str(file), "holds no keys")
    content.pop("defaults", None)
    return Layer(package, None, {str(key): value for key, value in content.items()}, str(file))


def _file_of(config_path: str, config_dir: Path | None) -> Path:
    """The file of an option; one name in both folders is refused, as it is unclear which was meant."""
    ours = CONFIG_ROOT / f"{config_path}.yaml"
    theirs = config_dir / f"{config_path}.yaml" if config_dir else None
    if theirs is None or not theirs.is_file() or "/" not in config_path:
        return ours
    if ours.is_file():
        raise ConfigError(str(theirs), "crosstune ships an option of this name", remedy="rename the file")
    return theirs
