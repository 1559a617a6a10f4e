"""Rows shorter than a block that attention compresses: every weight is used all the same.

DeepSeek V4 skips a compressor where a row has not one whole window (128 tokens in the released model). Its weights then
get no gradient on that rank while they do on another, and DeepSpeed, which lays gradients out as they come, would wait
for ever or add up gradients of different weights.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

COMPRESSORS = ("DeepseekV4HCACompressor", "DeepseekV4CSACompressor")


def always_compress(model: nn.Module) -> None:
    """Has the compressors of `model` lengthen such rows to one window, which no token of theirs may see."""
    for part in model.modules():
        if type(part).__name__ in COMPRESSORS:
            part.forward = MethodType(_forward, part)


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    q_residual: torch.Tensor,
    position_ids: torch.Tensor,
    past_key_values: Any,
    layer_idx: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compressed keys [batch, 1, windows, head] and what is added to their scores [batch, 1, tokens, windows]."""
    own, rate, tokens = type(self).forward, int(self.compress_rate), hidden_states.shape[1]
    if past_key_values is not None or tokens >= rate:
        found: tuple[torch.Tensor, torch.Tensor | None] = own(
            self, hidden_states, q_residual, position_ids, past_key_values, layer_idx
        )
        return found
    more = rate - tokens
    hidden_states, q_residual = (pad(x, (0, 0, 0, more)) for x in (hidden_states, q_residual))
    keys, bias = own(self, hidden_states, q_residual, pad(position_ids, (0, more)), None, layer_idx)
    # A window is seen from its last token on, which these rows do not reach.
    return keys, bias.new_full((keys.shape[0], 1, tokens, keys.shape[2]), float("-inf"))
