"""What is concluded from the reports: one finding for all nodes that have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from configs.errors import CrosstuneError

FAULT, WARNING = "fault", "warning"


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    level: str
    """``fault``: a run would break; ``warning``: it would not, or not surely."""
    check: str
    """What was looked at: one word, such as ``disk``."""
    nodes: tuple[int, ...]
    """On which this was found."""
    what: str
    remedy: str | None = None


@dataclass(frozen=True)
class Answer:
    """What became of the question to one node."""

    node: int
    report: dict[str, Any] | None
    error: CrosstuneError | None
    """Why there is no report; None with one."""
    asked_at: float
    heard_at: float
    """`time.time` of the asking host, both."""

    @property
    def facts(self) -> dict[str, Any]:
        """By check; empty without a report."""
        return self.report["facts"] if self.report else {}

    def fact(self, check: str) -> dict[str, Any]:
        """Of one check; empty where it was not made or failed."""
        found = self.facts.get(check) or {}
        return {} if "failed" in found else found


def merged(findings: Iterable[Finding]) -> list[Finding]:
    """The same finding on several nodes as one, faults first, else in order."""
    whole: dict[tuple[str, str, str, str | None], Finding] = {}
    for each in findings:
        key = (each.level, each.check, each.what, each.remedy)
        before = whole.get(key)
        whole[key] = each if before is None else replace(before, nodes=tuple(sorted({*before.nodes, *each.nodes})))
    return sorted(whole.values(), key=lambda each: each.level != FAULT)
