"""Several runs that differ in a few settings: ``crosstune launch train --multirun optim.lr=1e-4,2e-4 seed=0,1``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from configs.errors import ConfigError
from configs.schema.launch import LaunchConfig
from configs.schema.roots import TrainConfig
from launchers.run_dir import with_run_dir

PORTS_PER_RUN, PORT_RANGES = 10, 300
"""Runs of a sweep may share a machine at the same time: each has ports of its own for its first attempts."""
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


def configs_of(words: Sequence[str], compose: Callable[[list[str]], TrainConfig]) -> list[TrainConfig]:
    """The config of each run; their folders are numbered below that of the sweep, which says what each of them is.

    Args:
        words: overrides of the step, see `expand`.
        compose: from one run's words to its config.

    Raises:
        ConfigError: see `expand`.
        CrosstuneError: a run's config is at fault.
    """
    runs = expand(words)
    if len({key_value for run in runs for key_value in run if key_value.startswith("run_dir=")}) > 1:
        raise ConfigError("run_dir", "several values", remedy="one: the runs' folders are numbered below it")
    first = compose(runs[0])
    parent = Path(str(with_run_dir(replace(first, name=f"{first.name}-sweep")).run_dir))
    configs = [replace(compose(run), run_dir=str(parent / f"{number:03}")) for number, run in enumerate(runs)]
    for number, run in enumerate(runs):
        print(f"{parent / f'{number:03}'}: {' '.join(swept(words, run))}")
    return configs


def swept(words: Sequence[str], run: Sequence[str]) -> list[str]:
    """Of one run's words those that the sweep chose."""
    return [each for word, each in zip(words, run, strict=True) if word != each]


def with_own_port(options: LaunchConfig, number: int) -> LaunchConfig:
    """The launch of a sweep's run: its rendezvous port counted on from that of the first, if that was named."""
    first = options.master_port
    port = 1024 + (first - 1024 + PORTS_PER_RUN * (number % PORT_RANGES)) % (65001 - 1024)
    return replace(options, master_port=port) if first else options
