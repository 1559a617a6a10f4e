"""What the first rows of one source say about the whole of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from rich.filesize import decimal

from data_prep.clean import Cleaner
from data_prep.dataset import Preview
from data_prep.records import Reject
from data_prep.render import Renderer
from data_prep.rendered import AnySample, PairSample, Sample, VoteSample
from data_prep.summary import labelled, listed

SHOWN_REJECTS = 2
"""Of each reason."""


@dataclass
class Outlook:
    """A source's first rows, cleaned and rendered."""

    preview: Preview
    samples: list[AnySample] = field(default_factory=list)
    kept: int = 0
    """Rows that gave a sample, or several."""
    rejects: list[Reject] = field(default_factory=list)
    changed: Counter[str] = field(default_factory=Counter)
    """What cleaning changed -> how often."""

    @property
    def read(self) -> int:
        """Rows read."""
        return len(self.preview.items)

    @property
    def is_whole(self) -> bool:
        """Whether these are all rows of the source."""
        return self.preview.bytes_read >= self.preview.source.bytes

    @property
    def factor(self) -> float:
        """How many times the rows read are in the whole source, by its bytes."""
        return 1.0 if self.is_whole else self.preview.source.bytes / max(1, self.preview.bytes_read)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample; of a pair, those of both its conversations."""
        return [sum(len(each.input_ids) for each in sequences(sample)) for sample in self.samples]

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return sum(each.supervised for sample in self.samples for each in sequences(sample))

    @property
    def cut(self) -> list[int]:
        """Tokens cut away, of each sequence that was too long."""
        return [each.cut for sample in self.samples for each in sequences(sample) if each.cut]

    @property
    def by_reason(self) -> dict[str, list[Reject]]:
        """The rows left out, the commonest reason first."""
        found: dict[str, list[Reject]] = {}
        for reject in self.rejects:
            found.setdefault(reject.reason, []).append(reject)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        source, lengths = self.preview.source, self.lengths
        return {
            "source": source.name,
            "path": source.path,
            "bytes": source.bytes,
            "split": self.preview.split,
            "read_as": self.preview.recognised,
            "rows_read": self.read,
            "is_whole": self.is_whole,
            "kept": self.kept,
            "left_out": {
                reason: {
                    "rows": len(rows),
                    "first": [
                        {"file": r.origin.file, "line": r.origin.line, "detail": r.detail} for r in rows[:SHOWN_REJECTS]
                    ],
                }
                for reason, rows in self.by_reason.items()
            },
            "cut": {"sequences": len(self.cut), "tokens": sum(self.cut)},
            "changed": dict(self.changed),
            "tokens": {"mean": fmean(lengths), "median": median(lengths), "max": max(lengths)} if lengths else None,
            "supervised_share": self.supervised / sum(lengths) if lengths else None,
            "estimated_rows": round(self.read * self.factor),
            "estimated_tokens": round(sum(lengths) * self.factor),
        }

    def lines(self) -> list[str]:
        """As the terminal shows it."""
        source, lengths = self.preview.source, self.lengths
        split = f", {self.preview.split}" if self.preview.split else ""
        lines = [f"{source.path} ({decimal(source.bytes)}{split})", labelled("read as", self.preview.recognised)]
        rows = f"{self.read:,} read{', all there are' if self.is_whole else ''}: {self.kept:,} kept"
        lines.append(labelled("rows", rows + (f", {len(self.rejects):,} left out" if self.rejects else "")))
        lines += [labelled("", _reason(reason, rejects)) for reason, rejects in self.by_reason.items()]
        if self.cut:
            lines.append(labelled("cut", f"{len(self.cut):,} to max_length, {sum(self.cut):,} tokens away"))
        if self.changed:
            lines.append(labelled("cleaned", ", ".join(f"{count:,} {what}" for what, count in self.changed.items())))
        if lengths:
            figures = f"mean {fmean(lengths):,.0f}, median {median(lengths):,.0f}, longest {max(lengths):,}"
            lines.append(labelled("tokens", f"{figures}; {self.supervised / sum(lengths):.0%} supervised"))
        if not self.is_whole:
            whole = f"about {self.read * self.factor:,.0f} rows, {sum(lengths) * self.factor:,.0f} tokens"
            lines.append(labelled("the whole", whole))
        return [*lines[:1], *(f"  {line}" for line in lines[1:]), ""]


def _reason(reason: str, rejects: Sequence[Reject]) -> str:
    shown = [f"{reject.origin}" + (f" ({reject.detail})" if reject.detail else "") for reject in rejects]
    return f"{len(rejects):,} {reason}: {listed(shown, SHOWN_REJECTS)}"


def sequences(sample: AnySample) -> Iterator[Sample]:
    """The sequences of tokens that a sample is made of."""
    if isinstance(sample, PairSample):
        yield from (sample.chosen, sample.rejected)
    else:
        yield sample.sample if isinstance(sample, VoteSample) else sample


def outlook(preview: Preview, cleaner: Cleaner, renderer: Renderer) -> Outlook:
    """Cleans and renders the rows of a preview, as a preparation would."""
    found, before = Outlook(preview), Counter(cleaner.masked)
    cleaned = [item if isinstance(item, Reject) else cleaner(item) for item in preview.items]
    found.changed = Counter(cleaner.masked) - before
    rendered = iter(renderer.render([item for item in cleaned if not isinstance(item, Reject)]))
    for item in cleaned:
        results = [item] if isinstance(item, Reject) else next(rendered)
        samples = [each for each in results if not isinstance(each, Reject)]
        found.samples += samples
        found.rejects += [each for each in results if isinstance(each, Reject)]
        found.kept += bool(samples)
    return found
