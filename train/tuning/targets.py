"""From what a user means (`attention+mlp`) to the weights of this very model that get an adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError, nearest
from train.models.families import Family
from train.models.families.parts import Part, Weight, chooses_or_compresses, is_router, is_vision, weights_of

KEY = "tuning.targets"
_PARTS = {part.value: part for part in Part}


@dataclass(frozen=True)
class Targets:
    """The weights that get an adapter, and how peft is told of each."""

    weights: tuple[Weight, ...]
    model_type: str

    @property
    def modules(self) -> list[str]:
        """Full names of linear modules, for ``target_modules``."""
        return [w.module for w in self.weights if self._as_module(w)]

    @property
    def parameters(self) -> list[str]:
        """Full names of weights, for ``target_parameters``."""
        return [w.name for w in self.weights if not self._as_module(w)]

    def _as_module(self, weight: Weight) -> bool:
        return weight.linear and weight.last not in rewritten_by_peft(self.model_type)

    def describe(self) -> list[str]:
        """A line per kind of weight: where, how many."""
        kinds = Counter(re.sub(r"\.\d+(?=\.)", ".*", w.module if w.linear else w.name) for w in self.weights)
        return [f"{name} x {count}" for name, count in kinds.items()]


def rewritten_by_peft(model_type: str) -> frozenset[str]:
    """Last names of modules that peft turns into targets of something else on this family.

    It takes `gate_proj`, `up_proj`, `down_proj` for the routed experts of old, so that dense layers and shared experts
    would silently get none (`peft/utils/transformers_weight_conversion.py`). Their weights are named instead.
    """
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, {}))


def resolve(model: Any, family: Family, wanted: Sequence[str], first_layer: int) -> Targets:
    """The weights that `wanted` means on this model.

    Args:
        model: of transformers.
        family: its facts.
        wanted: parts (`Part`), joined by ``+`` or listed, or last names of linear modules; empty: attention and mlp.
        first_layer: layers of the language model below this one get none.

    Raises:
        ConfigError: a word means nothing on this model, or something that could not train; or no layer is left.
    """
    weights = [w for w in weights_of(model, family) if not is_router(w)]
    words = [word.strip() for entry in wanted for word in entry.split("+")]
    chosen: dict[str, Weight] = {}
    for word in words or _default(weights, family):
        chosen |= {w.name: w for w in _meant(word, weights, family)}
    if not chosen:
        raise ConfigError(KEY, "this model has no linear module to adapt", remedy="tuning=full")
    kept = [w for w in chosen.values() if is_vision(w.name) or _layer(w.name) >= first_layer]
    if not kept:
        raise ConfigError(
            "tuning.first_layer",
            f"{first_layer} leaves no module to adapt",
            allowed=f"below {1 + max((_layer(n) for n in chosen if not is_vision(n)), default=0)}",
        )
    return Targets(tuple(kept), str(model.config.model_type))


def _default(weights: Iterable[Weight], family: Family) -> list[str]:
    if not family.listed:
        return sorted({w.last for w in _plain(weights)})
    there = {part for w in weights for part in w.parts}
    return [part.value for part in (Part.attention, Part.mlp) if part in there]


def _meant(word: str, weights: Sequence[Weight], family: Family) -> list[Weight]:
    parts = sorted({part.value for w in weights for part in w.parts})
    names = sorted({w.last for w in _plain(weights)})
    if word in _PARTS:
        found = [w for w in weights if _PARTS[word] in w.parts]
        if found:
            return found
        why = "" if family.listed else f"; nothing is known of family '{family.model_type}', name its modules"
        raise ConfigError(KEY, f"'{word}' is no part of this model{why}", allowed=", ".join([*parts, *names]))
    _refuse_traps(word, parts, names)
    found = [w for w in _plain(weights) if w.last == word]
    if found:
        return found
    near = nearest(word, [*parts, *names])
    raise ConfigError(
        KEY,
        f"'{word}' is no linear module of this model" + (f"; did you mean '{near}'?" if near else ""),
        allowed=", ".join([*parts, *names]),
    )


def _refuse_traps(word: str, parts: Sequence[str], names: Sequence[str]) -> None:
    """Words that peft takes and then understands otherwise than they read."""
    if word.replace("_", "-").lower() == "all-linear":
        raise ConfigError(
            KEY,
            f"'{word}': on mixtures of experts it would adapt routers and leave out dense layers, on image models it "
            "would adapt the vision tower",
            allowed=", ".join(parts or names),
            remedy="say what is meant, e.g. tuning.targets=attention+mlp",
        )
    if re.search(r"[.*?\[\]()|^$\\]", word):
        raise ConfigError(
            KEY,
            f"'{word}' is a path or a pattern; peft cuts patterns down to last names, which match other layers too",
            allowed=", ".join([*parts, *names]),
            remedy="name parts or modules; tuning.first_layer leaves out the layers below",
        )


def _plain(weights: Iterable[Weight]) -> list[Weight]:
    """Linear modules that a bare name can mean: those of the language model, without what no intent reaches."""
    return [w for w in weights if w.linear and not is_vision(w.name) and not chooses_or_compresses(w.name)]


def _layer(name: str) -> int:
    """Index of the layer that a weight lies in; weights outside the stack count as above it."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 1 << 30)
