"""From samples to the tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.data.images import ImageInputs, Pixels
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
    rotary_3BT: torch.Tensor | None = None
    """Positions in time, row and column, where the model rotates by these; None: `position_ids_BT` are all."""
    pixels: Pixels | None = None
    """The images, in the order of their tokens; None: the data has none."""
    blank: bool = False
    """The first row ends with the token of a blank image, which belongs to no sample."""
    filled: bool = False
    """The packed row ends with tokens that belong to no sample, after a blank image's; they bring it to a length."""

    def lengths(self) -> tuple[tuple[int, ...], ...]:
        """For each row those of its samples; a blank image and padding come after them."""
        found = self._lengths()
        if self.filled:
            found = (found[0][:-1],)
        if not self.blank:
            return found
        first = found[0][:-1] if self.pack is not None else (found[0][0] - 1,)
        return (first, *found[1:])

    def _lengths(self) -> tuple[tuple[int, ...], ...]:
        if self.pack is not None:
            return self.pack.lengths
        if self.attention_mask_BT is not None:
            return tuple((int(length),) for length in self.attention_mask_BT.sum(-1).tolist())
        rows, width = self.input_ids_BT.shape
        return ((width,),) * rows

    def model_inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        positions = self.position_ids_BT
        if self.rotary_3BT is not None:
            positions = torch.cat([positions[None], self.rotary_3BT])
        inputs = {
            "input_ids": self.input_ids_BT,
            "position_ids": positions,
            "logits_to_keep": self.predicts_BT,
            "use_cache": False,
        }
        if self.pack is not None:
            inputs["pack"] = self.pack
        if self.attention_mask_BT is not None:
            inputs["attention_mask"] = self.attention_mask_BT
        if self.pixels is not None:
            inputs["pixel_values"] = self.pixels.values_P
            inputs["image_grid_thw"] = self.pixels.grid_N3
        return inputs


def collate(
    batch: MicroBatch,
    sample: Callable[[int], Sample],
    *,
    kind: RowKind,
    device: torch.device,
    images: ImageInputs | None = None,
    fill_to: Callable[[int], int] = lambda tokens: tokens,
) -> Batch:
    """Builds a micro-batch.

    Args:
        batch: rows of sample indices; empty for a filler.
        sample: gives the sample of an index.
        kind: packed rows carry boundaries, padded ones a mask.
        device: where the tensors go.
        images: makes the images' inputs; None: no sample of the data shows any.
        fill_to: from the tokens of a packed row to those it is filled up to.
    """
    # A filler is two tokens that nothing is learnt from; its one prediction gives the loss a graph to go back through.
    rows = [[sample(index) for index in row] for row in batch] or [[_FILLER]]
    shown = [image for row in rows for s in row for image in s.images]
    blank = images.blank if images is not None and not shown else None
    if blank is not None:
        rows[0].append(blank)
    width = max(sum(len(s.input_ids) for s in row) for row in rows)
    more = fill_to(width) - width if kind is RowKind.packed and batch else 0
    if more:
        rows[0].append(Sample("", np.zeros(more, np.int32), np.empty((0, 2), np.int32)))
        width += more
    rotary = np.zeros((3, len(rows), width), np.int64)
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
            # The blank image goes on where the sample before it ends: positions that begin anew begin a sample.
            begin = at if s is blank and kind is not RowKind.packed else 0
            positions[r, at:end] = np.arange(begin, begin + end - at)
            if images is not None and images.rotary_3d:
                rotary[:, r, at:end] = images.positions_3T(s) if s.images else positions[r, at:end]
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
        num_targets=len(targets_N) if batch else 0,
        num_tokens=int(filled.sum()) - (blank is not None) - more if batch else 0,
        rotary_3BT=torch.from_numpy(rotary).to(device) if images is not None and images.rotary_3d else None,
        pixels=None if images is None else images.pixels(shown).to(device),
        blank=blank is not None,
        filled=more > 0,
    )


_FILLER = Sample("", np.zeros(2, np.int32), np.array([[1, 2]], np.int32))


def _boundaries(rows: list[list[Sample]]) -> Pack:
    lengths = tuple(tuple(len(s.input_ids) for s in row) for row in rows)
    assert len({sum(row) for row in lengths}) == 1, "packed rows of one micro-batch have one length"
    return Pack(lengths)
