"""Charts as SVG text for a self-contained page. No pyplot: nothing global, no display."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, ORANGE, GREY, INK = "#2f6db3", "#d9722b", "#a9bdd6", "#4a5563"
MAX_POINTS = 800
"""A curve is thinned to so many points: more are not seen, and the page stays small."""
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "svg.hashsalt": "crosstune",  # the same run gives the same page
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#d5dbe3",
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#edf0f4",
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": "#1d232b",
    "legend.frameon": False,
}
Points = Sequence[tuple[float, float]]


def thinned(points: Points) -> Points:
    """At most `MAX_POINTS` of them, evenly, the last always among them."""
    if len(points) <= MAX_POINTS:
        return points
    stride = -(-len(points) // (MAX_POINTS - 1))
    return [*points[:-1:stride], points[-1]]


def smoothed(points: Points, share: float = 0.05) -> Points:
    """The mean around each point over `share` of all points."""
    half = max(1, round(len(points) * share / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        out.append((x, (sums[high] - sums[low]) / (high - low)))
    return out


def loss_chart(steps: Points, validation: Points) -> str:
    """Training loss, its running mean, and the validation loss where it was measured."""

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*thinned(steps), strict=True), color=GREY, linewidth=0.8, label="each step")
        axes.plot(*zip(*thinned(smoothed(steps)), strict=True), color=BLUE, linewidth=1.8, label="running mean")
        if validation:
            axes.plot(*zip(*validation, strict=True), "o-", color=ORANGE, markersize=3, label="validation")
        axes.legend(loc="upper right")
        axes.set_ylim(bottom=0)

    return _svg(draw, "Loss per supervised token (nats)", "step", width=8.6, height=2.9)


def line_chart(points: Points, title: str, *, mean: bool = False) -> str:
    """One curve over the steps, from zero; `mean` adds its mean as a dashed line."""
    average = fmean(y for _, y in points)

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*thinned(points), strict=True), color=BLUE, linewidth=1.4)
        if mean:
            axes.axhline(average, color=ORANGE, linewidth=1.2, linestyle="--")
        axes.set_ylim(bottom=0, top=max(y for _, y in points) * 1.12 or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))

    return _svg(draw, f"{title} (mean {average:,.0f})" if mean else title, "step", width=4.2, height=2.3)


def histogram_chart(histograms: Mapping[str, Mapping[str, int]]) -> str:
    """Lengths of the samples of each split; the keys of a histogram are the upper edges of its bins, in tokens."""

    def draw(axes: Axes) -> None:
        bottoms: dict[int, int] = {}
        edges = sorted({int(edge) for histogram in histograms.values() for edge in histogram})
        width = min((b - a for a, b in zip(edges, edges[1:], strict=False)), default=max(edges))
        colours = (BLUE, ORANGE, "#7a9e3b")
        for (name, histogram), colour in zip(histograms.items(), colours, strict=False):
            rows = {int(edge): count for edge, count in histogram.items()}
            heights = [rows.get(edge, 0) for edge in edges]
            stack = [bottoms.get(edge, 0) for edge in edges]
            centres = [edge - width / 2 for edge in edges]
            axes.bar(centres, heights, width * 0.9, bottom=stack, color=colour, label=name)
            for edge, height in zip(edges, heights, strict=True):
                bottoms[edge] = bottoms.get(edge, 0) + height
        axes.legend(loc="upper right")

    return _svg(draw, "Samples by length", "tokens", width=8.6, height=2.3)


def _svg(draw: Callable[[Axes], None], title: str, xlabel: str, *, width: float, height: float) -> str:
    """One chart, `width` x `height` inches, as an ``<svg>`` element."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title)
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        text = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=no_metadata)
    return text.getvalue()[text.getvalue().index("<svg") :]
