"""LoRA through peft."""

from __future__ import annotations

from typing import Any

from torch import nn

from configs.errors import ConfigError, nearest
from configs.schema.tuning import LoraConfig
from train.models.families import Family
from train.tuning.base import Tuning


class LoraTuning(Tuning):
    """Low-rank adapters beside linear modules (Hu et al. 2021, arXiv:2106.09685)."""

    name = "lora"

    def __init__(self, cfg: LoraConfig) -> None:
        self.cfg = cfg

    def apply(self, model: nn.Module, family: Family) -> nn.Module:
        """The model with adapters, everything else frozen.

        Raises:
            ConfigError: a target names no linear module, or `first_layer` leaves none.
        """
        from peft import get_peft_model

        modules = self.target_modules(model, family)
        # The engine keeps fp32 masters of whatever trains: the adapters stay in the working dtype like the base.
        adapted: nn.Module = get_peft_model(model, peft_config(self.cfg, modules), autocast_adapter_dtype=False)
        return adapted

    def target_modules(self, model: nn.Module, family: Family) -> list[str]:
        """Full names of the linear modules that get an adapter."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        last_names = sorted({name.rsplit(".", 1)[-1] for name in linear})
        targets = self.cfg.targets or list(family.lora_targets or last_names)
        for target in self.cfg.targets:
            if target not in last_names:
                near = nearest(target, last_names)
                raise ConfigError(
                    "tuning.targets",
                    f"'{target}' is no linear module of this model" + (f"; did you mean '{near}'?" if near else ""),
                    allowed=", ".join(last_names),
                )
        chosen = [n for n in linear if n.rsplit(".", 1)[-1] in targets and self._layer(n) >= self.cfg.first_layer]
        if not chosen:
            raise ConfigError(
                "tuning.first_layer",
                f"{self.cfg.first_layer} leaves no module to adapt",
                allowed=f"below {1 + max((self._layer(n) for n in linear), default=0)}",
            )
        return chosen

    @staticmethod
    def _layer(name: str) -> int:
        """Index of the layer that a module lies in; modules outside the stack count as above it."""
        return next((int(part) for part in name.split(".") if part.isdigit()), 1 << 30)


def peft_config(cfg: LoraConfig, modules: list[str]) -> Any:
    """The same adapters as peft describes them."""
    from peft import LoraConfig as PeftLoraConfig

    return PeftLoraConfig(
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
