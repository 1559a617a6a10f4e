"""The whole model for plain transformers: base and training joined, tensor by tensor.

Peak memory is one tensor and its update. Not covered: families whose weight files use other names than their
modules do (some mixtures of experts); they are refused by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointError, ModelError
from configs.schema.model import Precision
from configs.schema.outputs import ExportConfig
from train.export.tensors import Planned, Stored, stored_tensors, write_model
from train.export.trained import LoraPair, Trained

COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
"""What of a model folder goes along with the weights."""

Note = Callable[[str], None]


def write_merged(trained: Trained, cfg: ExportConfig, folder: Path, on_note: Note) -> None:
    """Fills `folder` with weights, config, tokenizer and chat template.

    Raises:
        CheckpointError: a trained parameter has no place in the base model.
        ModelError: the base cannot be read or has changed, or an adapted weight is not stored on its own.
    """
    base_dir = trained.base_dir
    trained.record.refuse_changed_base(base_dir)
    config = json.loads((base_dir / "config.json").read_text())
    dtype = trained.working_dtype
    if cfg.precision is not Precision.auto:
        dtype = {Precision.bf16: torch.bfloat16, Precision.fp32: torch.float32}[cfg.precision]
    stored = stored_tensors(base_dir)
    if trained.is_lora:
        planned = _plan_lora(trained, stored, dtype)
    else:
        planned = _plan_full(trained, stored, dtype, on_note)
    copy_along(base_dir, folder, trained.cfg.template.path)
    write_model(folder, planned, int(cfg.shard_gib * 2**30))
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(_with_dtype({**config, "dtype": name}, name), indent=2) + "\n")


def _plan_lora(trained: Trained, stored: dict[str, Stored], dtype: torch.dtype) -> list[Planned]:
    """The base's tensors, the adapted ones with their update added."""
    pairs = {f"{module}.weight": pair for module, pair in trained.pairs.items()}
    places = _places(pairs, stored, trained.checkpoint)
    update_of = {places[name]: pair for name, pair in pairs.items()}

    def merged(tensor: Stored, pair: LoraPair) -> torch.Tensor:
        # The base is rounded first, as it was while the adapter trained on top of it.
        weight = tensor.read().to(trained.working_dtype).float()
        delta = trained.delta(pair)
        if delta.shape != weight.shape:
            raise CheckpointError(
                str(trained.checkpoint),
                f"the update of {tensor.name} has shape {list(delta.shape)}, the base {list(weight.shape)}",
                remedy="the base model is not the one that was trained",
            )
        return weight.add_(delta).to(dtype)

    planned = []
    for name, tensor in stored.items():
        if name in update_of:
            planned.append(Planned(name, tensor.shape, dtype, lambda t=tensor: merged(t, update_of[t.name])))  # type: ignore[misc]
        else:
            planned.append(_copied(tensor, trained.working_dtype, dtype))
    return planned


def _plan_full(trained: Trained, stored: dict[str, Stored], dtype: torch.dtype, on_note: Note) -> list[Planned]:
    """The trained tensors in the place of the base's."""
    entries = trained.reader.params
    places = _places(entries, stored, trained.checkpoint)
    name_of = {place: name for name, place in places.items()}
    for place, name in name_of.items():
        if stored[place].shape != entries[name].shape:
            raise CheckpointError(
                str(trained.checkpoint),
                f"{name} has shape {list(entries[name].shape)}, the base {list(stored[place].shape)}",
                remedy="the base model is not the one that was trained",
            )
    read = trained.reader.read
    planned, untouched = [], []
    for place, tensor in stored.items():
        if place in name_of:
            planned.append(Planned(place, tensor.shape, dtype, lambda n=name_of[place]: read(n).to(dtype)))  # type: ignore[misc]
        elif place.endswith("lm_head.weight"):
            continue  # all weights trained, so it is the embedding's, trained under that name: this copy is out of date
        else:
            untouched.append(place)
            planned.append(_copied(tensor, trained.working_dtype, dtype))
    if untouched:
        on_note(f"{len(untouched)} tensors did not train and are the base's: {', '.join(untouched[:5])}")
    return planned


def _copied(tensor: Stored, working: torch.dtype, dtype: torch.dtype) -> Planned:
    """A tensor of the base in the number format of the export; whole numbers stay as they are."""
    if not tensor.dtype.is_floating_point:
        return Planned(tensor.name, tensor.shape, tensor.dtype, tensor.read)
    return Planned(tensor.name, tensor.shape, dtype, lambda: tensor.read().to(working).to(dtype))


def _places(names: Collection[str], stored: Collection[str], checkpoint: Path) -> dict[str, str]:
    """Trained name -> name in the base's files; old files leave out the model's outermost module.

    Raises:
        ModelError: some trained weight has no place of its own there.
    """
    places = {}
    for name in names:
        inner = name.partition(".")[2]
        places[name] = name if name in stored else inner if inner in stored else ""
    lost = sorted(name for name, place in places.items() if not place)
    if lost:
        raise ModelError(
            "export.merged",
            f"{len(lost)} trained weights of {checkpoint} are not stored on their own in the base model: "
            + ", ".join(lost[:5]),
            remedy="export.merged=false writes the adapter alone; a tied lm_head is better left out of tuning.targets",
        )
    assert len(set(places.values())) == len(places), "two trained names for one stored tensor"
    return places


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The config with every mention of the number format set right, in parts of the model too."""
    fixed: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            fixed[key] = name
        else:
            fixed[key] = _with_dtype(value, name) if isinstance(value, dict) else value
    return fixed


def copy_along(base_dir: Path, folder: Path, template: str | None, patterns: Collection[str] = COPIED) -> None:
    """Copies tokenizer, template and configs of the base; a template that the run was given replaces the base's."""
    for pattern in patterns:
        for path in base_dir.glob(pattern):
            if not path.name.endswith(".index.json") and path.name != "provenance.json":
                shutil.copyfile(path, folder / path.name)
    if template:
        shutil.copyfile(Path(template).expanduser(), folder / "chat_template.jinja")
