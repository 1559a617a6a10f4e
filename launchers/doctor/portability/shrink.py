"""A model's config cut to a few layers, and what memory a model needs, without allocating any.

So that the structure of a model that no laptop can hold is looked at on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError, DeviceError

GIB = 2**30
HEADROOM = 1.2
"""Activations of one short step, temporary tensors and the program itself, as a factor on weights and gradients."""


@dataclass(frozen=True)
class Cut:
    """What was kept of the layers."""

    kept: tuple[int, ...]
    """Their numbers in the whole model."""
    total: int
    left_out: tuple[str, ...]
    """Kinds of layers, as the config's lists tell them apart, of which none was kept."""

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.kept))
        missing = f"; none of the kind {' or '.join(self.left_out)}: a larger layers= has it" if self.left_out else ""
        return f"layers {numbers} of {self.total}, random weights{missing}"


def shrink(content: dict[str, Any], layers: int) -> tuple[dict[str, Any], Cut]:
    """Cuts config.json's content to `layers` layers, at least one of each kind where that many are kept.

    Lists with one entry per layer are cut alike, lists of layer numbers are renumbered, and a first block of dense
    layers leaves room for a sparse one behind it.

    Args:
        content: the config as a dict; the language part of a multimodal one is looked for inside.
        layers: how many to keep.

    Raises:
        ConfigError: the config does not say how many layers it has.
    """
    path, inner = _text_part(content)
    key = next((name for name in LAYER_KEYS if isinstance(inner.get(name), int)), None)
    if key is None:
        raise ConfigError("layers", f"config.json has none of {', '.join(LAYER_KEYS)}", remedy="layers=0, all of them")
    total = int(inner[key])
    lists = {name: value for name, value in inner.items() if isinstance(value, list) and len(value) == total > 1}
    kinds = [_kind(number, lists) for number in range(total)]
    kept = _representatives(kinds, min(layers, total))
    changed: dict[str, Any] = {key: len(kept)} | {name: [value[i] for i in kept] for name, value in lists.items()}
    for name in NUMBER_LISTS:
        if isinstance(inner.get(name), list) and name not in lists:
            changed[name] = [place for place, number in enumerate(kept) if number in inner[name]]
    for name in DENSE_FIRST:
        if isinstance(inner.get(name), int) and name not in changed:
            changed[name] = min(inner[name], max(len(kept) - 1, 0))
    cut = inner | changed
    left_out = tuple(sorted({kind for kind in kinds if kind not in {kinds[i] for i in kept}}))
    return (content | {path: cut} if path else cut), Cut(kept, total, left_out)


LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUMBER_LISTS = ("mlp_only_layers", "attn_layer_indices", "full_attention_layers", "moe_layers")
"""Lists of layer numbers."""
DENSE_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""So many layers at the start have no experts."""


def _text_part(content: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    for name in ("text_config", "llm_config", "language_config"):
        if isinstance(content.get(name), dict) and not any(key in content for key in LAYER_KEYS):
            return name, content[name]
    return None, content


def _kind(number: int, lists: dict[str, list[Any]]) -> str:
    """What the lists say of a layer, such as ``sliding_attention``; lists of plain figures do not make a kind."""
    return " ".join(str(values[number]) for values in lists.values() if isinstance(values[number], str | bool))


def _representatives(kinds: Sequence[str], count: int) -> tuple[int, ...]:
    """The first layer of each kind, filled up from the front."""
    first = sorted({kind: number for number, kind in reversed(list(enumerate(kinds)))}.values())
    rest = [number for number in range(len(kinds)) if number not in first]
    return tuple(sorted((first + rest)[:count]))


@dataclass(frozen=True)
class Size:
    """Of a model."""

    parameters: int
    weight_bytes: int
    layer_bytes: int
    """Of its largest layer."""
    parts: tuple[tuple[str, int], ...]
    """Largest kinds of tensors with their bytes over all layers, the largest first."""

    @property
    def needed_bytes(self) -> int:
        """For weights, as many gradients, and the rest."""
        return int(self.weight_bytes * 2 * HEADROOM)


def measure(model: Any) -> Size:
    """The size of a model, which may lie on the meta device."""
    layers: dict[str, int] = {}
    parts: dict[str, int] = {}
    count = total = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        count, total = count + parameter.numel(), total + size
        words = name.split(".")
        numbers = [place for place, word in enumerate(words) if word.isdigit()]
        if numbers:
            layer = ".".join(words[: numbers[0] + 1])
            layers[layer] = layers.get(layer, 0) + size
        kind = ".".join("*" if word.isdigit() else word for word in words)
        parts[kind] = parts.get(kind, 0) + size
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    return Size(count, total, max(layers.values(), default=0), tuple(largest))


def check_memory(size: Size, available_bytes: int, layers: int) -> None:
    """Refuses a model that this machine cannot hold, before anything is allocated.

    Raises:
        DeviceError: with what it needs, where it goes and how many layers would do.
    """
    if size.needed_bytes <= available_bytes:
        return
    outside = size.weight_bytes - size.layer_bytes * layers
    fitting = int((available_bytes / 2 / HEADROOM - max(outside, 0)) // size.layer_bytes) if size.layer_bytes else 0
    parts = ", ".join(f"{name} {nbytes / GIB:.1f} GiB" for name, nbytes in size.parts)
    raise DeviceError(
        "layers",
        f"{size.parameters / 1e9:.1f} B parameters need some {size.needed_bytes / GIB:.1f} GiB with their gradients; "
        f"{available_bytes / GIB:.1f} GiB are free here. The largest: {parts}",
        remedy=f"layers={fitting}, with random weights, fits here"
        if 0 < fitting < layers
        else "not even one layer fits here: a machine with more memory",
    )
