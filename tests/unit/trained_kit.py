"""A run of a tiny model of any family as a training leaves it, without the training: weights are moved at random."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from configs.compose import build, compose, save_resolved
from configs.schema.device import DeviceConfig
from configs.schema.optim import AdamWConfig
from configs.schema.sharding import PlainConfig
from tests.tiny_families import save as save_family
from train.checkpoint.layout import TrainerState
from train.checkpoint.save import save
from train.devices.cpu import CpuDevice
from train.engine.base import World
from train.engine.plain import PlainEngine
from train.models.families import family_of
from train.models.load import load_model
from train.run_folder import RunFolder, RunRecord, sha256_of
from train.tuning.base import Tuning

NEXT_TOKENS = {
    # Each family's own way to name the layers that guess the token after the next, which transformers does not have.
    "deepseek_v3": "model.layers.3.",
    "deepseek_v32": "model.layers.3.",
    "glm4_moe": "model.layers.3.",
    "glm_moe_dsa": "model.layers.4.",
    "bailing_hybrid": "model.layers.4.",
    "kimi_k25": "language_model.model.layers.3.",
    "deepseek_v4": "mtp.0.",
}
HUB_NAMES = {
    # save_pretrained writes other names than these folders have on the hub, and reads both.
    "deepseek_v4": (
        (r"^model\.embed_tokens\.", "embed."),
        (r"^model\.hc_head\.hc_", "hc_head_"),
        (r"^model\.", ""),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    ),
    "kimi_k25": ((r"^language_model\.model\.blocks\.", "language_model.model.layers."), (r"^model\.mm_", "mm_")),
}
FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)


def save_base(name: str, folder: Path) -> Path:
    """A folder as on the hub: in its layout, with weights that transformers does not load, and a processor's files."""
    save_family(name, folder)
    file = folder / "model.safetensors"
    prefix = NEXT_TOKENS.get(name, "mtp.layers.0.")
    torch.manual_seed(7)
    extra = {f"{prefix}eh_proj.weight": torch.randn(4, 6), f"{prefix}mlp.experts.0.up_proj.weight": torch.randn(3, 5)}
    stored = {_hub_name(name, key): tensor for key, tensor in load_file(file).items()}
    save_file(stored | extra | {f"{prefix}norm.weight": torch.randn(6).bfloat16()}, file, {"format": "pt"})
    for other in FILES:
        if not (folder / other).is_file():
            (folder / other).write_text("{}")
    return folder


def _hub_name(family: str, name: str) -> str:
    for pattern, other in HUB_NAMES.get(family, ()):
        name = re.sub(pattern, other, name)
    return name


def trained_run(folder: Path, name: str, *overrides: str, base: Path | None = None) -> tuple[RunFolder, Any]:
    """A run below `folder`, of which one checkpoint is there, and the module that it holds, in evaluation mode."""
    model_dir = base or save_base(name, folder / "model")
    run = RunFolder(folder / "run")
    run.path.mkdir(parents=True)
    typed = [f"model.path={model_dir}", f"dataset.path={folder}", f"run_dir={run.path}", "device=cpu"]
    cfg = compose("train", [*typed, "model.precision=fp32", "max_steps=1", *overrides])
    model = load_model(model_dir, dtype=torch.float32)
    module = build(cfg.tuning, Tuning).apply(model, family_of(model.config))
    torch.manual_seed(1)
    with torch.no_grad():
        for path, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1 if ".lora_" in path else 0.02)
    save_resolved(cfg, run.resolved)
    write_record(run, model_dir, cfg.tuning._target_)
    checkpoint(run, module)
    return run, module.eval()


def write_record(run: RunFolder, model_dir: Path, tuning: str) -> None:
    """`run.json` of such a run."""
    kept = [p for p in model_dir.iterdir() if p.suffix in (".json", ".safetensors", ".jinja")]
    run.write_record(
        RunRecord(
            model_dir=str(model_dir),
            model_sha256={p.name: sha256_of(p) for p in kept},
            prepared=str(run.path / "none"),
            manifest_sha256="",
            precision="fp32",
            engine="PlainEngine",
            world_size=1,
            tuning="lora" if "lora" in tuning else "full",
            code_version="0",
            total_steps=1,
        )
    )


def checkpoint(run: RunFolder, module: Any) -> None:
    """Saves what trains of `module`."""
    device = CpuDevice(DeviceConfig(threads=1))
    built = PlainEngine(
        PlainConfig(), module, optim=AdamWConfig(), device=device, world=World(), working_dtype=torch.float32
    )
    save(built, run.checkpoints, TrainerState(1, epoch=0, samples_seen=1, tokens_seen=1, seed=0), World())
