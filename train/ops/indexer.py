"""The indexer of DeepSeek sparse attention (DSA) and the loss that trains it.

An indexer scores for each query the keys before it, and attention looks at the best ones only. Which ones is no smooth
function of the scores, so that the model's loss gives the indexer no gradient. DeepSeek-V3.2 (its technical report,
section 2.1) trains it by a loss of its own: for each query the Kullback-Leibler divergence of ``softmax(scores)`` from
the attention that the layer really pays, summed over the heads and normalised to 1. In the warm-up all keys are
attended to and compared; later only those that the indexer selects. Nothing flows from this loss into the rest of the
model.

The model's code stays as it is. The indexer's forward, which transformers runs without gradients, is run with them on
detached inputs, and its scores are taken where it ranks them. The attention is computed once more, in fp32 and for some
queries at a time, by an attention implementation of our own, which else is transformers' SDPA. All of it happens inside
the modules' own forward passes: engines that spread the parameters have them there, and activation checkpointing may
run it again.

An indexer over pools of keys (GLM-5.3) is compared with the attention that its pools get, which is our reading.

Not covered: layers that share the selection of a layer before have no indexer, and their attention is no part of the
target.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from train.ops.watch import Watch

IMPLEMENTATION = "crosstune_indexed"
"""Name of the attention implementation. transformers hands it the indexer's selection beside the mask."""
TRAINABLE = ("deepseek_v32", "glm_moe_dsa", "glm5_next", "glm5_next_text")
"""Model types whose indexers the loss is for."""
_BLOCKS = "its indexer ranks blocks of keys; the loss of DeepSeek-V3.2 does not say what to compare there"
NOT_TRAINABLE = {
    "deepseek_v4": "its indexer ranks compressed entries, beside which attention sees a sliding window and a sink; the "
    "loss of DeepSeek-V3.2 does not say what to compare there",
    "minimax_m3_vl": _BLOCKS,
    "minimax_m3_vl_text": _BLOCKS,
}
_CHUNK_NUMEL = 1 << 25
"""Attention weights that are computed at once; 128 MiB."""


def indexers_of(module: nn.Module) -> list[nn.Module]:
    """The modules that choose what attention sees, and get no gradient from it."""
    return [each for each in module.modules() if type(each).__name__.endswith("Indexer") and _is_blind(each)]


def _is_blind(indexer: nn.Module) -> bool:
    """Whether it runs without gradients, or returns indices only."""
    decorated = hasattr(type(indexer).forward, "__wrapped__")
    return decorated or type(indexer).__name__ in ("DeepseekV4Indexer", "MiniMaxM3VLIndexer")


class IndexerLoss(Watch):
    """Watches the indexers of a model.

    Args:
        module: the model, maybe inside an adapter's; of one of `TRAINABLE`. The engine is built already.
        dense: attention to all keys, and all are compared.
    """

    def __init__(self, module: nn.Module, *, dense: bool) -> None:
        self.dense = dense
        self._sums: list[torch.Tensor] = []
        _register()
        own = {id(each) for each in indexers_of(module)}
        layers = [each for each in module.modules() if id(getattr(each, "indexer", None)) in own]
        for layer in layers:
            _Watched(layer, self)
        self.layers = len(layers)

    def add(self, divergence: torch.Tensor) -> None:
        """Takes a layer's sum over the queries."""
        if self._listening:
            self._sums.append(divergence)

    def total(self) -> torch.Tensor:
        """Sum over the queries of the micro-batch, mean over the layers that have an indexer; forgets it."""
        total = torch.stack(self._sums).sum() / self.layers
        self._sums.clear()
        return total


@dataclass
class _Ranking:
    """What an indexer made of its last input. N: what it ranks, keys or pools of P keys."""

    scores_BTN: torch.Tensor
    """fp32, with a graph that ends at the indexer's parameters."""
    token_BT: torch.Tensor
    """False: padding."""
    pool_BNP: torch.Tensor | None = None
    """Keys of each pool."""
    compared_BTN: torch.Tensor | None = None
    """Pools that are compared; None: what the attention's mask shows."""


class _Watched:
    """One attention layer and its indexer."""

    def __init__(self, layer: Any, owner: IndexerLoss) -> None:
        self._owner = owner
        self._indexer = indexer = layer.indexer
        self._forward = inspect.unwrap(type(indexer).forward)
        self._names = inspect.signature(self._forward)
        self._ranking: _Ranking | None = None
        indexer.forward = self._select
        # The engine's hooks, which came first, see the scores as an output of the indexer and so have its parameters
        # there when the gradients arrive.
        indexer.register_forward_hook(self._take_scores)
        layer.indexer_watch = self
        layer.config._attn_implementation = IMPLEMENTATION

    def _select(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """In place of the indexer's forward: the selection, and where gradients are wanted the scores."""
        bound = self._names.bind(self._indexer, *args, **kwargs)
        wanted = torch.is_grad_enabled()
        for name in ("hidden_states", "q_resid"):
            bound.arguments[name] = bound.arguments[name].detach()
        with _Ranked() as ranked:
            selection: torch.Tensor = self._forward(*bound.args, **bound.kwargs)
        mask = bound.arguments["attention_mask"]
        pooled = mask.dim() == 2
        if self._owner.dense:
            selection = self._all_keys(mask, pooled)
        if not wanted:
            return selection
        self._ranking = self._pools(ranked, mask) if pooled else _Ranking(ranked.scores, _diagonal(mask))
        return selection, ranked.scores

    def _all_keys(self, mask: torch.Tensor, pooled: bool) -> torch.Tensor:
        """``[b x t x t]`` int32 indices."""
        rows, length = mask.shape[0], mask.shape[1]
        every = torch.arange(length, dtype=torch.int32, device=mask.device).expand(rows, length, length)
        if not pooled:
            return every  # the mask holds what may not be seen
        visible = self._indexer.get_visible_tokens(valid_keys=mask, q_length=length, current_length=length)
        return every.masked_fill(~visible, -1)

    def _pools(self, ranked: _Ranked, mask_BT: torch.Tensor) -> _Ranking:
        """As `Glm5NextTextIndexer` groups the keys: from a row's first token on, whole pools only."""
        size = self._indexer.index_kpool
        assert isinstance(size, int)
        first_B = mask_BT.long().argmax(-1)
        pools = torch.arange(ranked.scores.shape[-1] * size, device=mask_BT.device).view(-1, size)
        pool_BNP = (first_B[:, None, None] + pools).clamp(max=mask_BT.shape[-1] - 1)
        compared = ranked.scores.detach() > torch.finfo(ranked.scores.dtype).min
        if not self._owner.dense:
            compared &= torch.zeros_like(compared).scatter(-1, ranked.chosen, True)
        return _Ranking(ranked.scores, mask_BT, pool_BNP, compared)

    def _take_scores(self, indexer: nn.Module, args: Any, output: Any) -> torch.Tensor:
        if not isinstance(output, tuple):
            return output  # type: ignore[no-any-return]
        selection, scores = output
        assert self._ranking is not None
        self._ranking.scores_BTN = scores
        return selection  # type: ignore[no-any-return]

    def compare(self, query: torch.Tensor, key: torch.Tensor, visible_BTS: torch.Tensor, scaling: float) -> None:
        """Called by the attention: query and key ``[b x h x t x d]``."""
        ranking, self._ranking = self._ranking, None
        assert ranking is not None
        mass = attention_mass(query, key, visible_BTS, scaling)
        compared = visible_BTS
        if ranking.pool_BNP is not None and ranking.compared_BTN is not None:
            compared = ranking.compared_BTN
            keys = ranking.pool_BNP.flatten(1)[:, None].expand(-1, mass.shape[1], -1)
            mass = mass.gather(-1, keys).view(*mass.shape[:2], *ranking.pool_BNP.shape[1:]).sum(-1)
        divergence_BT = divergence(mass, ranking.scores_BTN, compared)
        self._owner.add(divergence_BT.masked_fill(~ranking.token_BT, 0.0).sum())


class _Ranked(TorchFunctionMode):
    """Sees the scores of which an indexer takes the highest."""

    scores: torch.Tensor
    chosen: torch.Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.topk:
            self.scores, self.chosen = args[0], out.indices
        return out


def _diagonal(mask_BTS: torch.Tensor) -> torch.Tensor:
    """Which queries are tokens: nothing sees padding, not even itself."""
    return _visible(mask_BTS).diagonal(dim1=-2, dim2=-1)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """A mask, of truth values or to be added, as truth values."""
    return mask if mask.dtype == torch.bool else mask >= 0


@torch.no_grad()
def attention_mass(
    query_BHTD: torch.Tensor, key_BHSD: torch.Tensor, visible_BTS: torch.Tensor, scaling: float
) -> torch.Tensor:
    """``[b x t x s]`` fp32: the attention weights summed over the heads, without a graph."""
    rows, heads, length, _ = query_BHTD.shape
    keys = key_BHSD.float().transpose(-1, -2)
    step = max(1, _CHUNK_NUMEL // (rows * heads * keys.shape[-1]))
    mass = keys.new_empty(rows, length, keys.shape[-1])
    for start in range(0, length, step):
        some = slice(start, start + step)
        scores = (query_BHTD[:, :, some].float() @ keys).mul_(scaling)
        scores.masked_fill_(~visible_BTS[:, None, some], torch.finfo(scores.dtype).min)
        mass[:, some] = scores.softmax(-1).sum(1)
    return mass


def divergence(mass_BTN: torch.Tensor, scores_BTN: torch.Tensor, compared_BTN: torch.Tensor) -> torch.Tensor:
    """``[b x t]`` KL of ``softmax(scores)`` from the normalised mass, both over what is compared.

    0 where nothing is.
    """
    mass = mass_BTN.masked_fill(~compared_BTN, 0.0)
    target = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    scores = scores_BTN.float().masked_fill(~compared_BTN, torch.finfo(torch.float32).min)
    log_share = scores.log_softmax(-1).masked_fill(~compared_BTN, 0.0)
    return F.kl_div(log_share, target, reduction="none").sum(-1)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float = 1.0,
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA as transformers runs it, on what the indexer selected, which is then compared.

    Args:
        module: the attention layer.
        query: ``[b x h x t x d]``.
        key: ``[b x h x s x d]``.
        value: as `key`.
        attention_mask: ``[b x 1 x t x s]``.
        dropout: probability on the attention weights.
        scaling: factor on the scores.
        indices: ``[b x t x k]`` keys that are seen; None: `attention_mask` says it.
        kwargs: what else the model passes on.

    Returns:
        ``[b x t x h x d]`` and None for the weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    visible = _visible(attention_mask)
    if indices is not None and indices.shape[-1] < key.shape[-2]:
        visible = visible & torch.zeros_like(visible).scatter(-1, indices[:, None].long(), True)
    watch = getattr(module, "indexer_watch", None)
    if watch is not None and torch.is_grad_enabled():
        watch.compare(query, key, visible[:, 0], scaling)
    out, _ = sdpa_attention_forward(module, query, key, value, visible, dropout=dropout, scaling=scaling)
    return out, None


def _register() -> None:
    """Makes the implementation known, with the mask of SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
