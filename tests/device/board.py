"""Results of checks: a line for each as it ends, a table at the end. A worker's come through its standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field

OK, FAILED, SKIPPED = "ok", "FAILED", "skipped"
MARK = "\x1eRESULT "
"""Begins a worker's line that holds a result."""


@dataclass(frozen=True)
class Result:
    """What came of one check."""

    name: str
    verdict: str
    """`OK`, `FAILED` or `SKIPPED`."""
    detail: str
    """What was measured and against what, or why it was skipped."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """For machines."""

    def line(self) -> str:
        """For people."""
        return f"{self.verdict:8}{self.name:34}{self.detail}"

    def emit(self) -> None:
        """In a worker: hands the result to the parent."""
        print(MARK + json.dumps(asdict(self)), flush=True)


def received(line: str) -> Result | None:
    """In the parent: the result in a worker's line, if there is one."""
    _, found, content = line.partition(MARK)
    if found:
        with suppress(ValueError):  # another rank wrote into the same line
            return Result(**json.loads(content))
    return None


def verdict(ok: bool) -> str:
    """Of a check that ran."""
    return OK if ok else FAILED


def checked(name: str, check: Callable[[], tuple[bool, str]]) -> Result:
    """Runs a check that concerns this process alone; whatever it raises is its failure."""
    try:
        ok, detail = check()
    except Exception as error:
        ok, detail = False, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    return Result(name, verdict(ok), detail)


def table(results: list[Result]) -> str:
    """All results, the failed ones last, and how many of each kind."""
    order = {OK: 0, SKIPPED: 1, FAILED: 2}
    lines = [result.line() for result in sorted(results, key=lambda result: order[result.verdict])]
    counts = ", ".join(f"{sum(r.verdict == kind for r in results)} {kind}" for kind in order)
    return "\n".join([*lines, counts])
