"""One local file as chunks of raw rows, each row with its line.

The process that reads decodes as little as the kind of file allows: JSON lines travel as bytes, tables of columns as
Arrow buffers. A row that is broken becomes a `RowFault` and reading goes on, where the file allows that. A file that is
broken as a whole (a damaged gzip, JSON that ends in the middle, a torn parquet footer) raises `DataError`: what follows
the fault cannot be told, and silently reading half a file is worse than stopping.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from configs.errors import DataError
from data_prep import raw
from data_prep.columns import arrow_chunks, parquet_chunks
from data_prep.dataset import Chunk, Mark
from data_prep.json_array import JsonArrayReader
from data_prep.raw import LineBlock, RawRow, RowBlock, decoded, too_long
from data_prep.records import RowFault
from data_prep.streams import COMPRESSED, Stream, file_faults

_MAX_ROWS = 4096

_DELIMITERS = (";", "\t", ",")
_SEPARATOR_LINE = re.compile(r'"?sep=([;,\t|])"?\s*', re.IGNORECASE)

_SizedRows = Iterator[tuple[RawRow, int]]
"""Rows, and about how many bytes each takes."""


def kind_of_file(path: Path) -> str | None:
    """The kind of file by its name, the key into `READERS`; None if it is not one that is read."""
    name = Path(path.name.lower())
    packed = name.suffix in COMPRESSED
    kind = (Path(name.stem) if packed else name).suffix[1:]
    return kind if kind in (_TEXT_KINDS if packed else READERS) else None


def read_chunks(path: Path, shown: str, after: Mark = Mark()) -> Iterator[Chunk]:  # noqa: B008 (frozen)
    """The chunks of a file from a mark on.

    Args:
        path: the file; its kind must be one of `READERS`.
        shown: how messages name it.
        after: where to begin: the end of an earlier chunk.

    Raises:
        DataError: the file cannot be read as what its name says.
    """
    kind = kind_of_file(path)
    assert kind is not None
    with file_faults(shown) as place:
        if kind in _TEXT_KINDS:
            with Stream(path, shown) as stream:
                for chunk in _TEXT_KINDS[kind](stream, shown, after):
                    place.line = chunk.end.line
                    yield chunk
        else:
            yield from _TABLE_KINDS[kind](path, shown, after)


def _read_jsonl(stream: Stream, shown: str, after: Mark) -> Iterator[Chunk]:
    """Whole lines, not decoded. A line that is too long is passed over in pieces."""
    stream.skip(after.offset)
    offset, line = after.offset, after.line
    while data := stream.read(raw.CHUNK_BYTES):
        rest = b"" if data.endswith(b"\n") else stream.readline(raw.MAX_ROW_BYTES)
        overlong = len(rest) == raw.MAX_ROW_BYTES and not rest.endswith(b"\n")
        whole = data[: data.rfind(b"\n") + 1] if overlong else data + rest
        if whole:
            block = LineBlock(line + 1, whole)
            offset, line = offset + len(whole), line + block.lines
            yield Chunk(block, Mark(offset, line), stream.stored, len(whole))
        if overlong:
            offset += len(data) - len(whole) + len(rest) + stream.pass_line()
            line += 1
            yield Chunk(RowBlock([RawRow(line, too_long())]), Mark(offset, line), stream.stored)


def _read_json(stream: Stream, shown: str, after: Mark) -> Iterator[Chunk]:
    """A list of objects, streamed; or, as many exports name it, JSON lines in a file called .json."""
    if stream.peek().lstrip().startswith(b"["):
        elements = JsonArrayReader(stream.file, shown).rows()
        rows = ((RawRow(line, value, part), size) for line, part, value, size in elements)
        yield from _in_blocks(rows, stream, after)
        return
    for number, chunk in enumerate(_read_jsonl(stream, shown, after)):
        if number == 0 and after == Mark():
            first = next(iter(chunk.payload.rows()), None)
            if first is not None and not isinstance(first.value, dict):
                raise DataError(
                    shown,
                    "neither a list of objects nor one object a line",
                    allowed="[{...}, {...}], or JSON lines",
                    remedy="take the list out of the object around it, or name a file of JSON lines .jsonl",
                )
        yield chunk


def _in_blocks(rows: _SizedRows, stream: Stream, after: Mark) -> Iterator[Chunk]:
    """Chunks of rows that must be decoded to be found; those before the mark are decoded and passed over."""
    found: list[RawRow] = []
    number = size = 0
    for row, row_bytes in rows:
        number += 1
        if number <= after.offset:
            continue
        found.append(row if row_bytes <= raw.MAX_ROW_BYTES else RawRow(row.line, too_long(), row.part))
        size += row_bytes if row_bytes <= raw.MAX_ROW_BYTES else 0
        if size >= raw.CHUNK_BYTES or len(found) == _MAX_ROWS:
            yield Chunk(RowBlock(found), Mark(number, row.line), stream.stored, size)
            found, size = [], 0
    if found:
        yield Chunk(RowBlock(found), Mark(number, found[-1].line), stream.stored, size)


def _read_table(stream: Stream, shown: str, after: Mark, *, delimiter: str) -> Iterator[Chunk]:
    yield from _in_blocks(_table_rows(stream, shown, delimiter), stream, after)


def _table_rows(stream: Stream, shown: str, delimiter: str) -> _SizedRows:
    """Separated fields, the first row naming the columns; the line is the one where the row begins."""
    csv.field_size_limit(raw.MAX_SCANNED_BYTES)
    text = io.TextIOWrapper(stream.file, encoding="utf-8", errors="surrogateescape", newline="")
    first, begin = text.readline(), 1
    rows = csv.reader(itertools.chain([first], text), delimiter=_delimiter(first, delimiter), strict=True)
    try:
        header = next(rows, None)
        if header is not None and _SEPARATOR_LINE.fullmatch(first):
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
                yield RawRow(begin, fault), 0
            elif fields:
                yield RawRow(begin, dict(zip(header, fields, strict=True))), sum(map(len, fields))
            begin = rows.line_num + 1
    except csv.Error as error:
        found, remedy = f"the table is broken here: {error}", "mend the quotes around this line"
        if begin < rows.line_num:
            remedy = f"mend the quotes of the row that begins in line {begin}"
        raise DataError(f"{shown}:{rows.line_num}", found, remedy=remedy) from error
    finally:
        text.detach()  # else it closes the stream when it goes


def _delimiter(first: str, usual: str) -> str:
    """Spreadsheets write a .csv with the separator of their country, and some say so in a line ``sep=;`` before it.

    Another separator than the usual one is taken only where the first line has none of that.
    """
    if said := _SEPARATOR_LINE.fullmatch(first):
        return said[1]
    return next((each for each in (usual, *_DELIMITERS) if each in first), usual)


def _read_txt(stream: Stream, shown: str, after: Mark) -> Iterator[Chunk]:
    yield from _in_blocks(_txt_rows(stream), stream, after)


def _txt_rows(stream: Stream) -> _SizedRows:
    """Records are blocks of lines between blank lines, so that a record has a line and memory stays bounded."""
    block: list[str] = []
    begin, size = 1, 0
    fault: RowFault | None = None
    for number, line in stream.lines():
        if isinstance(line, bytes) and not line.strip():
            if block or fault:
                yield RawRow(begin, fault or {"text": "\n".join(block)}), size
            block, size, fault = [], 0, None
            continue
        if not block and fault is None:
            begin = number
        try:
            size += 0 if isinstance(line, RowFault) else len(line)
            if isinstance(line, RowFault) or size > raw.MAX_ROW_BYTES:
                raise too_long("a record ")
            block.append(decoded(line))
        except RowFault as met:
            block, fault = [], met
    if block or fault:
        yield RawRow(begin, fault or {"text": "\n".join(block)}), size


_TEXT_KINDS: dict[str, Callable[[Stream, str, Mark], Iterator[Chunk]]] = {
    "jsonl": _read_jsonl,
    "ndjson": _read_jsonl,
    "json": _read_json,
    "csv": partial(_read_table, delimiter=","),
    "tsv": partial(_read_table, delimiter="\t"),
    "txt": _read_txt,
}
_TABLE_KINDS: dict[str, Callable[[Path, str, Mark], Iterator[Chunk]]] = {
    "parquet": parquet_chunks,
    "arrow": arrow_chunks,
}
READERS = (*_TEXT_KINDS, *_TABLE_KINDS)
"""Kinds of file that are read, by their names' endings. The text kinds may also be packed (`streams.COMPRESSED`)."""
