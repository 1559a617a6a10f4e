"""How surprised a model is by the supervised tokens: negative log-likelihood in fp32.

`head_at` is the piece that keeps this cheap: the vocabulary is by far the widest layer of a small model, so the
head runs only at the positions whose logits are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from train.evaluate.samples import Sample

_CHUNK_ROWS = 256
"""Rows of logits taken to fp32 at a time, so that no second whole copy of them is made."""


@contextlib.contextmanager
def head_at(model: nn.Module, rows_N: Sequence[int], columns_N: Sequence[int]) -> Iterator[None]:
    """Within this context a forward pass gives logits ``[1, N, V]``: those of the N positions named, in that order.

    The hidden states ``[B, S, D]`` are picked on their way into the output embedding, so what a family does to its
    logits afterwards (scaling, soft caps) still happens.

    Args:
        model: a causal language model with an output embedding.
        rows_N: row in the batch of each position.
        columns_N: index in the sequence of each position.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    rows, columns = torch.tensor(rows_N), torch.tensor(columns_N)

    def pick(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        hidden_BSD = args[0]
        return (hidden_BSD[rows.to(hidden_BSD.device), columns.to(hidden_BSD.device)].unsqueeze(0),)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def token_nll(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (nats, fp32) of each target token, ``[N]``."""
    pieces = []
    for start in range(0, len(targets_N), _CHUNK_ROWS):
        wide = logits_NV[start : start + _CHUNK_ROWS].float()
        targets = targets_N[start : start + _CHUNK_ROWS].unsqueeze(-1)
        pieces.append(wide.logsumexp(-1) - wide.gather(-1, targets).squeeze(-1))
    return torch.cat(pieces)


@torch.inference_mode()
def forward_nll(model: Any, samples: Sequence[Sample], device: torch.device) -> list[float]:
    """Summed negative log-likelihood of each sample's supervised tokens, by one plain right-padded forward pass.

    Right padding is safe for every causal family, recurrent ones too: nothing flows backwards.
    """
    width = max(len(s.input_ids) for s in samples)
    tokens_BS = torch.zeros(len(samples), width, dtype=torch.long)
    mask_BS = torch.zeros_like(tokens_BS)
    for row, sample in enumerate(samples):
        tokens_BS[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        mask_BS[row, : len(sample.input_ids)] = 1
    rows = [row for row, s in enumerate(samples) for _ in s.targets]
    columns = [i - 1 for s in samples for i in s.targets]
    targets = torch.tensor([s.input_ids[i] for s in samples for i in s.targets])
    with head_at(model, rows, columns):
        logits = model(input_ids=tokens_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False).logits[0]
    sums = [0.0] * len(samples)
    for row, loss in zip(rows, token_nll(logits, targets.to(device)).tolist(), strict=True):
        sums[row] += loss
    return sums
