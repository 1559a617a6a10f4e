"""The story of `crosstune prep`, and of looking at data before (``--dry-run``) and afterwards (``inspect``)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, ErrorGroup, nearest, raise_all

if TYPE_CHECKING:
    from configs.schema.roots import PrepConfig
    from data_prep.inspect import Wanted
    from data_prep.prepare import Prepared

INSPECT_KEYS = {"n": "n", "split": "split", "id": "id", "rejects": "rejects", "model.path": "model"}
"""Key of `crosstune prep inspect` -> field of `Wanted`."""


def prep(cfg: PrepConfig) -> dict[str, Any]:
    """`crosstune prep`: raw records -> prepared data."""
    from launchers.accelerator import choose_accelerator
    from launchers.stages import Stages
    from launchers.steps import model_folder, prepared_data

    stages = Stages(2)
    choose_accelerator("cpu")
    model_dir = model_folder(cfg, stages)
    prepared = prepared_data(cfg, model_dir, stages, out=Path(cfg.out).expanduser() if cfg.out else None, whole=True)
    for line in next_commands(prepared, model_dir):
        stages.line(line)
    stages.end(f"prepared data: {prepared.path}")
    return {"prepared": str(prepared.path), "reused": prepared.reused}


def dry_run(cfg: PrepConfig) -> dict[str, Any]:
    """`crosstune prep --dry-run`: what a preparation would do, and the exit code it would have."""
    from rich.console import Console

    from configs.errors import EXIT_DONE
    from data_prep import manifest
    from launchers.accelerator import choose_accelerator
    from launchers.failure import as_json

    path = getattr(cfg.dataset, "path", None)
    if path and manifest.is_prepared(folder := Path(path).expanduser()):
        print(
            f"{folder} is prepared data and would be used as it is: crosstune prep inspect {shlex.quote(str(folder))}"
        )
        return {"prepared": str(folder)}
    choose_accelerator("cpu")
    from train.models.load import ensure_model

    model_dir = ensure_model(cfg.model, Path(cfg.cache_dir).expanduser(), on_note=print, write=False)
    from data_prep.dry_run import dry_run as look_ahead

    found = look_ahead(cfg, model_dir)
    found.show(Console())
    if not found.faults:
        print("\nnothing was written; without --dry-run the data would be prepared")
        return {**found.to_json(), "exit_code": EXIT_DONE}
    fault = found.faults[0] if len(found.faults) == 1 else ErrorGroup(found.faults)
    print(f"\na preparation would stop:\n{fault.render()}", file=sys.stderr)
    return {**found.to_json(), **as_json(fault)}


def next_commands(prepared: Prepared, model_dir: Path) -> list[str]:
    """What to type after a preparation: to look at the samples, and to train on them if they can be."""
    folder = shlex.quote(str(prepared.path))
    lines = [f"look:  crosstune prep inspect {folder}"]
    if prepared.manifest.get("kind", "samples") != "samples":
        return lines
    from configs.schema.roots import TrainConfig

    longest = prepared.manifest["splits"]["train"]["max_length"]
    needed = [
        f" {key}={longest}" for key in ("max_length", "micro_batch_tokens") if longest > getattr(TrainConfig, key)
    ]
    model = shlex.quote(str(model_dir))
    return [*lines, f"train: crosstune train model.path={model} dataset.path={folder}{''.join(needed)}"]


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
    raise_all(faults)
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
