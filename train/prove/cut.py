"""Some layers of a model, with their weights, as a model folder of its own; and models without dropout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import ModelError
from train.export.tensors import Planned, Stored, stored_tensors, write_model

NUMBERED = re.compile(r"(.*?)\.(\d+)\.(.*)")
"""A tensor in the first numbered list of its path: ``model.layers``, 3, ``mlp.experts.5.w1.weight``."""
SHARD_BYTES = 4 * 2**30
NOISE = ("drop", "jitter")
"""In the names of config values that make a forward pass random."""


def cut_model(model_dir: Path, out: Path, config: Mapping[str, Any], kept: Sequence[int], total: int) -> None:
    """Writes a model of the layers `kept`; at most one tensor is in memory at a time.

    Args:
        model_dir: the whole model.
        out: folder to make.
        config: content of the cut model's config.json.
        kept: numbers of layers, ascending; they are counted from 0 in the new model.
        total: layers of the whole model; lists of any other length are no layers and stay whole.

    Raises:
        ModelError: no list of `total` layers is among the weights.
    """
    tensors = stored_tensors(model_dir)
    lists = _layer_lists(tensors, total)
    if not lists:
        raise ModelError(str(model_dir), f"no list of {total} layers among its weights", remedy="shrink=false")
    planned = []
    for name, stored in tensors.items():
        match = NUMBERED.fullmatch(name)
        if match is None or match[1] not in lists:
            planned.append(_planned(name, stored))
        elif int(match[2]) in kept:
            planned.append(_planned(f"{match[1]}.{kept.index(int(match[2]))}.{match[3]}", stored))
    copy_small_files(model_dir, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_model(out, planned, SHARD_BYTES)


def _layer_lists(tensors: Mapping[str, Stored], total: int) -> set[str]:
    numbers: dict[str, set[int]] = {}
    for name in tensors:
        if match := NUMBERED.fullmatch(name):
            numbers.setdefault(match[1], set()).add(int(match[2]))
    return {prefix for prefix, found in numbers.items() if found >= set(range(total))}


def _planned(name: str, stored: Stored) -> Planned:
    read: Callable[[], Any] = stored.read
    return Planned(name, stored.shape, stored.dtype, read)


def copy_small_files(model_dir: Path, out: Path) -> None:
    """Config, tokenizer, template and code, without the weights; makes the folder."""
    out.mkdir(parents=True)
    for file in model_dir.iterdir():
        if (
            file.is_file()
            and file.suffix in (".json", ".jinja", ".model", ".txt", ".py")
            and ".index." not in file.name
        ):
            shutil.copyfile(file, out / file.name)


def noise_of(config: Mapping[str, Any]) -> dict[str, float]:
    """The config's own values that make a forward pass random, such as ``attention_dropout``."""
    return {
        key: value
        for key, value in config.items()
        if any(word in key for word in NOISE) and isinstance(value, float) and value > 0
    }


def with_config(model_dir: Path, out: Path, config: Mapping[str, Any]) -> None:
    """A folder of the same model with another config.json; its weights are links to the original ones."""
    copy_small_files(model_dir, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in (*model_dir.glob("*.safetensors"), *model_dir.glob("*.safetensors.index.json")):
        (out / file.name).symlink_to(file.resolve())
