"""`crosstune prep --dry-run`: reads the first rows of each source and says what would happen. Writes nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.compose import build
from configs.errors import CrosstuneError
from configs.schema.dataset import MixDatasetConfig
from configs.schema.roots import PrepConfig
from data_prep.clean import Cleaner
from data_prep.counts import Counts, split_entry
from data_prep.dataset import SPLITS, Dataset, RowsDataset
from data_prep.job import renderer_for
from data_prep.mixture import epochs_per_source
from data_prep.outlook import SHOWN_SAMPLES, Outlook, outlook
from data_prep.render import Renderer
from data_prep.rendered import AnySample, PairSample, VoteSample
from data_prep.samples import Decode, ShownSample, ShownText, shown_text, visible
from data_prep.shards import sequences
from data_prep.summary import labelled
from data_prep.terminal import legend, print_line, print_sample
from data_prep.verdict import doubts_of, faults_of, untold_of

ROWS = 100
"""Of each file."""
ALL_ROWS = 2000
"""Of all files together; of very many files fewer rows are read."""
_OUTLOOKS_SHOWN = 8


@dataclass(frozen=True)
class DryRun:
    """What a preparation would do."""

    outlooks: list[Outlook]
    rows_per_second: float
    """Of cleaning, rendering and tokenizing in this process."""
    splits: dict[str, int]
    """Rows of each split, about."""
    epochs: dict[str, float]
    """Of a mixture: how often an epoch shows each source, about."""
    fills: dict[str, float]
    """Row length -> packing fill, about."""
    samples: list[ShownSample]
    notes: list[str]
    faults: list[CrosstuneError]
    """Why a preparation would certainly stop."""
    doubts: list[str]
    """What would probably go wrong."""
    untold: list[str]
    """What these rows cannot tell."""

    @property
    def rows(self) -> int:
        """Rows of all sources, about."""
        return round(sum(each.read * each.factor for each in self.outlooks))

    @property
    def tokens(self) -> int:
        """Tokens of all sources, about."""
        return round(sum(each.tokens for each in self.outlooks))

    def to_json(self) -> dict[str, Any]:
        """For machines; without the faults, which have a form of their own."""
        return {
            "sources": [each.to_json() for each in self.outlooks],
            "estimated_rows": self.rows,
            "estimated_tokens": self.tokens,
            "rows_per_second": self.rows_per_second,
            "splits": self.splits,
            "mixture_epochs": self.epochs,
            "packing_fill": self.fills,
            "samples": [sample.to_json() for sample in self.samples],
            "notes": self.notes,
            "doubts": self.doubts,
            "cannot_be_told": self.untold,
        }

    def lines(self) -> list[str]:
        """All but the samples, as the terminal shows it."""
        lines = [line for each in self.outlooks[:_OUTLOOKS_SHOWN] for line in each.lines()]
        if more := len(self.outlooks) - _OUTLOOKS_SHOWN:
            lines += [f"and {more} more files", ""] if more > 0 else []
        seconds = self.rows / self.rows_per_second if self.rows_per_second else 0
        time_needed = f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min"
        lines.append(
            labelled(
                "in all",
                f"about {self.rows:,} rows and {self.tokens:,} tokens; {time_needed} in one process, "
                f"at {self.rows_per_second:,.0f} rows/s",
            )
        )
        figures = {
            "splits": [f"{name} about {count:,}" for name, count in self.splits.items()],
            "mixture": [f"{name} {times:.3g} times" for name, times in self.epochs.items()],
            "packing": [f"{share:.1%} full at {length}" for length, share in self.fills.items()],
        }
        lines += [labelled(label, ", ".join(parts)) for label, parts in figures.items() if parts]
        lines += [labelled("note", note) for note in self.notes]
        lines += [labelled("doubt", doubt) for doubt in self.doubts]
        return lines + ([labelled("not known", ", ".join(self.untold))] if self.untold else [])

    def show(self, console: Console) -> None:
        """Prints it, the figures last: samples may be long."""
        if self.samples:
            print_line(console, legend(console))
        for sample in self.samples:
            print_sample(console, sample)
        print_line(console, "")
        for line in self.lines():
            print_line(console, visible(line))


def dry_run(cfg: PrepConfig, model_dir: Path) -> DryRun:
    """Reads, cleans and renders the first rows of each file.

    Args:
        cfg: the resolved config.
        model_dir: local folder of the model whose tokenizer and template are used.

    Raises:
        DataError: a source cannot be read, or its format cannot be told.
        ModelError: tokenizer or chat template is missing.
    """
    dataset = build(cfg.dataset, Dataset, seed=cfg.seed)
    previews = dataset.preview(max(5, min(ROWS, ALL_ROWS // len(dataset.parts()))))
    renderer = renderer_for(cfg, model_dir)()
    cleaner = Cleaner(cfg.clean)
    outlooks = [outlook(preview, cleaner, renderer) for preview in previews]
    shown_above = tuple(f"read as {preview.recognised}" for preview in previews)
    notes = [note for note in dataset.notes if not note.endswith(shown_above)]
    notes += [*(f"{what}: {count:,}" for what, count in sorted(renderer.notes.items()))]
    shares = _shares(dataset, cfg, outlooks)
    splits = _splits(outlooks, shares)
    epochs, faults = _mixture(cfg, outlooks, shares)
    return DryRun(
        outlooks,
        _rows_per_second(outlooks, cleaner, renderer),
        {name: round(count) for name, count in splits.items()},
        epochs,
        _fills(cfg, outlooks),
        _shown(outlooks, renderer.decode),
        notes,
        [*faults_of(cfg, outlooks, splits), *faults],
        doubts_of(cfg, outlooks),
        untold_of(cfg, outlooks, splits),
    )


def _rows_per_second(outlooks: Sequence[Outlook], cleaner: Cleaner, renderer: Renderer) -> float:
    """Measured on rows that were rendered once already: the first time, libraries and template are set up."""
    previews = [each.preview for each in sorted(outlooks, key=lambda each: -each.preview.source.bytes)[:3]]
    begin = time.perf_counter()
    for preview in previews:
        outlook(preview, cleaner, renderer)
    return sum(len(preview.items) for preview in previews) / max(1e-9, time.perf_counter() - begin)


def _shares(dataset: Dataset, cfg: PrepConfig, outlooks: Sequence[Outlook]) -> list[dict[str, float]]:
    """For each source, the share of its rows that a split gets."""
    holdouts = {part.source.path: part.holdout for part in dataset.parts()}
    shares = []
    for each in outlooks:
        holdout = holdouts.get(each.preview.source.path)
        held_out = {"validation": holdout.validation, "test": holdout.test} if holdout else {}
        if isinstance(dataset, RowsDataset):  # it decides row by row; its config says what it aims at
            held_out = {name: getattr(cfg.dataset, f"{name}_fraction", 0.0) for name in SPLITS[1:]}
        if each.preview.split is not None:
            shares.append({each.preview.split: 1.0})
        else:
            shares.append({SPLITS[0]: 1 - sum(held_out.values()), **held_out})
    return shares


def _splits(outlooks: Sequence[Outlook], shares: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Kept rows of each split that has any, about."""
    found = dict.fromkeys(SPLITS, 0.0)
    for each, share in zip(outlooks, shares, strict=True):
        for name in share:
            found[name] += each.kept * each.factor * share[name]
    return {name: rows for name, rows in found.items() if rows}


def _mixture(
    cfg: PrepConfig, outlooks: Sequence[Outlook], shares: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], list[CrosstuneError]]:
    if not isinstance(cfg.dataset, MixDatasetConfig):
        return {}, []
    tokens = dict.fromkeys(cfg.dataset.source_configs(), 0.0)
    for each, share in zip(outlooks, shares, strict=True):
        tokens[each.preview.source.name] += each.tokens * share.get("train", 0.0)
    try:
        return epochs_per_source(cfg.dataset, {name: round(count) for name, count in tokens.items()}), []
    except CrosstuneError as fault:
        return {}, [fault]


def _fills(cfg: PrepConfig, outlooks: Sequence[Outlook]) -> dict[str, float]:
    """Packing fill if all rows were like the first ones."""
    whole = Counts()
    for each in outlooks:
        times = max(1, round(each.factor))
        whole.lengths.update({length: count * times for length, count in each.counts.lengths.items()})
    fills: dict[str, float] = split_entry({"": whole}, cfg.max_length, [])["packing_fill"] if whole.lengths else {}
    return fills


def _shown(outlooks: Sequence[Outlook], decode: Decode) -> list[ShownSample]:
    """The first sample of each of the first sources, or two of the only one."""
    ranked = [
        (rank, number, sample) for number, each in enumerate(outlooks) for rank, sample in enumerate(each.samples)
    ]
    chosen = sorted(ranked, key=lambda entry: entry[:2])[:SHOWN_SAMPLES]
    return [_shown_sample(sample, outlooks[number].preview.split or "", decode) for _, number, sample in chosen]


def _shown_sample(sample: AnySample, split: str, decode: Decode) -> ShownSample:
    texts: list[ShownText] = [
        shown_text(each.input_ids, [edge for span in each.spans for edge in span], decode) for each in sequences(sample)
    ]
    rejected = texts[1] if isinstance(sample, PairSample) else None
    return ShownSample(sample.id, split, texts[0], rejected, sample.liked if isinstance(sample, VoteSample) else None)
