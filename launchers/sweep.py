"""Several runs that differ in a few settings: ``crosstune launch train --multirun optim.lr=1e-4,2e-4 seed=0,1``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from configs.errors import ConfigError

MOST_RUNS = 1000
"""A slip such as range(1e6) must not reach a scheduler."""


def expand(words: Sequence[str]) -> list[list[str]]:
    """The overrides of each run, in Hydra's order: the last word's values change fastest.

    Args:
        words: overrides; lists of choices (``a=1,2``), ``range(...)``, ``choice(...)`` and ``glob(...)`` of options are
            sweeps, as with Hydra's own ``--multirun`` (https://hydra.cc/docs/tutorials/basic/running_your_app/multi-run).

    Raises:
        ConfigError: nothing is swept over, or there would be too many runs.
    """
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for word in words:
        try:
            parsed = parser.parse_overrides([word])[0]
        except HydraException:  # whatever is wrong with it is told when the config is composed
            choices.append([word])
            continue
        if parsed.is_sweep_override():
            key = word.partition("=")[0]
            choices.append([f"{key}={value}" for value in parsed.sweep_string_iterator()])
        else:
            choices.append([word])
    runs = 1
    for each in choices:
        runs *= len(each)
    if runs == 1:
        raise ConfigError("--multirun", "no word has several values", remedy="such as optim.lr=1e-4,2e-4")
    if runs > MOST_RUNS:
        raise ConfigError("--multirun", f"{runs:,} runs", allowed=f"up to {MOST_RUNS:,}")
    return [list(run) for run in product(*choices)]


def swept(words: Sequence[str], run: Sequence[str]) -> list[str]:
    """Of one run's words those that the sweep chose."""
    return [each for word, each in zip(words, run, strict=True) if word != each]
