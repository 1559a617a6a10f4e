"""Raw rows out of one local file, a row at a time, each with its line.

A row that is broken comes out as a `RowFault` and reading goes on, where the file allows that. A file that is broken as
a whole (a damaged gzip, JSON that ends in the middle, a torn parquet footer) raises `DataError`: what follows the fault
cannot be told, and silently reading half a file is worse than stopping.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from configs.errors import DataError
from data_prep.json_array import JsonArrayReader
from data_prep.records import RowFault

MAX_ROW_BYTES = 64 * 2**20
"""A longer line is not read into memory; it becomes a reject. A row of this size fits no model."""

_BATCH_ROWS = 256
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row: its line (text files) or number (tables), from 1, and the decoded value or what is wrong with it."""

    line: int
    value: Any
    part: int = 1
    """Ordinal among the rows that start on the same line."""


def kind_of_file(path: Path) -> str | None:
    """The kind of file by its name, the key into `READERS`; None if it is not one that is read."""
    name = path.name.lower()
    if name.endswith(".gz"):
        kind = Path(name[:-3]).suffix[1:]
        return kind if kind in _TEXT_KINDS else None
    kind = Path(name).suffix[1:]
    return kind if kind in READERS else None


def read_rows(path: Path, shown: str) -> Iterator[RawRow]:
    """All rows of a file.

    Args:
        path: the file; its kind must be one of `READERS`.
        shown: how messages name it.

    Raises:
        DataError: the file cannot be read as what its name says.
    """
    kind = kind_of_file(path)
    assert kind is not None
    with _file_faults(shown):
        if kind not in _TEXT_KINDS:
            yield from READERS[kind](path, shown)
            return
        with _open(path) as stream:
            yield from READERS[kind](stream, shown)


@contextmanager
def _file_faults(shown: str) -> Iterator[None]:
    """What libraries raise on a damaged file, as a message for its owner."""
    import pyarrow

    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(shown, f"the gzip file is damaged: {error}", remedy="copy or compress it again") from error
    except pyarrow.ArrowException as error:
        raise DataError(shown, f"cannot be read: {str(error).splitlines()[0]}", remedy="write it again") from error
    except UnicodeDecodeError as error:
        raise DataError(shown, f"holds text that is not UTF-8: {error.reason}", remedy="write it again") from error
    except OSError as error:
        raise DataError(shown, f"cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    """The file's bytes, unpacked, after its byte-order mark."""
    gzipped = path.name.lower().endswith(".gz")
    stream: Any = gzip.open(path, "rb") if gzipped else path.open("rb", buffering=2**20)
    start = stream.peek(3)[:3]
    if start[:2] in _UTF16_MARKS:
        raise DataError(str(path), "the file is UTF-16", allowed="UTF-8", remedy=f"iconv -f UTF-16 -t UTF-8 {path}")
    if start == b"\xef\xbb\xbf":
        stream.read(3)
    return stream  # type: ignore[no-any-return]


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | RowFault]]:
    """Numbered lines without their ends; a line above `MAX_ROW_BYTES` is skipped over in pieces."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield number, RowFault("line too long", f"above {MAX_ROW_BYTES // 2**20} MiB")
        else:
            yield number, line.rstrip(b"\r\n")


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowFault("invalid UTF-8", f"byte {error.start + 1} of the line") from None


def _read_jsonl(stream: BinaryIO, shown: str) -> Iterator[RawRow]:
    for number, line in _lines(stream):
        if isinstance(line, bytes) and not line.strip():
            continue
        yield RawRow(number, line if isinstance(line, RowFault) else _json_object(line))


def _json_object(line: bytes) -> Any:
    try:
        value = json.loads(_decode(line))
    except RowFault as fault:
        return fault
    except json.JSONDecodeError as error:
        return RowFault("malformed JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowFault("malformed JSON", str(error))
    return value


def _read_json(stream: BinaryIO, shown: str) -> Iterator[RawRow]:
    """A list of objects, streamed; or, as many exports name it, JSON lines in a file called .json."""
    head = stream.peek(64).lstrip()  # type: ignore[attr-defined]
    if head.startswith(b"["):
        for line, part, value in JsonArrayReader(stream, shown).rows():
            yield RawRow(line, value, part)
        return
    rows = _read_jsonl(stream, shown)
    first = next(rows, None)
    if first is not None and not isinstance(first.value, dict):
        raise DataError(
            shown,
            "neither a list of objects nor one object a line",
            allowed="[{...}, {...}], or JSON lines",
            remedy="take the list out of the object around it, or name a file of JSON lines .jsonl",
        )
    if first is not None:
        yield first
        yield from rows


def _read_table(stream: BinaryIO, shown: str, delimiter: str) -> Iterator[RawRow]:
    """Comma or tab separated, the first row naming the columns; the line is the one where the row begins."""
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        header = next(rows, None)
        if header is None:
            return
        if twice := [name for name, count in Counter(header).items() if count > 1]:
            raise DataError(
                shown, f"two columns are called '{twice[0]}'", remedy="give each its own name in the first row"
            )
        begin = rows.line_num + 1
        for fields in rows:
            if fields and len(fields) != len(header):
                fault = RowFault("wrong number of fields", f"{len(fields)}, the header has {len(header)}")
                yield RawRow(begin, fault)
            elif fields:
                yield RawRow(begin, dict(zip(header, fields, strict=True)))
            begin = rows.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{shown}:{rows.line_num}", f"the table is broken here: {error}", remedy="mend the quotes around this line"
        ) from error


def _read_txt(stream: BinaryIO, shown: str) -> Iterator[RawRow]:
    """Records are blocks of lines between blank lines, so that a record has a line and memory stays bounded."""
    block: list[str] = []
    begin, size = 1, 0
    fault: RowFault | None = None
    for number, line in _lines(stream):
        if isinstance(line, bytes) and not line.strip():
            if block or fault:
                yield RawRow(begin, fault or {"text": "\n".join(block)})
            block, size, fault = [], 0, None
            continue
        if not block and fault is None:
            begin = number
        try:
            size += 0 if isinstance(line, RowFault) else len(line)
            if isinstance(line, RowFault) or size > MAX_ROW_BYTES:
                raise RowFault("line too long", f"a record above {MAX_ROW_BYTES // 2**20} MiB")
            block.append(_decode(line))
        except RowFault as met:
            block, fault = [], met
    if block or fault:
        yield RawRow(begin, fault or {"text": "\n".join(block)})


def _read_parquet(path: Path, shown: str) -> Iterator[RawRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _from_batches(file.iter_batches(batch_size=_BATCH_ROWS))


def _read_arrow(path: Path, shown: str) -> Iterator[RawRow]:
    """Arrow IPC, the file form or the stream form (which `datasets` writes)."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(source))
        small = (b.slice(i, _BATCH_ROWS) for b in batches for i in range(0, b.num_rows, _BATCH_ROWS))
        yield from _from_batches(small)


def _from_batches(batches: Any) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield RawRow(number, value)


_TEXT_KINDS: dict[str, Callable[[BinaryIO, str], Iterator[RawRow]]] = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "csv": lambda stream, shown: _read_table(stream, shown, ","),
    "tsv": lambda stream, shown: _read_table(stream, shown, "\t"),
    "txt": _read_txt,
}
READERS: dict[str, Callable[[Any, str], Iterator[RawRow]]] = {
    **_TEXT_KINDS,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}
"""Kind of file, which is its name's ending -> reader. The text kinds may also be gzipped."""
