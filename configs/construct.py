"""A checked config -> its dataclasses, with all that their `__post_init__` checks find, not only the first."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from configs.errors import ConfigError, CrosstuneError


def construct(config: DictConfig, found: list[CrosstuneError]) -> Any:
    """Builds the typed object of a config bottom-up.

    Args:
        config: a config whose nodes are backed by dataclasses.
        found: the faults met so far; those of the dataclasses' own checks are added.

    Returns:
        The root dataclass; of no use if a fault was added.
    """
    values: dict[str, Any] = {}
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig) and is_dataclass(OmegaConf.get_type(node)):
            values[str(key)] = _checked(node, str(key), found)
        else:
            values[str(key)] = _plain_value(config, str(key), found)
    return _construct_one(OmegaConf.get_type(config), values, "", found)


def _checked(node: DictConfig, prefix: str, found: list[CrosstuneError]) -> Any:
    values = {str(key): _plain_value(node, str(key), found, f"{prefix}.") for key in node}
    return _construct_one(OmegaConf.get_type(node), values, f"{prefix}.", found)


def _plain_value(node: DictConfig, key: str, found: list[CrosstuneError], prefix: str = "") -> Any:
    if OmegaConf.is_missing(node, key):
        return "???"
    try:
        value = node[key]
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except InterpolationResolutionError as error:
        remedy = "name a key of this config; a ${ that is meant as it stands is written \\${"
        found.append(ConfigError(f"{prefix}{key}", str(error).splitlines()[0], remedy=remedy))
    except OmegaConfBaseException as error:
        found.append(ConfigError(f"{prefix}{key}", str(error).splitlines()[0]))
    return None


def _construct_one(schema: Any, values: dict[str, Any], prefix: str, found: list[CrosstuneError]) -> Any:
    """One dataclass. Its check stops at its first fault: that key is set back to its default to find the next one."""
    defaults = {f.name: f for f in fields(schema)}
    while True:
        try:
            return schema(**values)
        except CrosstuneError as fault:
            if fault.where not in {other.where for other in found}:
                found.append(fault)
            key = fault.where.removeprefix(prefix)
            if key not in values:
                return None
            if key not in defaults:
                return None
            del values[key], defaults[key]
