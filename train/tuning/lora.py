"""LoRA through peft."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from configs.errors import ConfigError
from configs.schema.tuning import LoraConfig
from train.models.families import Family
from train.tuning.base import Note, Tuning, quiet
from train.tuning.targets import KEY, Targets, resolve


class LoraTuning(Tuning):
    """Low-rank adapters beside linear modules and on stacked expert weights (Hu et al. 2021, arXiv:2106.09685)."""

    name = "lora"

    def __init__(self, cfg: LoraConfig) -> None:
        self.cfg = cfg

    def apply(self, model: nn.Module, family: Family, note: Note = quiet) -> nn.Module:
        """The model with adapters, everything else frozen.

        Raises:
            ConfigError: a target means nothing on this model, `first_layer` leaves none, or dropout cannot be had.
        """
        from peft import get_peft_model

        targets = resolve(model, family, self.cfg.targets, self.cfg.first_layer)
        if targets.parameters and self.cfg.dropout:
            raise ConfigError(
                "tuning.dropout",
                f"{self.cfg.dropout:g}, but {len(targets.parameters)} targets are adapted as whole weights, where no "
                f"input can be dropped: {targets.parameters[0]}",
                allowed="0 with these targets",
                remedy="tuning.dropout=0",
            )
        config = peft_config(self.cfg, targets.modules, targets.parameters)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # notes to peft's authors
            # The engine keeps fp32 masters of whatever trains: the adapters stay in the working dtype like the base.
            adapted: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
        _require_intent(adapted, targets)
        for line in targets.describe():
            note(f"lora: {line}")
        return adapted


def peft_config(cfg: LoraConfig, modules: Sequence[str], parameters: Sequence[str] = ()) -> Any:
    """The same adapters as peft describes them."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=list(modules),
        target_parameters=list(parameters) or None,
        task_type="CAUSAL_LM",
    )


def adapted_weights(module: nn.Module) -> set[str]:
    """Names of the base model's weights that have an adapter in a module that peft wrapped."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    found = set()
    for path, layer in module.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
        found.add(f"{plain}.{layer.parameter_name if isinstance(layer, ParamWrapper) else 'weight'}")
    return found


def _require_intent(adapted: nn.Module, targets: Targets) -> None:
    """Peft reads targets its own way on some families; what it made is held against what was meant.

    Raises:
        ConfigError: it adapted more, or less.
    """
    meant, made = {w.name for w in targets.weights}, adapted_weights(adapted)
    if meant != made:
        raise ConfigError(
            KEY,
            f"peft adapted {len(made - meant)} weights that were not meant and left out {len(meant - made)}: "
            + ", ".join(sorted(meant ^ made)[:5]),
            remedy="please report this with the model's config.json; other targets may work",
        )
