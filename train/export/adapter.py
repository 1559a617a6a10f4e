"""The LoRA adapter in peft's own format: ``peft.PeftModel.from_pretrained(base, folder)`` opens it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from configs.schema.model import HUB_PREFIX
from train.export.merged import copy_along
from train.export.tensors import Planned, stored_tensors, write_file
from train.export.trained import LoraPair, Trained

TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
"""What comes along, so that whoever loads the adapter speaks to it with the template it was trained on."""


def write_adapter(trained: Trained, folder: Path) -> None:
    """Fills `folder` with adapter_model.safetensors (fp32 masters), adapter_config.json, tokenizer and template."""
    names = [name for pair in trained.pairs.values() for name in (pair.a, pair.b)]
    reader = trained.reader
    write_file(
        folder / "adapter_model.safetensors",
        [
            Planned(peft_key(n), reader.params[n].shape, torch.float32, lambda n=n: reader.read(n))  # type: ignore[misc]
            for n in names
        ],
    )
    config = peft_config(trained, trained.pairs)
    config.inference_mode = True
    config.save_pretrained(folder)
    written = folder / "adapter_config.json"
    content = json.loads(written.read_text())
    content["target_modules"].sort()  # peft keeps a set, whose order changes from process to process
    written.write_text(json.dumps(content, indent=2) + "\n")
    copy_along(trained.base_dir, folder, trained.cfg.template.path, TOKENIZER_FILES)


def peft_key(name: str) -> str:
    """A factor's name in peft's files, which leave out the adapter's own name."""
    return name.replace(".default.", ".")


def peft_config(trained: Trained, pairs: Mapping[str, LoraPair]) -> Any:
    """The adapter as peft describes it."""
    from peft import LoraConfig

    path, lora = trained.cfg.model.path, trained.lora
    from_hub = path.startswith(HUB_PREFIX)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target_modules(pairs, stored_tensors(trained.base_dir)),
        task_type="CAUSAL_LM",
        base_model_name_or_path=path.removeprefix(HUB_PREFIX) if from_hub else trained.record.model_dir,
        revision=trained.cfg.model.revision,
    )


def target_modules(adapted: Collection[str], weights: Collection[str]) -> list[str]:
    """The shortest exact way to say which modules are adapted.

    Last names (``q_proj``), which other tools expect, if they fit nothing else in the model; else full names.
    """
    short = sorted({module.rpartition(".")[2] for module in adapted})
    meant = {w.removesuffix(".weight") for w in weights if w.removesuffix(".weight").rpartition(".")[2] in short}
    return short if meant <= set(adapted) else sorted(adapted)
