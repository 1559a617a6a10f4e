"""A model without weights, as a run would train it, and its traced passes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.compose import build
from configs.errors import ModelError, first_line
from configs.schema.device import KernelChoice
from configs.schema.roots import TrainConfig
from configs.schema.sharding import ZeroConfig
from train.data.plan import RowKind
from train.devices.base import Device
from train.models.classes import from_config, keeping_small_parts_in_fp32, model_class
from train.models.families import Family, family_of
from train.models.load import load_config
from train.models.recompute import recompute_activations
from train.models.short_rows import always_compress
from train.objectives.base import Objective
from train.ops.kernel import Needs
from train.ops.lora_linear import fuse_adapters
from train.ops.packed_attention import register
from train.ops.packed_mixers import attention_for_packing, wrap_mixers
from train.ops.replace import another_formula, layers_of, replace
from train.plan.trace import Event, Pass, Shape, trace
from train.tuning.base import Tuning, quiet

CPU = torch.device("cpu")


class Model:
    """A model without weights, as the run would train it.

    Args:
        cfg: of the run.
        model_dir: folder with config.json.
        host: the device, where it is a CPU: its versions of ops run without values, too.

    Raises:
        ModelError: transformers cannot build it.
        ConfigError: the tuning method does not fit it.
    """

    def __init__(self, cfg: TrainConfig, model_dir: Path, host: Device | None = None) -> None:
        self.cfg, self.model_dir, self._host = cfg, model_dir, host
        trusted = cfg.model.trust_remote_code
        self.config = load_config(model_dir, trust_remote_code=trusted)
        self.family: Family = family_of(self.config, trust_remote_code=trusted)
        self._passes: dict[tuple[Any, ...], Pass] = {}
        self.optimizers: dict[tuple[Any, ...], tuple[list[Event], list[Event]]] = {}
        """Steps of the run's optimizer, by what it steps."""
        self._modules: dict[tuple[torch.dtype, bool, int], nn.Module] = {}
        self._objectives: dict[nn.Module, Objective] = {}
        self.shapes: dict[str, torch.Size] = {}
        """Of the base model's weights, by name."""

    def module(self, dtype: torch.dtype, *, packed: bool, recompute: int) -> nn.Module:
        """It, on the meta device, in training mode; `recompute`: see `TrainConfig.recompute_every`."""
        key = (dtype, packed, recompute)
        if key not in self._modules:
            self._modules[key] = self._build(*key)
        return self._modules[key]

    def _build(self, dtype: torch.dtype, packed: bool, recompute: int) -> nn.Module:
        trusted = self.cfg.model.trust_remote_code
        attention = attention_for_packing(self.family) if packed else "sdpa"
        try:
            with torch.device("meta"):
                model = from_config(self.config, dtype=dtype, attention=attention, trust_remote_code=trusted)
        except (ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
            raise ModelError(
                str(self.model_dir / "config.json"),
                f"no model can be built from it: {first_line(error) or type(error).__name__}",
            ) from None
        if dtype != torch.float32:
            _keep_in_fp32(model, model_class(self.config, trust_remote_code=trusted))
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        model.config.use_cache = False
        if packed:
            wrap_mixers(model, self.family)
        module = build(self.cfg.tuning, Tuning).apply(model, self.family)
        always_compress(model)
        objective = self._objectives[module] = build(self.cfg.objective, Objective)
        objective.choose(module, quiet, on_host=self._host is not None)
        if not (isinstance(self.cfg.sharding, ZeroConfig) and self.cfg.sharding.stage == 3):
            fuse_adapters(module, on_host=self._host is not None)
        self._put_kernels(model, dtype, packed)
        recompute_activations(model, recompute)
        return module.train()

    def _put_kernels(self, model: Any, dtype: torch.dtype, packed: bool) -> None:
        """What a run takes of the host's, as `KernelSelection` chooses; that they agree is left to the run."""
        if self.family.layers is None or self._host is None:
            return
        for op, kernel in self._host.kernels(dtype).items():
            if self.cfg.device.kernel_choice(op) is KernelChoice.reference or kernel.unmet(Needs.of(model)):
                continue
            if op == "attention":
                if packed:
                    model.set_attn_implementation(register(self._host.name, kernel))
                continue
            found = layers_of(op, model, self.family.layers)
            if found and not another_formula(op, found, dtype, CPU):
                replace(op, found, kernel)

    @property
    def vocabulary(self) -> int:
        """Words that the head scores."""
        return int(self.config.get_text_config().vocab_size)

    def traced(self, dtype: torch.dtype, shape: Shape, *, recompute: int) -> Pass:
        """One micro-batch; kept, since engines share it.

        Raises:
            RuntimeError: or another error; a layer asks for values, which nobody has here.
        """
        key = (dtype, shape, recompute)
        if key not in self._passes:
            module = self.module(dtype, packed=shape.kind is RowKind.packed, recompute=recompute)
            objective = self._objectives[module]
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # notes to its authors
            self._passes[key] = trace(module, objective.loss_sum, shape, self.vocabulary)
        return self._passes[key]


def _keep_in_fp32(model: nn.Module, chosen: Any) -> None:
    """What loading keeps in fp32, which building from a config does not: names that a pattern is found in."""
    patterns: set[str] = set()
    for owner in (model, keeping_small_parts_in_fp32(chosen)):
        patterns |= set(getattr(owner, "_keep_in_fp32_modules_strict", None) or ())
    found = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, parameter in model.named_parameters():
        if patterns and found.search(name):
            parameter.data = parameter.data.float()
