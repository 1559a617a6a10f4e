"""Which part of a model a weight belongs to, told by its place and its module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from train.models.families.facts import Family

_VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|multi_modal_projector|mm_projector)\.")
_INDEXER = re.compile(r"\.indexer\.")
_COMPRESSOR = re.compile(r"\.compressor\.")
_HYPER = re.compile(r"\.(attn_hc|ffn_hc|hc_head)\.")
_SHARED = re.compile(r"\.shared_experts?\.")
_EXPERTS = re.compile(r"\.experts\.")
_MLP = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
_ROUTERS = ("gate", "router", "shared_expert_gate")


class Part(Enum):
    """What users call the parts of a model."""

    attention = "attention"
    """Projections of linear and softmax attention."""
    mlp = "mlp"
    """The MLP that every token passes: dense layers, and shared experts beside routed ones."""
    shared_experts = "shared_experts"
    routed_experts = "routed_experts"
    vision = "vision"
    """The vision tower and what projects its output into the language model."""
    hyper_connections = "hyper_connections"
    """Of mHC (arXiv:2512.24880)."""


@dataclass(frozen=True)
class Weight:
    """A weight of at least two dimensions."""

    name: str
    parts: frozenset[Part]
    linear: bool
    """It is that of a plain linear module, which can be wrapped; else only the weight itself can be adapted."""

    @property
    def module(self) -> str:
        """Name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def last(self) -> str:
        """Last name of the linear module, of the parameter elsewhere."""
        return self.module.rpartition(".")[2] if self.linear else self.name.rpartition(".")[2]


def is_vision(name: str) -> bool:
    """Whether a module or parameter belongs to the vision tower or its projector."""
    return bool(_VISION.search(name))


def is_indexer(name: str) -> bool:
    """Whether it belongs to a module that chooses what sparse attention looks at."""
    return bool(_INDEXER.search(name))


def chooses_or_compresses(name: str) -> bool:
    """Whether it belongs to an indexer, or to what sums up windows of tokens for attention (DeepSeek V4)."""
    return is_indexer(name) or bool(_COMPRESSOR.search(name))


def weights_of(model: Any, family: Family) -> Iterator[Weight]:
    """The weights that an adapter could sit on, with their parts; embeddings and head are none of them."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        if module is head or isinstance(module, nn.Embedding):
            continue
        # Of subclasses only an unlisted family is taken at its word: those of listed ones are no plain matrices.
        linear = type(module) is nn.Linear or not family.listed and isinstance(module, nn.Linear)
        for own, parameter in module.named_parameters(recurse=False):
            if parameter.dim() >= 2 and (own == "weight" or not linear):
                name = f"{path}.{own}"
                yield Weight(name, frozenset(_parts(name, linear, family)), linear)


def _parts(name: str, linear: bool, family: Family) -> Iterator[Part]:
    if is_vision(name):
        if linear:
            yield Part.vision
    elif chooses_or_compresses(name):
        return
    elif _HYPER.search(name):
        yield Part.hyper_connections
    elif _SHARED.search(name):
        if linear:
            yield from (Part.mlp, Part.shared_experts)
    elif _EXPERTS.search(name):
        yield Part.routed_experts
    elif family.attention is not None:
        inside, _, own = name.rpartition(".")
        last = inside.rpartition(".")[2]
        if linear and last in family.attention or f"{last}.{own}" in family.attention_parameters:
            yield Part.attention
        elif linear and last in _MLP:
            yield Part.mlp


def is_router(weight: Weight) -> bool:
    """Whether it decides which expert a token goes to; adapters leave it alone, as they do the indexers."""
    return weight.last in _ROUTERS
