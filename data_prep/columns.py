"""Chunks of tables that are stored by columns: parquet, Arrow, and the data sets of the `datasets` library."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import DataError
from data_prep import raw
from data_prep.dataset import Chunk, Mark
from data_prep.raw import ArrowBlock, RawRow, RowBlock, too_long

_MAX_ROWS = 4096
_MAX_SPELLED_BYTES = 64 * 2**20
"""Of values that a table keeps once for many rows, as many are written out at a time."""


def parquet_chunks(path: Path, shown: str, after: Mark) -> Iterator[Chunk]:
    """Chunks of a parquet file; row groups before the mark are not read."""
    import pyarrow.parquet

    size = path.stat().st_size
    with pyarrow.parquet.ParquetFile(path, buffer_size=raw.CHUNK_BYTES) as file:
        total, row = max(1, file.metadata.num_rows), 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if row + group.num_rows > after.offset:
                at_once = _rows_of_a_chunk(group.num_rows, group.total_byte_size)
                batches = file.iter_batches(batch_size=at_once, row_groups=[number])
                yield from table_chunks(batches, row, after, lambda done: size * done // total)
            row += group.num_rows


def arrow_chunks(path: Path, shown: str, after: Mark) -> Iterator[Chunk]:
    """Chunks of Arrow IPC, the file form or the stream form (which `datasets` writes).

    A batch may be as large as the file. It is mapped rather than read, and the pages that were used are let go.
    """
    size = path.stat().st_size
    if not size:
        raise DataError(shown, "the file is empty: not even a schema", remedy="write it again")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    total = max(1, sum(batch.num_rows for batch in _arrow_batches(mapped)))
    for chunk in table_chunks(_arrow_batches(mapped), 0, after, lambda done: size * done // total):
        yield chunk
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


def _arrow_batches(mapped: mmap.mmap) -> Iterator[Any]:
    import pyarrow

    source = pyarrow.BufferReader(pyarrow.py_buffer(mapped))
    if mapped[:6] != b"ARROW1":
        yield from pyarrow.ipc.open_stream(source)
        return
    reader = pyarrow.ipc.open_file(source)
    for number in range(reader.num_record_batches):
        yield reader.get_batch(number)


def table_chunks(batches: Iterable[Any], row: int, after: Mark, stored: Any) -> Iterator[Chunk]:
    """Record batches as chunks.

    Args:
        batches: pyarrow record batches of any size.
        row: rows before the first of them.
        after: rows up to here are passed over.
        stored: number of rows -> bytes of the source up to there, as stored.
    """
    for batch in batches:
        at = max(0, after.offset - row)
        step, plain = _rows_of_a_chunk(batch.num_rows, batch.nbytes), _plain_schema(batch.schema)
        if plain != batch.schema:  # the size says nothing about a row's
            step = max(1, min(_MAX_ROWS, _MAX_SPELLED_BYTES // _longest_shared(batch)))
        for start in range(at, batch.num_rows, step):
            end = row + start
            rows = batch.slice(start, step)
            for part in _halved(rows if plain == batch.schema else rows.cast(plain)):
                block: ArrowBlock | RowBlock = ArrowBlock(end + 1, _stream_of(part))
                if part.nbytes > raw.MAX_ROW_BYTES:
                    block = RowBlock([RawRow(end + 1, too_long())])
                end += part.num_rows
                yield Chunk(block, Mark(end, end), stored(end), part.nbytes)
        row += batch.num_rows


def _rows_of_a_chunk(rows: int, size: int) -> int:
    return max(1, min(_MAX_ROWS, rows * raw.CHUNK_BYTES // max(1, size)))


def _plain_schema(schema: Any) -> Any:
    """The schema without dictionaries and views: a slice of those takes all values of the column with it."""
    import pyarrow

    return pyarrow.schema([field.with_type(_plain_type(field.type)) for field in schema], schema.metadata)


def _plain_type(of: Any) -> Any:
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(of):
        return _plain_type(of.value_type)
    if types.is_string_view(of) or types.is_binary_view(of):
        return pyarrow.large_string() if types.is_string_view(of) else pyarrow.large_binary()
    if types.is_list(of) or types.is_large_list(of):
        made = pyarrow.list_ if types.is_list(of) else pyarrow.large_list
        return made(of.value_field.with_type(_plain_type(of.value_type)))
    if types.is_struct(of):
        return pyarrow.struct([field.with_type(_plain_type(field.type)) for field in of])
    return of


def _longest_shared(batch: Any) -> int:
    """Bytes of the longest value in the columns' dictionaries, 1 at least."""
    import pyarrow
    import pyarrow.compute as pc

    shared = [column.dictionary for column in batch.columns if pyarrow.types.is_dictionary(column.type)]
    texts = [each for each in shared if pyarrow.types.is_string(each.type) or pyarrow.types.is_large_string(each.type)]
    return max([1, *(pc.max(pc.binary_length(each)).as_py() or 0 for each in texts)])


def _halved(batch: Any) -> Iterator[Any]:
    """The batch in parts of a bearable size: one of its rows may be larger than all others."""
    if batch.num_rows <= 1 or batch.nbytes <= 2 * raw.CHUNK_BYTES:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _halved(batch.slice(0, half))
    yield from _halved(batch.slice(half))


def _stream_of(batch: Any) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data
