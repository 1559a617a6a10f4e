"""From the user's config to that of a proof's runs; whatever is changed on the way is listed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.compose import amend
from configs.errors import ModelError
from configs.schema.prove import LAYOUT, ProveConfig, as_config_of
from configs.schema.roots import TrainConfig
from configs.schema.tuning import LoraConfig


@dataclass(frozen=True)
class Change:
    """One key that the proof's runs have otherwise than the user's config."""

    key: str
    before: Any
    after: Any
    why: str

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)} ({self.why})"


def _shown(value: Any) -> str:
    return "null" if value is None else str(getattr(value, "value", value))


@dataclass
class Setting:
    """What a proof's runs have in common."""

    train: TrainConfig
    changes: list[Change] = field(default_factory=list)

    def change(self, key: str, after: Any, why: str) -> None:
        """Sets ``key`` or ``group.key`` and lists it, if that changes anything."""
        group, _, name = key.rpartition(".")
        owner: Any = getattr(self.train, group) if group else self.train
        before = getattr(owner, name)
        if before == after:
            return
        changed = replace(owner, **{name: after})
        self.train = replace(self.train, **{group: changed}) if group else changed
        self.changes.append(Change(key, before, after, why))


def setting_of(cfg: ProveConfig, *, steps: int, every: int) -> Setting:
    """The user's config as that of a run of `steps` steps with a checkpoint every so many."""
    setting = Setting(as_config_of(TrainConfig, cfg))
    # First, since the number of checkpoints that are due may contradict the figure that the best are told by.
    setting.change("checkpoint.keep_best", 0, "of no matter here")
    setting.change("checkpoint.every", every, "some in a short run")
    setting.change("checkpoint.keep_every", 0, "of no matter here")
    setting.change("guard.stop_after_minutes", 0, "the proof's runs go to their end")
    setting.change("max_steps", steps, "a short run")
    if cfg.shrink:
        length = setting.train.max_length
        setting.change("micro_batch_tokens", min(setting.train.micro_batch_tokens, length), "shrink")
        setting.change("batch_tokens", min(setting.train.batch_tokens, 4 * length), "shrink")
    return setting


def under_layout(cfg: TrainConfig, name: str, config_dir: Path | None) -> TrainConfig:
    """The config with the sharding and the processes of ``zero3x4``.

    Raises:
        ConfigError: there is no such option of the sharding group.
    """
    return amend(cfg, layout_words(name), config_dir=config_dir)


def layout_words(name: str) -> list[str]:
    """``zero3x4`` as overrides."""
    match = LAYOUT.fullmatch(name)
    assert match is not None, name
    return [f"sharding={match[1]}", f"nproc={match[2]}"]


def layout_name(cfg: TrainConfig) -> str:
    """Sharding and processes of a config in short: ``zero2_offloadx2``."""
    values = asdict(cfg.sharding)
    name = f"zero{values['stage']}" if "stage" in values else "plain"
    more = ("_offload" if values.get("offload_optimizer") else "") + ("*" if values.get("deepspeed") else "")
    return f"{name}{more}x{cfg.nproc}"


def choose_model(setting: Setting, cfg: ProveConfig, model_dir: Path, work: Path, *, quiet: bool) -> None:
    """Puts the model that the proof's runs take in the place of the user's, where it has to be another.

    Args:
        setting: changed in place.
        cfg: of the command.
        model_dir: the user's model.
        work: folder of the proof's own.
        quiet: nothing random may be in the forward pass: ranks draw masks of their own.

    Raises:
        ModelError: config.json is damaged, or the layers are not found among the weights.
        ConfigError: the config does not say how many layers there are.
    """
    from train.prove.cut import cut_model, noise_of, with_config

    try:
        content = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(model_dir / "config.json"), f"not JSON: {error}") from None
    why = "masks are drawn on each rank, so other ranks have others"
    if quiet and isinstance(setting.train.tuning, LoraConfig):
        setting.change("tuning.dropout", 0.0, why)
    noise = noise_of(content) if quiet else {}
    before = str(setting.train.model.path)
    content |= dict.fromkeys(noise, 0.0)
    if cfg.shrink:
        from launchers.doctor.portability.shrink import shrink

        short, kept = shrink(content, cfg.layers)
        folder = work / "model"
        cut_model(model_dir, folder, short, kept.kept, kept.total)
        what = f"layers {', '.join(map(str, kept.kept))} of {kept.total}, with their weights"
        after = f"{before}, {what}"
        if isinstance(setting.train.tuning, LoraConfig):
            setting.change("tuning.first_layer", min(setting.train.tuning.first_layer, cfg.layers - 1), "shrink")
        setting.changes.append(Change("model", before, after, "shrink"))
    elif noise:
        folder = work / "model"
        with_config(model_dir, folder, content)
    else:
        return
    setting.changes += [Change(f"config.json: {key}", value, 0.0, why) for key, value in noise.items()]
    model = replace(setting.train.model, path=str(folder), gguf_package=None, revision=None)
    setting.train = replace(setting.train, model=model)
