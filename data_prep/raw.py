"""What a chunk carries to a worker: raw rows, decoded there. One class per way of travelling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from data_prep.records import RowFault, unique_keys

CHUNK_BYTES = 2**20
"""About as much as a chunk carries; some tenths of a second of a worker's time."""
MAX_ROW_BYTES = 16 * 2**20
"""A longer row becomes a reject: a document of so many bytes takes some 0.5 GiB of memory on its way through."""
MAX_SCANNED_BYTES = 64 * 2**20
"""A longer element of a list, or field of a table, is taken for a quote that is never closed."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row: its line (text files) or number (tables), from 1, and the decoded value or what is wrong with it."""

    line: int
    value: Any
    part: int = 1
    """Ordinal among the rows that start on the same line."""


class Block(Protocol):
    """The payload of a chunk."""

    def rows(self) -> Iterator[RawRow]:
        """Its rows, decoded."""


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Lines of JSON as they stand in the file; `line` is the number of the first."""

    line: int
    data: bytes

    @property
    def lines(self) -> int:
        """How many; the last may lack its end."""
        return self.data.count(b"\n") + (not self.data.endswith(b"\n"))

    def rows(self) -> Iterator[RawRow]:
        """See `Block.rows`. Blank lines are no rows."""
        lines = self.data.split(b"\n")
        for number, line in enumerate(lines, start=self.line):
            if line and not line.isspace():
                yield RawRow(number, _json_value(line, at_end=number == self.line + len(lines) - 1))


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Rows that the reader had to decode to know where they end."""

    found: list[RawRow]

    def rows(self) -> Iterator[RawRow]:
        """See `Block.rows`."""
        return iter(self.found)


@dataclass(frozen=True, slots=True)
class ArrowBlock:
    """Rows of a table as an Arrow IPC stream; `row` is the number of the first."""

    row: int
    data: bytes

    def rows(self) -> Iterator[RawRow]:
        """See `Block.rows`."""
        import pyarrow

        for batch in pyarrow.ipc.open_stream(self.data):
            try:
                values = batch.to_pylist()
            except ValueError:  # of one row, mostly text that is not UTF-8: the others are sound
                values = [_row_of(batch.slice(i, 1)) for i in range(batch.num_rows)]
            yield from (RawRow(number, value) for number, value in enumerate(values, start=self.row))


def decoded(line: bytes) -> str:
    """A line as text.

    Raises:
        RowFault: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault("invalid UTF-8", f"byte {error.start + 1} of the line") from None


def too_long(what: str = "") -> RowFault:
    """The fault of a row above `MAX_ROW_BYTES`."""
    return RowFault("row too long", f"{what}above {MAX_ROW_BYTES // 2**20} MiB")


def _json_value(line: bytes, *, at_end: bool) -> Any:
    """The line's value, or its fault. At the end of a file a fault is mostly that of a copy that was cut off."""
    if len(line) > MAX_ROW_BYTES:
        return too_long()
    try:
        return json.loads(decoded(line), object_pairs_hook=unique_keys)
    except RowFault as fault:
        return fault
    except json.JSONDecodeError as error:
        cut = "; the file ends here, without a line break" if at_end else ""
        what = error.msg.removesuffix(" at")
        return RowFault("malformed JSON", f"{what} at column {error.colno}{cut}")
    except (ValueError, RecursionError) as error:
        return RowFault("malformed JSON", str(error))


def _row_of(batch: Any) -> Any:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowFault("invalid UTF-8", f"{error.reason} in a column of text")
    except ValueError as error:
        return RowFault("a value cannot be read", str(error))
