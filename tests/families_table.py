"""Runs the tests of all cells and writes their outcome into docs/families.md: ``python -m tests.families_table``.

A cell is ✓ if every test of it passed, the reason if it cannot be, else ✗ with what is wrong.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cells import COLUMNS, FAMILIES, why_not
from tests.conftest import OUTCOMES
from train.models.families import FAMILIES as FACTS

DOC = Path(__file__).parents[1] / "docs/families.md"
BEGIN, END = "<!-- made by `make families` -->", "<!-- end -->"


def read_outcomes(file: Path) -> dict[tuple[str, str], list[str]]:
    """Outcomes of the tests of each cell: ``passed``, ``failed``, ``skipped``."""
    found: dict[tuple[str, str], list[str]] = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault((entry["name"], entry["column"]), []).append(entry["outcome"])
    return found


def cell(outcomes: dict[tuple[str, str], list[str]], name: str, column: str) -> str:
    """What stands in the table."""
    if reason := why_not(name, column):
        return reason
    seen = outcomes.get((name, column), [])
    if not seen:
        return "✗ no test"
    bad = sorted(set(seen) - {"passed"})
    return f"✗ {', '.join(bad)}" if bad else "✓"


def table(outcomes: dict[tuple[str, str], list[str]]) -> str:
    """The table in Markdown, and below it the reasons in full."""
    notes: dict[str, int] = {}
    lines = ["| family | `model_type` | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name in FAMILIES:
        cells = []
        for column in COLUMNS:
            text = cell(outcomes, name, column)
            if not text.startswith(("✓", "✗")):
                text = f"– [{notes.setdefault(text, len(notes) + 1)}]"
            cells.append(text)
        lines.append(f"| {FACTS[name].title} | `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in notes.items())])


def main(arguments: list[str]) -> int:
    """Runs pytest over the cells, writes the table and returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cells.jsonl"
        file.touch()
        command = [sys.executable, "-m", "pytest", "-m", "cell", "--durations=10", *arguments]
        code = subprocess.run(command, env=os.environ | {OUTCOMES: str(file)}, check=False).returncode
        outcomes = read_outcomes(file)
    if code not in (0, 1):  # pytest did not get to the end
        return code
    text = DOC.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOC.write_text(f"{before}{BEGIN}\n{table(outcomes)}\n{END}{after}")
    print(f"{sum(map(len, outcomes.values()))} tests of {len(outcomes)} cells; {DOC} is written")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
