"""The load-balancing loss of routed experts.

Of each sample by itself, as DeepSeek-V3's complementary loss (arXiv:2412.19437, eq. 17 to 20): for each expert the
share of the sample's tokens whose top k it is among, times its mean affinity, summed over the experts and scaled so
that an even load gives 1. Switch's loss (arXiv:2101.03961) and transformers' ``aux_loss`` multiply the means of a whole
micro-batch instead, and so give another gradient with every other split of a step; of one sample in one layer with
softmax affinities they are this one times k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from train.ops.watch import Watch

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: F.softplus(logits).sqrt(),
}
ROUTERS = {
    "qwen3_5_moe": "softmax",
    "qwen3_5_moe_text": "softmax",
    "qwen3_next": "softmax",
    "minimax": "softmax",
    "minimax_m2": "sigmoid",
    "minimax_m3_vl": "sigmoid",
    "minimax_m3_vl_text": "sigmoid",
    "deepseek_v4": "sqrtsoftplus",
    "glm5_next": "sigmoid",
    "glm5_next_text": "sigmoid",
}
"""Model types whose routers are trained with such a loss, and how an affinity comes from a logit."""


class BalanceLoss(Watch):
    """Watches the routers of a model.

    Args:
        module: the model, maybe inside an adapter's; of one of `ROUTERS`. The engine is built already.
        text_config: of its language model.
    """

    def __init__(self, module: nn.Module, text_config: Any) -> None:
        by_type = ROUTERS[text_config.model_type]
        self._affinity = SCORES[text_config.scoring_func if by_type == "sqrtsoftplus" else by_type]
        self._logits: list[torch.Tensor] = []
        # V4's other routers, which look the experts up by the token, have nothing to balance.
        routers = [each for each in module.modules() if type(each).__name__.lower().endswith("topkrouter")]
        self._top_k = int(routers[0].top_k)  # type: ignore[arg-type]
        for router in routers:
            router.register_forward_hook(self._hear)

    def _hear(self, router: nn.Module, args: Any, output: Any) -> None:
        if self._listening and torch.is_grad_enabled():
            self._logits.append(output[0])

    def total(self, lengths: Sequence[Sequence[int]], width: int) -> torch.Tensor:
        """Sum over the samples of the micro-batch, mean over the layers with a router; forgets it.

        Args:
            lengths: for each row those of its samples, which lie one after the other from its beginning.
            width: of a row, padding included.
        """
        mean_SN = mean_over_samples(lengths, width, self._logits[0].device)
        each = [balance(self._affinity(logits.float()), mean_SN, self._top_k).sum() for logits in self._logits]
        self._logits.clear()
        return torch.stack(each).mean()


def mean_over_samples(lengths: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    """``[s x n]`` fp32: with it a product takes the mean over each sample's tokens, of all n with padding."""
    places = []
    for row, sizes in enumerate(lengths):
        start = row * width
        for size in sizes:
            places.append((start, size))
            start += size
    mean = torch.zeros(len(places), len(lengths) * width)
    for sample, (start, size) in enumerate(places):
        mean[sample, start : start + size] = 1 / size
    return mean.to(device)


def balance(affinity_NE: torch.Tensor, mean_SN: torch.Tensor, top_k: int) -> torch.Tensor:
    """``[s]``: the loss of each sample in one layer; 1 for an even load."""
    experts = affinity_NE.shape[-1]
    chosen = torch.zeros_like(affinity_NE).scatter(-1, affinity_NE.topk(top_k, dim=-1).indices, 1.0)
    load_SE = mean_SN @ chosen * (experts / top_k)
    share_SE = mean_SN @ (affinity_NE / affinity_NE.sum(-1, keepdim=True).clamp_min(1e-20))
    return (load_SE * share_SE).sum(-1)
