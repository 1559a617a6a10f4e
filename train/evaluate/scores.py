"""From answers to figures. Pure: no model, no files."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One sample, its reference and what a model said."""

    id: str
    prompt: str
    reference: str
    answer: str | None
    """None where nothing was generated (plain text has no prompt to answer)."""
    nll: float
    """Negative log-likelihood (nats) summed over the sample's supervised tokens."""
    tokens: int
    """Supervised tokens."""

    @property
    def exact(self) -> bool | None:
        """Whether the answer is the reference, blanks at both ends aside."""
        return None if self.answer is None else self.answer.strip() == self.reference.strip()

    def to_json(self) -> dict[str, Any]:
        """One line of base.jsonl or tuned.jsonl."""
        return {**asdict(self), "exact": self.exact}


def perplexity(answers: Sequence[Answer]) -> float:
    """Exponential of the mean negative log-likelihood over all supervised tokens of all samples."""
    mean = sum(a.nll for a in answers) / sum(a.tokens for a in answers)
    return math.exp(mean) if mean < 700 else math.inf  # beyond the range of a float


def exact_match(answers: Sequence[Answer]) -> float | None:
    """Share of generated answers that equal their reference; None where none was generated."""
    judged = [a.exact for a in answers if a.exact is not None]
    return sum(judged) / len(judged) if judged else None


@dataclass(frozen=True)
class Confusion:
    """What a model answered instead of one reference."""

    reference: str
    total: int
    right: int
    answers: list[tuple[str, int]]
    """Wrong answers and how often they came, most frequent first."""


def worst_classes(answers: Sequence[Answer], limit: int = 12, answers_each: int = 4) -> list[Confusion]:
    """The references with the most wrong answers; empty where references hardly ever repeat (not a classification)."""
    by_reference: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        if answer.answer is not None:
            by_reference[answer.reference.strip()].append(answer)
    if not by_reference or sum(map(len, by_reference.values())) < 2 * len(by_reference):
        return []
    classes = []
    for reference, group in by_reference.items():
        wrong = Counter((a.answer or "").strip() for a in group if not a.exact)
        if wrong:
            ranked = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:answers_each]
            classes.append(Confusion(reference, len(group), len(group) - wrong.total(), ranked))
    return sorted(classes, key=lambda c: (c.right - c.total, c.right, c.reference))[:limit]


def figures(answers: Sequence[Answer]) -> dict[str, float | None]:
    """The figures of one model for summary.json."""
    return {"exact_match": exact_match(answers), "perplexity": perplexity(answers)}
