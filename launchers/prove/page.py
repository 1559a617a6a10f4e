"""A proof's report: on the terminal, as JSON for machines, and as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.files import write_whole
from launchers.doctor.page import Page
from train.observe.pages import html_page

SAME, DIFFERS, LEFT_OUT = "green", "bold red", "yellow"
EDGE = 13
"""Columns of the verdict beside each comparison."""


def show(result: Mapping[str, Any], folder: Path, console: Console | None = None) -> None:
    """Prints the report.

    Args:
        result: as `Proof.finish` makes it.
        folder: with proof.json and proof.html.
        console: None: standard output.
    """
    page = Page(console or Console())
    style = SAME if result["proven"] else DIFFERS
    page.head(f"\nprove {result['proof']}", "proven" if result["proven"] else "NOT PROVEN", style)
    page.row("what", result["promise"], indent=EDGE)
    page.row("on", f"{result['model']}: {result['tuning']}, {result['precision']}, {result['layout']}", indent=EDGE)
    page.row("device", device_of(result), indent=EDGE)
    for part in result["parts"]:
        page.head(f"\n{part['title']}")
        for note in part["notes"]:
            page.row("left out" if part["left_out"] else "", note, label_style=LEFT_OUT, indent=EDGE)
        for each in part["comparisons"]:
            label, colour = ("same", SAME) if each["same"] else ("DIFFERS", DIFFERS)
            page.row(label, f"{each['what']}: {each['figure']}", label_style=colour, indent=EDGE)
        if part["failure"]:
            page.row("FAILED", part["failure"], label_style=DIFFERS, indent=EDGE)
    page.head("")
    if result["first_difference"]:
        page.row("first", f"difference: {result['first_difference']['text']}", label_style=DIFFERS, indent=EDGE)
    page.row("report", str(folder / "proof.html"), indent=EDGE)
    if not result["proven"]:
        page.row("", f"the runs are kept in {shlex.quote(str(folder / 'runs'))}, their output in logs", indent=EDGE)


def device_of(result: Mapping[str, Any]) -> str:
    """Device, versions and code in a line."""
    found = result["environment"]
    packages = found.get("packages", {})
    names = [f"{name} {packages[name]}" for name in ("torch", "deepspeed", "transformers") if name in packages]
    device = found.get("device", {})
    return "; ".join([str(device.get("name", "unknown")), *names, f"crosstune {found.get('code', 'unknown')}"])


def write(result: Mapping[str, Any], report: Path, page: Path) -> None:
    """Writes both files, each whole or not at all.

    Raises:
        StorageError: a file cannot be written.
    """
    html = html_page(
        "launchers.prove",
        "proof.html.jinja",
        **result,
        device=device_of(result),
        versions=json.dumps(result["environment"], indent=2),
    )
    write_whole(report, json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n")
    write_whole(page, html)
