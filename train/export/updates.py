"""What trained, by the names of the model's parameters: weights of their own, or low-rank updates of the base's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from configs.compose import build
from configs.errors import CheckpointError, ModelError
from train.checkpoint.layout import CheckpointReader
from train.export.layout import skeleton
from train.export.trained import PEFT_PREFIX, Trained, lora_pairs, trained_beside
from train.models.families import family_of
from train.tuning.base import Tuning
from train.tuning.lora import peft_config

FACTORS_HELD = 4
"""Pairs of factors in memory: files come back to an expert weight's as often as it has experts."""


@dataclass(frozen=True)
class Master:
    """A parameter that trained itself."""

    name: str
    """In the checkpoint."""


@dataclass(frozen=True)
class Factors:
    """A parameter with an adapter: ``scale * B @ A`` is added (arXiv:2106.09685, section 4.1)."""

    a: str
    """Name in the checkpoint: ``[experts * rank, in]``, an expert's rows beside each other."""
    b: str
    """``[out, rank * experts]``, an expert's columns `experts` apart."""
    scale: float
    stacked: bool = False
    """The parameter has three dimensions, experts first."""
    experts: int = 1
    transposed: bool = False
    """Each expert's weight is ``[in, out]``."""


class Updates:
    """Reads any rows of any update."""

    def __init__(self, reader: CheckpointReader, of: Mapping[str, Master | Factors]) -> None:
        self.of = of
        """Name of the model's parameter -> what trained of it."""
        self._reader = reader
        self._factors = lru_cache(maxsize=FACTORS_HELD)(self._read_factors)

    def adds(self, name: str) -> bool:
        """Whether the update is added to the base, or takes its place."""
        return isinstance(self.of[name], Factors)

    def rows(self, name: str, start: int, stop: int | None) -> torch.Tensor:
        """Rows of the update of a parameter, fp32 ``[rows, ...]``."""
        update = self.of[name]
        if isinstance(update, Factors):
            return self._product(update, start, stop)
        shape = self._reader.params[update.name].shape or (1,)
        wide = torch.Size(shape[1:]).numel()
        out = torch.empty(((shape[0] if stop is None else stop) - start) * wide)
        self._reader.read_into(out, update.name, "master", start * wide)
        return out.view(-1, *shape[1:])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the parameter that is updated."""
        update = self.of[name]
        if isinstance(update, Master):
            return tuple(self._reader.params[update.name].shape)
        wide, high = self._reader.params[update.a].shape[1], self._reader.params[update.b].shape[0]
        one = (wide, high) if update.transposed else (high, wide)
        return (update.experts, *one) if update.stacked else one

    def _product(self, update: Factors, start: int, stop: int | None) -> torch.Tensor:
        a, b = self._factors(update)
        if not update.stacked:
            return torch.mm(b[0, start:stop], a[0])
        product = torch.bmm(b[start:stop], a[start:stop])
        return product.transpose(1, 2) if update.transposed else product

    def _read_factors(self, update: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[experts, rank, in]`` and B ``[experts, out, rank]``, scaled."""
        a, b = self._reader.read(update.a), self._reader.read(update.b)
        a = a.view(update.experts, -1, a.shape[1])
        return a, b.view(b.shape[0], -1, update.experts).permute(2, 0, 1) * update.scale


def full_updates(trained: Trained) -> dict[str, Master | Factors]:
    """Of a run that trained the weights themselves."""
    return {name: Master(name) for name in trained.reader.params}


def lora_updates(trained: Trained, adapted: Any | None) -> dict[str, Master | Factors]:
    """Of a run that trained an adapter, and of what trained beside it.

    Args:
        trained: the run.
        adapted: see `put_adapter_on`; None: adapters sit on linear modules only.

    Raises:
        CheckpointError: the checkpoint's adapter is not the one that the run's config puts on the base.
    """
    pairs = lora_pairs(trained.reader.params)
    found: dict[str, Master | Factors] = {
        name: Master(own) for name, own in trained_beside(trained.reader.params).items()
    }
    if adapted is None:
        scale = trained.lora.alpha / trained.lora.rank
        return found | {f"{module}.weight": Factors(pair.a, pair.b, scale) for module, pair in pairs.items()}
    layers = adapter_layers(adapted)
    if odd := sorted(layers.keys() ^ pairs.keys()):
        raise CheckpointError(
            str(trained.checkpoint),
            f"{len(odd)} modules are adapted in the checkpoint or by tuning.targets on the base, but not both: "
            + ", ".join(odd[:5]),
            remedy="the base model is not the one that was trained",
        )
    for path, pair in pairs.items():
        layer, plain = layers[path], path.replace(".base_layer", "")
        scale = layer.scaling["default"]
        parameter = getattr(layer, "parameter_name", None)
        if parameter is None:
            found[f"{plain}.weight"] = Factors(pair.a, pair.b, scale)
            continue
        stacked = layer.get_param().dim() == 3
        turned = stacked and not layer._did_swap_in_out_features
        found[f"{plain}.{parameter}"] = Factors(pair.a, pair.b, scale, stacked, layer.num_experts, turned)
    return found


def open_skeleton(trained: Trained, on_note: Callable[[str], None]) -> Any | None:
    """The base without weights; None if transformers does not know it, or only by code that its folder brings."""
    base = trained.base_dir
    if trained.cfg.model.trust_remote_code and "auto_map" in json.loads((base / "config.json").read_text()):
        on_note("export: the folder's own code is not run here; its weights are taken to be named as its modules are")
        return None
    try:
        return skeleton(base)
    except ModelError as error:
        on_note(f"export: the base's weights are taken to be named as its modules are ({error.found})")
        return None


def put_adapter_on(model: Any, trained: Trained) -> Any:
    """The skeleton with the run's adapter, as the training put it on; `model` itself is changed."""
    with torch.device("meta"):
        return adapter_of(trained, model)


def adapter_of(trained: Trained, model: Any) -> Any:
    """`model` with adapters where the run has them.

    A run of an older version may have understood its targets otherwise; then what the checkpoint holds is adapted.
    """
    from peft import get_peft_model

    family = family_of(model.config, trust_remote_code=trained.cfg.model.trust_remote_code)
    adapted = build(trained.cfg.tuning, Tuning).apply(model, family)
    if adapter_layers(adapted).keys() == trained.pairs.keys() or any("base_layer" in path for path in trained.pairs):
        return adapted
    peft_model: Any = adapted
    bare, lora = peft_model.unload(), trained.lora
    modules = {name for name, _ in bare.named_modules()}
    if not modules.issuperset(trained.pairs):
        return adapted  # what does not fit is told by who reads it
    config = peft_config(lora, sorted(trained.pairs))
    return get_peft_model(bare, config, autocast_adapter_dtype=False)


def adapter_layers(adapted: Any) -> dict[str, Any]:
    """Path of each module with an adapter, as in a checkpoint's names -> peft's layer."""
    from peft.tuners.lora.layer import LoraLayer

    return {
        path.removeprefix(PEFT_PREFIX): layer for path, layer in adapted.named_modules() if isinstance(layer, LoraLayer)
    }
