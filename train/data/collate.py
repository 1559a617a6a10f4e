"""From samples to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.data.plan import MicroBatch, RowKind
from train.data.prepared import Sample
from train.ops.packed_attention import Pack


@dataclass(frozen=True)
class Batch:
    """One micro-batch. B rows, T tokens a row, N supervised tokens."""

    input_ids_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    """Restarts at 0 with each sample."""
    attention_mask_BT: torch.Tensor | None
    """1 on tokens, 0 on padding; None where rows have no padding."""
    predicts_BT: torch.Tensor
    """True where the next token of the same sample is supervised: the positions at which the head runs."""
    targets_N: torch.Tensor
    """The supervised tokens, in the order of `predicts_BT`'s True positions."""
    pack: Pack | None
    """Sample boundaries of packed rows."""
    num_targets: int
    """N, or 0 for a filler that only keeps ranks in step."""
    num_tokens: int
    """Tokens of samples, padding not counted."""

    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """For each row those of its samples; padding comes after them."""
        if self.pack is not None:
            return self.pack.lengths
        if self.attention_mask_BT is not None:
            return tuple((int(length),) for length in self.attention_mask_BT.sum(-1).tolist())
        rows, width = self.input_ids_BT.shape
        return ((width,),) * rows

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        inputs = {
            "input_ids": self.input_ids_BT,
            "position_ids": self.position_ids_BT,
            "logits_to_keep": self.predicts_BT,
            "use_cache": False,
        }
        if self.pack is not None:
            inputs["pack"] = self.pack
        if self.attention_mask_BT is not None:
            inputs["attention_mask"] = self.attention_mask_BT
        return inputs


def collate(batch: MicroBatch, sample: Callable[[int], Sample], *, kind: RowKind, device: torch.device) -> Batch:
    """Builds a micro-batch.

    Args:
        batch: rows of sample indices; empty for a filler.
        sample: gives the sample of an index.
        kind: packed rows carry boundaries, padded ones a mask.
        device: where the tensors go.
    """
    if not batch:
        return _filler(kind, device)
    rows = [[sample(index) for index in row] for row in batch]
    width = max(sum(len(s.input_ids) for s in row) for row in rows)
    ids = np.zeros((len(rows), width), np.int64)
    positions = np.zeros((len(rows), width), np.int64)
    filled = np.zeros((len(rows), width), np.int64)
    predicts = np.zeros((len(rows), width), bool)
    targets = []
    for r, row in enumerate(rows):
        at = 0
        for s in row:
            end = at + len(s.input_ids)
            ids[r, at:end] = s.input_ids
            positions[r, at:end] = np.arange(end - at)
            filled[r, at:end] = 1
            for start, stop in s.spans:
                predicts[r, at + start - 1 : at + stop - 1] = True
                targets.append(s.input_ids[start:stop])
            at = end
    targets_N = np.concatenate(targets).astype(np.int64)
    assert len(targets_N) == predicts.sum(), "spans must be disjoint, sorted and leave out the first token"
    return Batch(
        input_ids_BT=torch.from_numpy(ids).to(device),
        position_ids_BT=torch.from_numpy(positions).to(device),
        attention_mask_BT=None if filled.all() else torch.from_numpy(filled).to(device),
        predicts_BT=torch.from_numpy(predicts).to(device),
        targets_N=torch.from_numpy(targets_N).to(device),
        pack=_boundaries(rows) if kind is RowKind.packed else None,
        num_targets=len(targets_N),
        num_tokens=int(filled.sum()),
    )


def _boundaries(rows: list[list[Sample]]) -> Pack:
    lengths = tuple(tuple(len(s.input_ids) for s in row) for row in rows)
    assert len({sum(row) for row in lengths}) == 1, "packed rows of one micro-batch have one length"
    return Pack(lengths)


def _filler(kind: RowKind, device: torch.device) -> Batch:
    """Two tokens that nothing is learnt from."""
    zeros = torch.zeros((1, 2), dtype=torch.long, device=device)
    predicts = torch.tensor([[True, False]], device=device)
    return Batch(
        input_ids_BT=zeros,
        position_ids_BT=torch.tensor([[0, 1]], device=device),
        attention_mask_BT=None,
        predicts_BT=predicts,
        targets_N=zeros[0, :1],
        pack=Pack(((2,),)) if kind is RowKind.packed else None,
        num_targets=0,
        num_tokens=0,
    )
