"""``report.html``: one page, nothing loaded from elsewhere, the same bytes for the same inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.samples import ShownSample

_WIDTH, _HEIGHT = 640, 140
_TEMPLATES = Path(__file__).parent / "templates"


def write_report(path: Path, manifest: Mapping[str, Any], samples: Sequence[ShownSample]) -> None:
    """Writes the page.

    Args:
        path: where to.
        manifest: as in ``manifest.json``.
        samples: to show with their loss spans.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    histograms = {name: _bars(entry["length_histogram"]) for name, entry in manifest["splits"].items()}
    page = environment.get_template("report.html.jinja").render(
        m=manifest, samples=samples, histograms=histograms, width=_WIDTH, height=_HEIGHT
    )
    path.write_text(page, encoding="utf-8", newline="\n")


def _bars(histogram: Mapping[str, int]) -> list[dict[str, Any]]:
    """Rectangles of an SVG, one a bin, in pixels."""
    top = max(histogram.values(), default=1)
    step = _WIDTH / max(1, len(histogram))
    bars = []
    for k, (edge, rows) in enumerate(histogram.items()):
        height = round(rows / top * _HEIGHT, 1)
        bars.append(
            {
                "x": round(k * step, 1),
                "y": round(_HEIGHT - height, 1),
                "width": round(max(1.0, step - 1), 1),
                "height": height,
                "edge": int(edge),
                "rows": rows,
            }
        )
    return bars
