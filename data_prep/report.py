"""``report.html``: one page, nothing loaded from elsewhere, the same bytes for the same inputs.

Shows what the manifest has: a key that is not there leaves its section out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.samples import ShownSample, first_rejects, place, visible

WIDTH, HEIGHT = 640, 120
"""Of a histogram, in pixels."""
SHOWN_ROWS = 50
"""Sources and notes; there may be thousands."""
SHOWN_CHARACTERS = 6000
"""Of a piece of a sample; longer ones are cut in the middle."""
SHOWN_REJECTS = 3
"""Of each reason."""
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(path: Path, manifest: Mapping[str, Any], samples: Sequence[ShownSample]) -> None:
    """Writes the page.

    Args:
        path: where to; ``rejects.jsonl`` lies beside it, if rows were left out.
        manifest: as in ``manifest.json``.
        samples: to show with their loss spans.

    Raises:
        DataError: ``rejects.jsonl`` cannot be read.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"n": "{:,}".format, "percent": "{:.1%}".format, "visible": visible, "shortened": _shortened}
    page = environment.get_template("report.html.jinja").render(
        m=manifest,
        samples=samples,
        histograms=_histograms(manifest["splits"]),
        tokens=_tokens(manifest),
        mix=_shares(manifest.get("mix", {})),
        fills=_fills(manifest),
        rejects=_rejects(path.parent, manifest.get("rejects", {})),
        changed=_changed(manifest),
        cuts=any((entry.get("truncated") or {}).get("rows") for entry in manifest["splits"].values()),
        width=WIDTH,
        height=HEIGHT,
        shown=SHOWN_ROWS,
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _shortened(text: str) -> str:
    half, more = SHOWN_CHARACTERS // 2, len(text) - SHOWN_CHARACTERS
    return text if more <= 0 else f"{text[:half]} [… {more:,} characters …] {text[-half:]}"


def _tokens(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per split and source with its share of all tokens; [] where there is but one line."""
    lines = [
        {"split": split, "source": source, **counts}
        for split, entry in manifest["splits"].items()
        for source, counts in entry.get("by_source", {}).items()
    ]
    whole = sum(line["tokens"] for line in lines)
    return [{**line, "share": line["tokens"] / whole} for line in lines] if lines[1:] and whole else []


def _shares(mix: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line per source of the mixture with its share of an epoch's tokens."""
    whole = sum(entry["tokens"] for entry in mix.values())
    return [{"source": name, **entry, "share": entry["tokens"] / max(1, whole)} for name, entry in mix.items()]


def _fills(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Packing fill per split and row length: ``{"lengths": [...], "splits": {name: [fill or None, ...]}}``."""
    found = {name: entry["packing_fill"] for name, entry in manifest["splits"].items() if entry.get("packing_fill")}
    lengths = sorted({length for fills in found.values() for length in fills}, key=int)
    return {"lengths": lengths, "splits": {name: [fills.get(k) for k in lengths] for name, fills in found.items()}}


def _rejects(folder: Path, rejects: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line per reason, the commonest first, with its first rows."""
    by_reason = rejects.get("by_reason", {})
    first = first_rejects(folder, by_reason, SHOWN_REJECTS) if by_reason else {}
    most = max(by_reason.values(), default=1)
    return [
        {
            "reason": reason,
            "rows": rows,
            "share": rows / most,
            "first": [(place(row), row.get("detail", "")) for row in first[reason]],
        }
        for reason, rows in by_reason.items()
    ]


def _changed(manifest: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Counts of what was done to rows: duplicates, cleaning."""
    duplicates = manifest.get("duplicates") or {}
    words = {
        "exact": "exact duplicates",
        "near": "near duplicates",
        "across_splits": "duplicates across splits",
        "removed": "duplicates removed",
    }
    lines = [(word, duplicates[key]) for key, word in words.items() if key in duplicates]
    return lines + [item for item in (manifest.get("cleaned") or {}).items() if item[1]]


def _histograms(splits: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Split -> rectangles of an SVG, in pixels: one a bin, over the same lengths for all splits."""
    found = {name: entry["length_histogram"] for name, entry in splits.items() if entry.get("length_histogram")}
    edges = sorted({int(edge) for histogram in found.values() for edge in histogram})
    return {name: _bars([(edge, histogram.get(str(edge), 0)) for edge in edges]) for name, histogram in found.items()}


def _bars(bins: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """`bins`: (upper edge, sequences in it)."""
    top = max(1, max(count for _, count in bins))
    step = WIDTH / len(bins)
    bars = []
    for k, (edge, count) in enumerate(bins):
        height = round(count / top * HEIGHT, 1)
        bars.append(
            {
                "x": round(k * step, 1),
                "y": round(HEIGHT - height, 1),
                "width": round(max(1.0, step - 1), 1),
                "height": height,
                "edge": edge,
                "count": count,
            }
        )
    return bars
