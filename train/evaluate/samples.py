"""The held-out samples as evaluation sees them: a prompt, and the answer that should follow it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import DataError
from train.data.prepared import DataKind, ImageRef, PreparedData


@dataclass(frozen=True)
class Sample:
    """One tokenised sample of a prepared split."""

    id: str
    """Where it came from, ``file:line`` or the like."""
    input_ids: list[int]
    spans: list[tuple[int, int]]
    """Supervised token ranges ``[start, end)``, sorted and disjoint; index 0 is never supervised."""
    images: tuple[ImageRef, ...] = ()
    """In the order of their tokens."""

    @property
    def answer_start(self) -> int:
        """Index of the answer's first token; the answer is the last supervised span."""
        return self.spans[-1][0]

    @property
    def prompt(self) -> list[int]:
        """All tokens before the answer; earlier supervised turns are part of it."""
        return self.input_ids[: self.answer_start]

    @property
    def answer(self) -> list[int]:
        """Tokens of the answer; the last one is the token that ends it."""
        return self.input_ids[self.answer_start : self.spans[-1][1]]

    @property
    def has_prompt(self) -> bool:
        """Whether there is something to answer: plain text is supervised from its second token on."""
        return self.answer_start > 1

    @property
    def prompt_targets(self) -> list[int]:
        """Indices of the supervised tokens inside the prompt (earlier assistant turns)."""
        return [i for start, end in self.spans[:-1] for i in range(start, end)]

    @property
    def targets(self) -> list[int]:
        """Indices of all supervised tokens; token i is predicted by the logits at i - 1."""
        return [i for start, end in self.spans for i in range(start, end)]


def read_samples(data: Path, split: str, limit: int = 0) -> list[Sample]:
    """Reads a split of prepared data, in its stored order, leaving out samples without supervised tokens.

    Args:
        data: folder made by `crosstune prep`.
        split: ``train``, ``validation`` or ``test``.
        limit: only the first so many samples; 0: all.

    Raises:
        DataError: data of another kind, no such split, or nothing in it to measure.
    """
    prepared = PreparedData.open(data).require(DataKind.samples, "evaluation")
    if split not in prepared.split_names():
        raise DataError(
            f"eval.split={split}",
            f"{data} has no such split",
            allowed=", ".join(prepared.split_names()),
            remedy="set dataset.test_fraction or dataset.test_path and prepare again",
        )
    rows = prepared.split(split)
    samples = []
    for i in range(len(rows)):
        row = rows[i]
        if len(row.spans):
            spans = [(int(start), int(end)) for start, end in row.spans]
            samples.append(Sample(row.id, row.input_ids.tolist(), spans, row.images))
        if limit and len(samples) == limit:
            break
    if not samples:
        raise DataError(f"{data}/{split}", "no sample with supervised tokens", remedy="prepare data that has answers")
    return samples


def batches(samples: Sequence[Sample], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of samples in batches of like length, longest first, at most `batch_tokens` tokens with padding."""
    order = sorted(range(len(samples)), key=lambda i: (-len(samples[i].input_ids), i))
    batch: list[int] = []
    for i in order:
        longest = len(samples[batch[0] if batch else i].input_ids)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
