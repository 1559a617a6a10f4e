"""A folder of prepared data in a dozen lines; ``report.html`` has the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN_SOURCES = 5
SHOWN_NOTES = 3
_LABEL = 11


def summary_lines(manifest: Mapping[str, Any], folder: Path) -> list[str]:
    """What a person wants to know of prepared data, a line each.

    Args:
        manifest: as in ``manifest.json``.
        folder: of the prepared data; for the paths of what to read next.
    """
    splits = manifest["splits"]
    lines = [line for name, entry in splits.items() for line in _split(name, entry)]
    if images := manifest.get("images"):
        shown = sum(entry.get("images", 0) for entry in splits.values())
        lines.append(labelled("images", f"{shown:,} shown, {images['files']:,} files, {images['bytes'] / 1e6:,.1f} MB"))
    lines += _mixture(manifest.get("mix") or {})
    lines.append(labelled("left out", left_out(manifest, folder)))
    lines += _duplicates(manifest.get("duplicates") or {})
    cut = [entry["truncated"] for entry in splits.values() if entry.get("truncated")]
    if rows := sum(each["rows"] for each in cut):
        lines.append(
            labelled("cut", f"{rows:,} rows to max_length, {sum(each['tokens'] for each in cut):,} tokens away")
        )
    if cleaned := [f"{count:,} {what}" for what, count in (manifest.get("cleaned") or {}).items() if count]:
        lines.append(labelled("cleaned", listed(cleaned, 6)))
    lines += _fill(splits.get("train", {}).get("packing_fill") or {})
    notes = manifest.get("notes", [])
    lines += [labelled("note", note) for note in notes[:SHOWN_NOTES]]
    more = f"; {len(notes) - SHOWN_NOTES} more notes there" if len(notes) > SHOWN_NOTES else ""
    return [*lines, labelled("report", f"{folder / 'report.html'}{more}")]


def left_out(manifest: Mapping[str, Any], folder: Path) -> str:
    """How many rows were left out, by reason, and where each stands."""
    rejects = manifest["rejects"]
    if not rejects["total"]:
        return "nothing"
    reasons = listed([f"{count:,} {reason}" for reason, count in rejects["by_reason"].items()], 4)
    return f"{rejects['total']:,} rows: {reasons}; see {folder / 'rejects.jsonl'}"


def listed(items: Sequence[str], most: int) -> str:
    """``a, b and 3 more``."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _split(name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    yield labelled(name, _counts(entry) + f", longest {entry['max_length']:,}")
    sources = entry.get("by_source") or {}
    if name != "train" or len(sources) < 2:
        return
    for source, counts in list(sources.items())[:SHOWN_SOURCES]:
        yield labelled("", f"{source}: {_counts(counts)}")
    if len(sources) > SHOWN_SOURCES:
        yield labelled("", f"and {len(sources) - SHOWN_SOURCES} more sources")


def _counts(entry: Mapping[str, Any]) -> str:
    share = entry["supervised_tokens"] / max(1, entry["tokens"])
    return f"{entry['rows']:,} rows, {entry['tokens']:,} tokens, {share:.0%} supervised"


def _mixture(mix: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    if mix:
        shown = [f"{source} {entry['epochs']:.3g} times" for source, entry in mix.items()]
        tokens = sum(entry["tokens"] for entry in mix.values())
        yield labelled("mixture", f"an epoch shows {listed(shown, SHOWN_SOURCES)}: {tokens:,} tokens")


def _duplicates(counts: Mapping[str, int]) -> Iterator[str]:
    across = f"{counts.get('across_splits', 0):,} across splits"
    if counts.get("removed"):
        kinds = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("exact", "near") if kind in counts)
        yield labelled("duplicates", f"{counts['removed']:,} removed ({kinds}; {across})")
    elif counts.get("exact"):
        yield labelled("duplicates", f"{counts['exact']:,} rows repeat another, {across}; dedup=exact takes them out")


def _fill(fills: Mapping[str, float]) -> Iterator[str]:
    if fills:
        yield labelled("packing", "fill " + ", ".join(f"{fill:.1%} at {length}" for length, fill in fills.items()))


def labelled(label: str, text: str) -> str:
    """A line of a summary: what it is about, then the figures."""
    return f"{label:<{_LABEL}} {text}"
