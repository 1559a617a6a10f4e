"""The doctor's report on a terminal: readable at a glance, with colour only where there is some."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

WIDTH = 100
"""Columns at most; longer lines are hard to read."""
LABEL = 15
"""Columns of the left edge."""
STYLES = {"missing": "bold red", "note": "yellow", "ok": "green"}
"""Levels of findings, the most pressing first."""


class Page:
    """Prints labelled lines that are wrapped beside their label."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = max(40, min(console.width, WIDTH))

    def head(self, title: str, more: str = "", style: str = "dim") -> None:
        """A title and a remark."""
        self._print(Text(title, style="bold").append(f"  {more}" if more else "", style=f"not bold {style}"))

    def row(self, label: str, text: str, *, label_style: str = "dim", style: str = "", indent: int = LABEL) -> None:
        """A label with text beside it; each line of the text is wrapped on its own."""
        lines = [
            piece
            for line in text.splitlines()
            for piece in textwrap.wrap(line, self.width - indent, break_long_words=False, break_on_hyphens=False)
        ]
        for number, line in enumerate(lines or [""]):
            edge = f"  {label}" if number == 0 else ""
            self._print(Text(edge.ljust(indent), style=label_style).append(line, style=f"not dim not bold {style}"))

    def _print(self, text: Text) -> None:
        self.console.print(text, highlight=False, emoji=False, soft_wrap=True)


def show(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a report of `launchers.doctor.device.doctor`."""
    page = Page(console or Console())
    ready = not report["exit_code"]
    verdict = "a run can start" if ready else "a run would not start"
    page.head(f"device={report['device']}", verdict, STYLES["ok" if ready else "missing"])
    for label, text in answer_lines(report):
        page.row(label, text)
    if report["settings"]:
        page.head("\nsettings", "as a run would have them, and where each comes from")
        edge = max(len(each["variable"]) for each in report["settings"]) + 4
        for each in report["settings"]:
            page.row(each["variable"], f"{each['value']}  ({each['from']})", label_style="", indent=edge)
    page.head("\nfindings")
    for finding in sorted(report["findings"], key=lambda each: list(STYLES).index(each["level"])):
        page.row(finding["level"], finding["what"], label_style=STYLES[finding["level"]])
        if finding["remedy"]:
            page.row("", f"-> {finding['remedy']}", style="bold" if finding["level"] == "missing" else "")


def answer_lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the device answered, as label and text."""
    found = report["answers"]
    yield "found", found["reason"] if found["available"] else f"no: {found['reason']}"
    if report["passed_over"]:
        yield "passed over", "\n".join(_passed_over(report["passed_over"]))
    if "torch_device" in found:
        yield from _capabilities(found)
    if found["available"]:
        yield "DeepSpeed", _deepspeed(found["deepspeed"])
    if "kernels" in found:
        yield "kernels", "\n".join(_kernels(found["kernels"], found["kernels_dtype"]))
    yield "versions", "; ".join(f"{name} {version}" for name, version in report["versions"].items())


def _passed_over(records: list[Mapping[str, Any]]) -> Iterator[str]:
    """Why ``device=auto`` took none of these."""
    absent = [record for record in records if record.get("absent")]
    if absent:
        yield f"plugin not installed: {', '.join(record['name'] for record in absent)}"
    for record in records:
        if not record.get("absent"):
            yield f"{record['name']}: {record['reason']}"


def _capabilities(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "torch device", f"{found['torch_device']}, collectives by {found['backend']}"
    variable = found["variable"]
    if variable:
        value = f"{variable}={os.environ[variable]}" if variable in os.environ else f"{variable} is not set"
        yield "devices", f"{found['count']} visible; {value}"
    else:
        yield "processes", f"{found['count']} and more, one a core is sensible"
    words = {"fast": "{} fast", "works": "{} works, slowly", "no": "no {}"}
    yield "formats", "; ".join(words[how].format(name) for name, how in found["dtypes"].items())
    yield "memory", _memory(found["memory_free_bytes"], found["memory_total_bytes"])
    peak = found["peak_flops_bf16"]
    yield "peak", f"{peak / 1e12:,.0f} TFLOP/s in bf16, dense" if peak else "not known; device.peak_tflops=... sets it"


def _memory(free: int | None, total: int | None) -> str:
    if total is None:
        return "not known"
    return f"{total / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB free" if free is not None else "")


def _deepspeed(accelerator: str | None) -> str:
    if accelerator is None:
        return "no class for this device: sharding=plain only"
    return f"{accelerator}: sharding=zero1, zero2, zero3"


def _kernels(kernels: Mapping[str, str], dtype: str) -> Iterator[str]:
    """Ops with the same fate share a line."""
    for reason in dict.fromkeys(kernels.values()):
        ops = ", ".join(op for op, why in kernels.items() if why == reason)
        yield f"{ops}: plain torch ({reason})" if reason else f"{ops}: the device's own, compared in {dtype} just now"
