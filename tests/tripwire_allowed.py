"""CUDA questions of libraries that our runs may ask: each takes a no for an answer.

The tests hold every record of the tripwire against this list, and the list against the records: an entry that nothing
matches any more has to go.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    what: str
    """As the tripwire names it."""
    module: str
    """Python module of the calling line."""
    reason: str
    """Why nothing is lost on another device."""

    def matches(self, record: dict[str, Any]) -> bool:
        return (record["what"], record["module"]) == (self.what, self.module)


ALLOWED = (
    Allowed(
        "torch.cuda.is_current_stream_capturing",
        "transformers.utils.import_utils",
        "`is_tracing` asks in a try, to know whether a mask may be left out; any exception is a no",
    ),
)


def not_allowed(records: Iterable[dict[str, Any]]) -> list[str]:
    """``what, kind, file:line`` of the records that no entry covers, each with its stack."""
    return [
        "\n    ".join((f"{r['what']} {r['kind']} {r['file']}:{r['line']} ({r['module']})", *r["stack"]))
        for r in records
        if not any(entry.matches(r) for entry in ALLOWED)
    ]


def unused(records: Iterable[dict[str, Any]]) -> list[Allowed]:
    """Entries that no record needs."""
    met = list(records)
    return [entry for entry in ALLOWED if not any(entry.matches(r) for r in met)]
