"""The LoRA adapter in peft's own format: ``peft.PeftModel.from_pretrained(base, folder)`` opens it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from configs.errors import CheckpointError
from configs.schema.model import HUB_PREFIX
from train.export.layout import skeleton
from train.export.merged import copy_along
from train.export.tensors import Planned, stored_tensors, write_file
from train.export.trained import MODULE_COPY, PEFT_PREFIX, Trained, trained_beside
from train.export.updates import lora_updates, open_skeleton, put_adapter_on
from train.tuning.lora import peft_config

WEIGHTS = "adapter_model.safetensors"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
"""What comes along, so that whoever loads the adapter speaks to it with the template it was trained on."""


def write_adapter(trained: Trained, folder: Path, on_note: Callable[[str], None]) -> dict[str, str]:
    """Fills `folder` with adapter_model.safetensors (fp32 masters), adapter_config.json, tokenizer and template.

    Returns:
        Name of the file with weights -> its SHA-256.

    Raises:
        CheckpointError: the checkpoint's adapter is not the one that the run's config puts on the base, or holds what
            peft has no format for.
    """
    reader = trained.reader
    planned = [
        Planned(peft_key(n), reader.params[n].shape, torch.float32, lambda n=n: reader.read(n))  # type: ignore[misc]
        for n in sorted(reader.params)
    ]
    hashes = {WEIGHTS: write_file(folder / WEIGHTS, planned)}
    model = open_skeleton(trained, on_note)
    config = _plain_config(trained) if model is None else _config_on(model, trained)
    config.modules_to_save = _modules_to_save(trained)
    config.inference_mode = True
    config.base_model_name_or_path, config.revision = _base_of(trained)
    config.save_pretrained(folder)
    written = folder / "adapter_config.json"
    content = json.loads(written.read_text())
    for key in ("target_modules", "target_parameters"):
        if content[key]:
            content[key].sort()  # peft keeps sets, whose order changes from process to process
    written.write_text(json.dumps(content, indent=2) + "\n")
    if model is not None:
        _require_reopened(folder, trained)
    copy_along(trained.base_dir, folder, trained.cfg.template.path, TOKENIZER_FILES)
    return hashes


def peft_key(name: str) -> str:
    """A parameter's name in peft's files, which leave out the adapter's own name."""
    return name.replace(MODULE_COPY, ".").replace(".default.", ".")


def _config_on(model: Any, trained: Trained) -> Any:
    """The adapter as peft describes it, once it is on the skeleton as the training put it there."""
    modules = [name for name, _ in model.named_modules()]
    adapted = put_adapter_on(model, trained)
    lora_updates(trained, adapted)  # refuses another adapter than the checkpoint's
    config = adapted.peft_config["default"]
    config.target_modules = target_modules(config.target_modules, modules)
    config.rank_pattern, config.alpha_pattern = {}, {}
    return config


def _plain_config(trained: Trained) -> Any:
    weights = [name.removesuffix(".weight") for name in stored_tensors(trained.base_dir)]
    return peft_config(trained.lora, target_modules(trained.pairs, weights))


def _base_of(trained: Trained) -> tuple[str, str | None]:
    path = trained.cfg.model.path
    from_hub = path.startswith(HUB_PREFIX)
    return path.removeprefix(HUB_PREFIX) if from_hub else trained.record.model_dir, trained.cfg.model.revision


def _modules_to_save(trained: Trained) -> list[str] | None:
    """Modules that trained whole beside the adapter.

    Raises:
        CheckpointError: single weights did, which peft has no format for.
    """
    beside = trained_beside(trained.reader.params).values()
    bare = [name for name in beside if MODULE_COPY not in name]
    if bare:
        raise CheckpointError(
            str(trained.checkpoint),
            f"{len(bare)} weights trained beside the adapter, which peft has no format for: {', '.join(bare[:5])}",
            remedy="export.adapter=false writes the merged model alone",
        )
    return sorted({name.removeprefix(PEFT_PREFIX).partition(MODULE_COPY)[0] for name in beside}) or None


def _require_reopened(folder: Path, trained: Trained) -> None:
    """Opens the description as peft does, on a fresh skeleton, and compares what is adapted then.

    Peft reads targets its own way on some families.

    Raises:
        CheckpointError: it would put the adapter elsewhere.
    """
    from peft import PeftConfig, get_peft_model

    with torch.device("meta"):
        opened = get_peft_model(skeleton(trained.base_dir), PeftConfig.from_pretrained(folder))
    made = {name for name, _ in opened.named_parameters() if ".lora_" in name or MODULE_COPY in name}
    if made != set(trained.reader.params):
        odd = sorted(made ^ set(trained.reader.params))
        raise CheckpointError(
            str(trained.checkpoint),
            f"peft would open the adapter with {len(odd)} other weights: {', '.join(odd[:5])}",
            remedy="export.adapter=false writes the merged model alone; please report this",
        )


def target_modules(adapted: Collection[str], modules: Collection[str]) -> list[str]:
    """The shortest exact way to say which modules are adapted.

    Last names (``q_proj``), which other tools expect, if they fit nothing else in the model; else full names.
    """
    short = sorted({module.rpartition(".")[2] for module in adapted})
    meant = {module for module in modules if module.rpartition(".")[2] in short}
    return short if meant <= set(adapted) else sorted(adapted)
