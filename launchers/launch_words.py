"""The words of `crosstune launch`: those of the launch itself, told from those of the step that is launched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from configs.errors import ConfigError, CrosstuneError, nearest, raise_all
from configs.groups import EXPERIMENT, ROOTS, groups_of
from configs.schema.launch import LaunchConfig

OPTIONS_OF_LAUNCH = frozenset(f.name for f in fields(LaunchConfig))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides of the launch, and those of the step that is launched."""
    ours: list[str] = []
    theirs: list[str] = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
        (ours if key in OPTIONS_OF_LAUNCH else theirs).append(word)
    return ours, theirs


def check_words(command: str, words: Sequence[str], options: LaunchConfig) -> None:
    """Words that neither have, and that are nearer to a key of the launch than to one of the step.

    Args:
        command: the step's.
        words: those that are no launch's.
        options: of the launch.

    Raises:
        ConfigError: one.
        ErrorGroup: several.
    """
    known = [*(f.name for f in fields(ROOTS[command])), *groups_of(command), EXPERIMENT]
    inner = {f.name: group for group in ("launcher", "cluster") for f in fields(getattr(options, group))}
    found: list[CrosstuneError] = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
        if key in known:
            continue
        longer = [name for name in OPTIONS_OF_LAUNCH if name.startswith(f"{key}_")]
        meant = (
            f"{inner[key]}.{key}" if key in inner else (longer or [nearest(key, [*OPTIONS_OF_LAUNCH, *known]) or ""])[0]
        )
        if meant and meant not in known:
            neither = f"no key of `crosstune launch`, nor of `crosstune {command}`"
            found.append(ConfigError(key, neither, remedy=f"did you mean {meant}=...?"))
    raise_all(found)
