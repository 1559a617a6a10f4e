"""Joins a split with the plan: what each rank computes in a global step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from train.data.collate import Batch, collate
from train.data.images import ImageInputs
from train.data.plan import BatchPlan, MicroBatch, RowKind, cut, layout
from train.data.prepared import PreparedSplit

ROW_LENGTHS = 16
"""About so many lengths of rows there are where each new one costs."""


def fill_step(least: int, longest: int, *, batch_tokens: int, world_size: int, micro_batch_tokens: int) -> int:
    """Tokens that packed rows are filled up to a multiple of, so that they have few lengths and waste little.

    Args:
        least: the device's `row_step`; 1 fills nothing up.
        longest: tokens of the longest sample.
        batch_tokens: of a global step.
        world_size: ranks that share it.
        micro_batch_tokens: most tokens of a row.
    """
    if least == 1:
        return 1
    dealt = max(longest, math.ceil(batch_tokens / world_size))
    return least * max(1, math.ceil(min(micro_batch_tokens, dealt) / (ROW_LENGTHS * least)))


@dataclass(frozen=True)
class RowLayout:
    """How samples become rows on one rank of many; nothing here changes which samples a step holds."""

    rank: int
    world_size: int
    micro_batch_tokens: int
    kind: RowKind
    device: torch.device
    images: ImageInputs | None = None
    """None: no sample of the data shows an image."""
    step: int = 1
    """Packed rows are filled up to a multiple of so many tokens, and to no more than `micro_batch_tokens`."""

    def fill_to(self, tokens: int) -> int:
        """Length of a packed row whose samples have so many tokens."""
        return max(tokens, min(-(-tokens // self.step) * self.step, self.micro_batch_tokens))


@dataclass(frozen=True)
class GlobalStep:
    """The figures of a step over all ranks, and this rank's share of it."""

    samples: np.ndarray
    num_tokens: int
    num_targets: int
    """Supervised tokens over all ranks and micro-batches: what the loss sum is divided by."""
    micro_batches: list[MicroBatch]


class StepSampler:
    """The global steps of training."""

    def __init__(self, split: PreparedSplit, plan: BatchPlan, rows: RowLayout) -> None:
        self.split, self.plan, self.rows = split, plan, rows

    def step(self, step: int) -> GlobalStep:
        """What a global step consists of; pure, so that resuming at any step costs nothing."""
        return share_of(self.split, self.plan.samples(step), self.rows)

    def batches(self, step: GlobalStep) -> Iterator[Batch]:
        """This rank's tensors, built one at a time."""
        return batches_of(self.split, step, self.rows)

    def data_hash(self, step: GlobalStep) -> str:
        """Hash over the ids and images of all samples of the step in order: equal hashes, equal data."""
        digest = hashlib.blake2b(digest_size=8)
        for index in step.samples:
            sample = self.split[int(index)]
            digest.update(np.ascontiguousarray(sample.input_ids).tobytes())
            for image in sample.images:
                digest.update(image.sha256.encode())
        return digest.hexdigest()


def share_of(split: PreparedSplit, samples: np.ndarray, rows: RowLayout) -> GlobalStep:
    """This rank's share of a set of samples."""
    ranks = layout(
        samples,
        split.lengths,
        world_size=rows.world_size,
        micro_batch_tokens=rows.micro_batch_tokens,
        kind=rows.kind,
    )
    return GlobalStep(
        samples=samples,
        num_tokens=int(split.lengths[samples].sum()),
        num_targets=int(split.supervised[samples].sum()),
        micro_batches=ranks[rows.rank],
    )


def batches_of(split: PreparedSplit, step: GlobalStep, rows: RowLayout) -> Iterator[Batch]:
    """Tensors of this rank's micro-batches."""
    same: Any = {"kind": rows.kind, "device": rows.device, "images": rows.images, "fill_to": rows.fill_to}
    for micro_batch in step.micro_batches:
        yield collate(micro_batch, split.__getitem__, **same)


def chunks(split: PreparedSplit, batch_tokens: int) -> Iterator[np.ndarray]:
    """The whole split in order, in sets of at most `batch_tokens` tokens (at least one sample): for evaluation."""
    for start, stop in pairwise(cut(split.lengths, batch_tokens).tolist()):
        yield np.arange(start, stop)
