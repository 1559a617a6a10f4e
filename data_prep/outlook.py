"""What the first rows of one source say about the whole of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from rich.filesize import decimal

from data_prep.clean import Cleaner
from data_prep.counts import Counts
from data_prep.dataset import Preview
from data_prep.records import Reject
from data_prep.render import Renderer
from data_prep.rendered import AnySample
from data_prep.shards import kind_of_record
from data_prep.summary import labelled, listed

SHOWN_SAMPLES = 2
SHOWN_REJECTS = 2
"""Of each reason."""


@dataclass
class Outlook:
    """A source's first rows, cleaned and rendered."""

    preview: Preview
    samples: list[AnySample] = field(default_factory=list)
    """The first few."""
    counts: Counts = field(default_factory=Counts)
    """Of all samples."""
    kept: int = 0
    """Rows that gave a sample, or several."""
    kinds: set[str] = field(default_factory=set)
    """Of data that the rows become: samples, pairs, votes."""
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
    def tokens(self) -> float:
        """Of the whole source, about."""
        return self.counts.tokens * self.factor

    @property
    def by_reason(self) -> dict[str, list[Reject]]:
        """The rows left out, the commonest reason first."""
        found: dict[str, list[Reject]] = {}
        for reject in self.rejects:
            found.setdefault(reject.reason, []).append(reject)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        source, counts = self.preview.source, self.counts
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
            "truncated": {"rows": counts.cut_rows, "tokens": counts.cut_tokens},
            "changed": dict(self.changed),
            "tokens": _lengths(counts),
            "supervised_share": counts.supervised / counts.tokens if counts.tokens else None,
            "estimated_rows": round(self.read * self.factor),
            "estimated_tokens": round(self.tokens),
        }

    def lines(self) -> list[str]:
        """As the terminal shows it."""
        source, counts = self.preview.source, self.counts
        split = f", {self.preview.split}" if self.preview.split else ""
        lines = [f"{source.path} ({decimal(source.bytes)}{split})", labelled("read as", self.preview.recognised)]
        rows = f"{self.read:,} read{', all there are' if self.is_whole else ''}: {self.kept:,} kept"
        lines.append(labelled("rows", rows + (f", {len(self.rejects):,} left out" if self.rejects else "")))
        lines += [labelled("", _reason(reason, rejects)) for reason, rejects in self.by_reason.items()]
        if counts.cut_rows:
            lines.append(labelled("cut", f"{counts.cut_rows:,} to max_length, {counts.cut_tokens:,} tokens away"))
        if self.changed:
            lines.append(labelled("cleaned", ", ".join(f"{count:,} {what}" for what, count in self.changed.items())))
        if lengths := _lengths(counts):
            figures = ", ".join(f"{what} {length:,.0f}" for what, length in lengths.items())
            lines.append(labelled("tokens", f"{figures}; {counts.supervised / counts.tokens:.0%} supervised"))
        if not self.is_whole:
            whole = f"about {self.read * self.factor:,.0f} rows, {self.tokens:,.0f} tokens"
            lines.append(labelled("the whole", whole))
        return [*lines[:1], *(f"  {line}" for line in lines[1:]), ""]


def _lengths(counts: Counts) -> dict[str, float]:
    """Mean, median and longest of the token sequences; {} where there are none."""
    if not counts.lengths:
        return {}
    lengths = sorted(counts.lengths.elements())
    return {"mean": fmean(lengths), "median": median(lengths), "longest": lengths[-1]}


def _reason(reason: str, rejects: Sequence[Reject]) -> str:
    shown = [f"{reject.origin}" + (f" ({reject.detail})" if reject.detail else "") for reject in rejects]
    return f"{len(rejects):,} {reason}: {listed(shown, SHOWN_REJECTS)}"


def outlook(preview: Preview, cleaner: Cleaner, renderer: Renderer) -> Outlook:
    """Cleans and renders the rows of a preview, as a preparation would."""
    found, before = Outlook(preview), Counter(cleaner.masked)
    cleaned = list(map(cleaner, preview.items))
    found.changed = Counter(cleaner.masked) - before
    rendered = iter(renderer.render([item for item in cleaned if not isinstance(item, Reject)]))
    for item in cleaned:
        results = [item] if isinstance(item, Reject) else next(rendered)
        samples = [each for each in results if not isinstance(each, Reject)]
        found.samples += samples[: SHOWN_SAMPLES - len(found.samples)]
        for sample in samples:
            found.counts.add(sample)
        found.rejects += [each for each in results if isinstance(each, Reject)]
        found.kept += bool(samples)
        if not isinstance(item, Reject):
            found.kinds.add(kind_of_record(item))
    return found
