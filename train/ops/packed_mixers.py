"""Packed rows through mixers that would mix their samples: linear attention, and attention that chooses or compresses.

Such a layer runs as transformers wrote it, sample by sample, and its outputs go back to where they belong in the row;
everything around it stays packed. The boundaries come by the model's keyword argument ``pack``, also when activation
checkpointing runs the layer again. Linear mixers take samples of about the same length together, padded on the right
with their last token: they are causal, so nothing of it is seen. Attention that chooses what it looks at takes one
sample at a time, since ties of its choice are broken by the width of a row.

Measured in docs/training.md. Not covered: states that are carried over (generation); there `pack` is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import nn

from train.models.families import Family
from train.ops.packed_attention import Lengths, Pack, register

EVEN = 1.25
"""Linear mixers take samples together whose longest is at most this much longer than the shortest."""
SHORT = 64
"""Tokens; below it lengths count as this one, the chunk of the linear mixers' kernels."""


def attention_for_packing(family: Family) -> str:
    """The attention implementation of a model whose rows are packed.

    Where the attention itself is wrapped it brings its own masks and stays what it is.
    """
    return "sdpa" if any(name in _MASKS for name in family.packed_mixers or ()) else register()


def wrap_mixers(model: nn.Module, family: Family) -> int:
    """Has the family's mixers keep samples apart when they are given `pack`; idempotent, undone by `unwrap_mixers`.

    Only this model is touched, not transformers' classes.

    Returns:
        how many layers it has wrapped.
    """
    names = family.packed_mixers or ()
    mixers = [module for module in model.modules() if type(module).__name__ in names]
    for module in mixers:
        # A bound method, not a closure over the layer: copy.deepcopy binds it to the copy.
        module.forward = MethodType(_forward, module)
    if any(name in _MASKS for name in names):
        for module in _stacks(model, names):
            module.forward = MethodType(_stack_forward, module)
    return len(mixers)


def unwrap_mixers(model: nn.Module) -> None:
    """Gives every layer its own forward back."""
    for module in model.modules():
        if getattr(vars(module).get("forward"), "__func__", None) in (_forward, _stack_forward):
            del module.forward


def _stacks(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The models that hand a mask to layers with such mixers."""
    found = []
    for module in model.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and any(type(each).__name__ in names for each in layers.modules()):
            found.append(module)
    return found


def _stack_forward(self: Any, *args: Any, pack: Pack | None = None, **kwargs: Any) -> Any:
    """The model's own forward, without a mask over the whole row: the wrapped layers make one for each sample."""
    if pack is not None:
        kinds = ("indexed_attention", *(getattr(self.config, "layer_types", None) or ()))
        kwargs["attention_mask"] = dict.fromkeys(kinds)  # as if made beforehand: transformers takes it as it is
    return type(self).forward(self, *args, pack=pack, **kwargs)


def _forward(self: Any, hidden_states: torch.Tensor, *, pack: Pack | None = None, **kwargs: Any) -> Any:
    """The layer's own forward, for each group of samples.

    Args:
        self: the layer.
        hidden_states: ``[b x t x d]``.
        pack: the samples of each row; None: the rows are whole.
        kwargs: what the model gives every layer. Tensors ``[b or 1 x t x ...]``, also inside tuples and dictionaries,
            are cut like the hidden states; masks are made anew.
    """
    own = type(self).forward
    if pack is None:
        return own(self, hidden_states, **kwargs)
    make_mask = _MASKS.get(type(self).__name__, _no_mask)
    kwargs.pop("attention_mask", None)
    if all(len(row) == 1 for row in pack.lengths):
        return own(self, hidden_states, attention_mask=make_mask(self, hidden_states, pack), **kwargs)
    plan = _plan(pack.lengths, hidden_states.device, make_mask is _no_mask)
    chosen_before = kwargs.pop("prev_topk_indices", None)
    outs, chosen = [], []
    for group, places in enumerate(plan.groups):
        mine = {key: plan.cut(value, places) for key, value in kwargs.items()}
        if chosen_before is not None:
            mine["prev_topk_indices"] = chosen_before[group]
        part = plan.cut(hidden_states, places)
        out = own(self, part, attention_mask=make_mask(self, part, pack), **mine)
        several = isinstance(out, tuple)
        outs.append(out[0] if several else out)
        chosen.append(out[2] if several and len(out) == 3 else None)
    whole = plan.join(outs)
    if not several:
        return whole
    rest: list[Any] = [None] * (len(out) - 1)
    if chosen[0] is not None:
        rest[-1] = tuple(chosen)  # for the next layer, which gives each group its own
    return (whole, *rest)


@dataclass(frozen=True)
class _Plan:
    """Which tokens of the flattened rows go through a layer together, and the way back."""

    rows: int
    tokens: int
    groups: tuple[torch.Tensor, ...]
    """Of each group the places of its samples' tokens, ``[n x length]``."""
    back: torch.Tensor
    """For each token of the rows its place in the groups' outputs, ``[b * t]``."""

    def cut(self, value: Any, places: torch.Tensor) -> Any:
        """The part of `value` that belongs to a group."""
        if isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[1] != self.tokens or value.shape[0] not in (1, self.rows):
                return value
            flat = value.expand(self.rows, *value.shape[1:]).reshape(self.rows * self.tokens, *value.shape[2:])
            return flat.index_select(0, places.flatten()).view(*places.shape, *value.shape[2:])
        if isinstance(value, tuple):
            return tuple(self.cut(each, places) for each in value)
        if isinstance(value, dict):
            return {key: self.cut(each, places) for key, each in value.items()}
        return value

    def join(self, outs: Iterable[torch.Tensor]) -> torch.Tensor:
        """Outputs of the groups ``[n x length x d]`` in the order of the rows ``[b x t x d]``."""
        flat = torch.cat([out.flatten(0, 1) for out in outs])
        return flat.index_select(0, self.back).view(self.rows, self.tokens, *flat.shape[1:])


@lru_cache(maxsize=8)
def _plan(lengths: Lengths, device: torch.device, together: bool) -> _Plan:
    """Made once for all layers of a pass."""
    tokens = sum(lengths[0])
    samples = []
    for row, sizes in enumerate(lengths):
        at = row * tokens
        for size in sizes:
            samples.append((at, size))
            at += size
    groups: list[list[tuple[int, int]]] = []
    for sample in sorted(samples, key=lambda each: -each[1]):
        if together and groups and groups[-1][0][1] <= EVEN * max(sample[1], SHORT):
            groups[-1].append(sample)
        else:
            groups.append([sample])
    with torch.inference_mode(False):  # kept for later passes, which may want gradients
        back, made, done = torch.empty(len(lengths) * tokens, dtype=torch.long), [], 0
        for group in groups:
            longest = group[0][1]
            places = torch.empty(len(group), longest, dtype=torch.long)
            for i, (at, size) in enumerate(group):
                places[i] = at + torch.arange(longest).clamp(max=size - 1)
                back[at : at + size] = done + i * longest + torch.arange(size)
            made.append(places.to(device))
            done += places.numel()
        return _Plan(len(lengths), tokens, tuple(made), back.to(device))


def _causal(layer: Any, part: torch.Tensor, pack: Pack, window: int | None = None) -> torch.Tensor:
    """As transformers makes it for one length, ``[n x 1 x t x t]``: additive for eager attention, else boolean."""
    additive = layer.config._attn_implementation == "eager"
    made = part.shape[1], window, part.dtype if additive else torch.bool, part.device
    if made not in pack.masks:
        with torch.inference_mode(False):  # the same pack may come again in a pass with gradients
            at = torch.arange(part.shape[1], device=part.device)
            back = at[:, None] - at[None, :]
            mask = (back >= 0) if window is None else (back >= 0) & (back < window)
            if additive:
                zeros = torch.zeros(mask.shape, dtype=part.dtype, device=part.device)
                mask = zeros.masked_fill(~mask, torch.finfo(part.dtype).min)
        pack.masks[made] = mask
    return pack.masks[made].expand(len(part), 1, -1, -1)


def _sliding(layer: Any, part: torch.Tensor, pack: Pack) -> torch.Tensor:
    return _causal(layer, part, pack, layer.sliding_window)


def _no_mask(layer: Any, part: torch.Tensor, pack: Pack) -> None:
    """For linear mixers: they are causal, and what is padded is not read back."""


def _no_padding(layer: Any, part: torch.Tensor, pack: Pack) -> torch.Tensor:
    return torch.ones(part.shape[:2], dtype=torch.bool, device=part.device)


_MASKS: dict[str, Callable[[Any, torch.Tensor, Pack], torch.Tensor | None]] = {
    "DeepseekV32Attention": _causal,
    "DeepseekV4Attention": _sliding,
    "GlmMoeDsaAttention": _causal,
    "Glm5NextTextAttention": _no_padding,
    "MiniMaxM3VLAttention": _causal,
}
"""Classes of softmax attention that bring their own masks to what they choose to look at: the mask of one sample."""

DSA = ("DeepseekV32Attention", "GlmMoeDsaAttention", "Glm5NextTextAttention")
"""Whose top-k meets ties (DeepSeek Sparse Attention, arXiv:2512.02556), which a row's width breaks."""
