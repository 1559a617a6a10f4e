"""The report on a terminal: a line per node, then what is wrong with the remedy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from launchers.doctor.nodes.between import NOT_COMPARED, clock_offsets, versions_of_node
from launchers.doctor.nodes.findings import FAULT, WARNING, Answer, Finding
from launchers.doctor.nodes.request import Request
from launchers.doctor.page import Page
from train.units import in_gib

STYLES = {FAULT: "bold red", WARNING: "yellow"}
HEADS = (
    *("node", "host", "devices", "processes", "interface", "rendezvous", "/dev/shm", "disk", "clock", "versions"),
    "all-reduce",
)
NAMED = 6
"""Nodes that a finding names one by one."""


def show(request: Request, answers: Sequence[Answer], findings: Sequence[Finding], console: Console) -> None:
    """Prints the report.

    Args:
        request: what was asked.
        answers: of all nodes, by number.
        findings: what they mean, faults first.
        console: where.
    """
    page = Page(console)
    broken = any(each.level == FAULT for each in findings)
    ready = not broken
    count = f"{len(answers)} node{'s' if len(answers) > 1 else ''}"
    verdict = "a run can start" if ready else "a run would break"
    page.head(count, verdict + (", as far as was looked" if request.quick else ""), "green" if ready else STYLES[FAULT])
    rows = [HEADS, *table(request, answers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
    for number, row in enumerate(rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        console.print(f"  {line}", style="dim" if number == 0 else "", markup=False, highlight=False, soft_wrap=True)
    for reason in reasons_against_probe(request, answers):
        page.row("", f"no all-reduce was run: {reason}", style="dim", indent=2)
    if not findings:
        return
    page.head("\nfindings")
    for finding in findings:
        names = named(finding.nodes, request, answers)
        page.row(finding.level, f"{names}: {finding.what}", label_style=STYLES[finding.level])
        if finding.remedy:
            page.row("", f"-> {finding.remedy}", style="bold" if finding.level == FAULT else "")


def reasons_against_probe(request: Request, answers: Sequence[Answer]) -> Iterator[str]:
    """Why the nodes agreed to leave the all-reduce out."""
    agreed = answers[0].fact("agreed")
    if not request.probes or not agreed or agreed["go"]:
        return
    if agreed["missing"]:
        yield f"{named(agreed['missing'], request, answers)} did not come to the first node"
    for node, why in agreed["unable"].items():
        yield f"{name_of(int(node), request, answers)}: {why}"


def name_of(node: int, request: Request, answers: Sequence[Answer]) -> str:
    """As the launcher calls it, else as it calls itself."""
    if request.names:
        return request.names[node]
    report = answers[node].report
    return str(report["name"]) if report else f"node {node}"


def named(nodes: Sequence[int], request: Request, answers: Sequence[Answer]) -> str:
    """Whose finding it is."""
    if len(nodes) == len(answers) > 1:
        return f"all {len(nodes)} nodes"
    names = [name_of(node, request, answers) for node in nodes]
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def table(request: Request, answers: Sequence[Answer]) -> Iterator[tuple[str, ...]]:
    """A row per node, in the order of `HEADS`."""
    offsets = clock_offsets(answers)
    for answer in answers:
        name = name_of(answer.node, request, answers)
        if answer.report is None:
            yield (name, "no report", *["-"] * (len(HEADS) - 2))
            continue
        yield (
            name,
            str(answer.report["host"]),
            _devices(answer),
            str(request.nproc),
            _interface(answer, request),
            _rendezvous(answer, answers[0], request),
            _room(answer.fact("shm"), "total_bytes"),
            _room(answer.fact("run_dir") or answer.fact("tmp"), "free_bytes"),
            _clock(answer, offsets[answer.node]),
            versions_hash(answer),
            _speed(answer),
        )


def _devices(answer: Answer) -> str:
    device = answer.fact("device")
    if not device.get("device"):
        return "-"
    found = device["answers"]
    if not found["available"]:
        return f"no {device['device']}"
    return f"{found.get('count', '?')} {device['device']}" if device["device"] != "cpu" else "cpu"


def _interface(answer: Answer, request: Request) -> str:
    facts = answer.fact("network")
    means = [name for each in facts.get("chosen", {}).values() for name in each["means"]]
    return request.interface or next(iter(means), None) or answer.fact("way").get("interface") or "-"


def _rendezvous(answer: Answer, first: Answer, request: Request) -> str:
    facts = answer.fact("meeting")
    if not request.meets or not facts:
        return "-"
    if answer.node == 0:
        return "listens" if facts["listens"] else "no"
    if not facts["reached"]:
        return "no"
    return "one way" if facts["back"] else f"{facts['seconds'] * 1e3:.1f} ms"


def _room(facts: Mapping[str, Any], key: str) -> str:
    return in_gib(facts[key]) if facts else "-"


def _clock(answer: Answer, offset: float) -> str:
    """Against the first node, which is known to a fraction of the round trip; of that one against this host."""
    against_first = answer.fact("meeting").get("offset_seconds")
    shown = offset if against_first is None else against_first
    return f"{shown * 1e3:+.1f} ms" if abs(shown) < 1 else f"{shown:+,.1f} s"


def versions_hash(answer: Answer) -> str:
    """Short name of all versions of a node: equal where all that is compared is."""
    compared = {name: value for name, value in versions_of_node(answer).items() if name not in NOT_COMPARED}
    return hashlib.sha256(json.dumps(sorted(compared.items())).encode()).hexdigest()[:8]


def _speed(answer: Answer) -> str:
    speed = answer.fact("allreduce").get("gb_per_s")
    return f"{speed:.2f} GB/s" if speed else "-"
