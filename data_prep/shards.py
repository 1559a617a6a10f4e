"""Samples as Arrow, and the shards of one split, written in order with bounded memory.

A worker encodes what it made; the main process appends the encoded batches, unread, to a partial file in Arrow's
stream form, which can be cut at any batch and continued. A full shard is then written in Arrow's file form, in
batches of equal size: its bytes depend on the rows alone, not on how they came.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data_prep.dataset import file_sha256
from data_prep.journal import cut
from data_prep.records import AnyRecord, Pair, Vote
from data_prep.rendered import AnySample, PairSample, Sample, VoteSample

ROWS_PER_SHARD = 32 * 1024
_ROWS_PER_BATCH = 1024
_NUMBERS_PER_BATCH = 4 * 2**20
"""Token ids and ends of spans: a batch is held in memory, and a row may be as long as `max_length`."""
_PARTIAL = ".partial"

_TOKENS = pa.list_(pa.int32())
_COLUMNS = {
    "samples": {"input_ids": _TOKENS, "spans": _TOKENS, "id": pa.string()},
    "pairs": {
        "input_ids": _TOKENS,
        "spans": _TOKENS,
        "rejected_input_ids": _TOKENS,
        "rejected_spans": _TOKENS,
        "id": pa.string(),
    },
    "votes": {"input_ids": _TOKENS, "spans": _TOKENS, "liked": pa.bool_(), "id": pa.string()},
}
SCHEMAS = {
    kind: pa.schema([pa.field(name, of, nullable=False) for name, of in columns.items()])
    for kind, columns in _COLUMNS.items()
}
"""Kind of data -> columns. `spans` is flat: start, end, start, end ...; token indices that are learned, half-open,
sorted, disjoint, above 0. Of a pair, the first two columns are the chosen answer's."""
WITH_IMAGES = pa.schema(
    [
        *SCHEMAS["samples"],
        *(
            pa.field(name, of, nullable=False)
            for name, of in {
                "images": pa.list_(pa.string()),
                "image_grids": _TOKENS,
                "image_sources": pa.list_(pa.string()),
            }.items()
        ),
    ]
)
"""Of shards of samples that begin with the first sample of a source that has images: of each image its hash, its
frames, rows and columns of patches (flat), and the path that it was read from. Other shards are as they ever were."""


def kind_of_record(record: AnyRecord) -> str:
    """The kind of data, a key of `SCHEMAS`, that a record becomes."""
    return "pairs" if isinstance(record, Pair) else "votes" if isinstance(record, Vote) else "samples"


def sequences(sample: AnySample) -> tuple[Sample, ...]:
    """The token sequences of a sample: two of a pair."""
    if isinstance(sample, PairSample):
        return sample.chosen, sample.rejected
    return (sample.sample,) if isinstance(sample, VoteSample) else (sample,)


def encode(kind: str, samples: Sequence[AnySample]) -> bytes:
    """Samples of one kind as an encapsulated record batch of its schema."""
    columns: list[pa.Array] = []
    for place in range(2 if kind == "pairs" else 1):
        each = [sequences(sample)[place] for sample in samples]
        columns.append(_lists([sequence.input_ids for sequence in each]))
        columns.append(_lists([list(chain.from_iterable(sequence.spans)) for sequence in each]))
    if kind == "votes":
        columns.append(pa.array([sample.liked for sample in samples if isinstance(sample, VoteSample)], pa.bool_()))
    columns.append(pa.array([sample.id for sample in samples], pa.string()))
    schema, images = SCHEMAS[kind], [sample.images for sample in samples if isinstance(sample, Sample)]
    if any(images):
        schema = WITH_IMAGES
        texts = pa.list_(pa.string())
        columns.append(pa.array([[image.sha256 for image in row] for row in images], texts))
        columns.append(_lists([list(chain.from_iterable(image.grid for image in row)) for row in images]))
        columns.append(pa.array([[image.source for image in row] for row in images], texts))
    data: bytes = pa.record_batch(columns, schema=schema).serialize().to_pybytes()
    return data


def _lists(rows: Sequence[Sequence[int]]) -> pa.Array:
    """As ``pa.array(rows, list<int32>)``, ten times faster."""
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(rows), np.int32, int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


class ShardWriter:
    """Writes ``<split>/shard-00000.arrow`` and so on. A shard holds rows of one source.

    Args:
        folder: of the data set; the split's own is made in it if needed.
        split: its name.
        kind: a key of `SCHEMAS`.
        state: what `state` returned in an earlier process; rows that came after it are forgotten.
    """

    def __init__(self, folder: Path, split: str, kind: str, state: dict[str, Any] | None = None) -> None:
        self._folder, self._split, self._plain = folder, split, SCHEMAS[kind]
        self._images: bool = bool(state and state.get("images"))
        """The source has shown an image."""
        (folder / split).mkdir(exist_ok=True)
        self.shards: list[dict[str, Any]] = state["shards"] if state else []
        """The finished ones, as they stand in the manifest."""
        self._source: str = state["source"] if state else ""
        self._rows: int = state["rows"] if state else 0
        self._done: list[Path] = []
        self._done_before: list[Path] = []
        """Partial files of finished shards: those that the latest state may still speak of, and those it does not."""
        if state:
            for shard in self.shards:
                cut(folder / shard["file"], shard["bytes"])
            cut(self._partial, state["bytes"])
        self._file = self._partial.open("ab" if state else "wb")

    def append(self, source: str, batch: bytes, rows: int, *, images: bool = False) -> None:
        """Takes an encoded batch of a source; one after another, no source twice.

        Args:
            source: its name.
            batch: what `encode` made.
            rows: in it.
            images: whether it has any.
        """
        if source != self._source:
            self.finish()
            self._source, self._images = source, False
        if images and not self._images:
            whole = pa.ipc.read_record_batch(pa.py_buffer(batch), WITH_IMAGES)
            # Where the first image is, not where the batch begins: the bytes must not show how the rows came.
            first = int(np.flatnonzero(np.diff(whole["images"].offsets.to_numpy()))[0])
            before = whole.slice(0, first).select(self._plain.names)
            self._append(pa.record_batch(before.columns, schema=self._plain).serialize().to_pybytes(), first)
            self.finish()
            self._images = True
            batch, rows = whole.slice(first).serialize().to_pybytes(), rows - first
        elif self._images and not images:
            plain = pa.ipc.read_record_batch(pa.py_buffer(batch), self._plain)
            none = [pa.array([[]] * rows, field.type) for field in WITH_IMAGES if field.name not in self._plain.names]
            batch = pa.record_batch([*plain.columns, *none], schema=WITH_IMAGES).serialize().to_pybytes()
        self._append(batch, rows)

    @property
    def _schema(self) -> pa.Schema:
        return WITH_IMAGES if self._images else self._plain

    def _append(self, batch: bytes, rows: int) -> None:
        while self._rows + rows >= ROWS_PER_SHARD:
            room = ROWS_PER_SHARD - self._rows
            whole = pa.ipc.read_record_batch(pa.py_buffer(batch), self._schema)
            self._write(whole.slice(0, room).serialize().to_pybytes(), room)
            self.finish()
            batch, rows = whole.slice(room).serialize().to_pybytes(), rows - room
        if rows:
            self._write(batch, rows)

    def state(self) -> dict[str, Any]:
        """What another process needs to go on from here, once it is on the disk; JSON values.

        The state before this one is of use until the next is asked for.
        """
        self._file.flush()
        os.fsync(self._file.fileno())
        for path in self._done_before:
            path.unlink()
        self._done_before, self._done = self._done, []
        return {"shards": self.shards, "source": self._source, "rows": self._rows, "bytes": self._file.tell()} | (
            {"images": True} if self._images else {}
        )

    def finish(self) -> None:
        """Makes a shard of the rows that wait."""
        if self._rows:
            self._file.close()
            name = f"{self._split}/shard-{len(self.shards):05d}.arrow"
            self._write_shard(self._folder / name)
            self._done.append(self._partial)
            self.shards.append({"file": name, "source": self._source, "rows": self._rows} | _facts(self._folder / name))
            self._file, self._rows = self._partial.open("wb"), 0

    def close(self) -> None:
        """Closes the partial file and leaves it, for another process."""
        self._file.close()

    def tidy(self) -> None:
        """Removes the partial files."""
        for path in (self._folder / self._split).glob(f"*{_PARTIAL}"):
            path.unlink()

    @property
    def _partial(self) -> Path:
        return self._folder / self._split / f"shard-{len(self.shards):05d}{_PARTIAL}"

    def _write(self, batch: bytes, rows: int) -> None:
        if not self._rows:
            self._file.write(self._schema.serialize())
        self._file.write(batch)
        self._rows += rows

    def _write_shard(self, path: Path) -> None:
        with pa.OSFile(str(self._partial)) as partial, path.open("wb") as file:
            with pa.ipc.new_file(file, self._schema) as writer:
                for batch in _of_equal_size(pa.ipc.open_stream(partial)):
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _of_equal_size(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows, in each batch as many as fit `_ROWS_PER_BATCH` and `_NUMBERS_PER_BATCH`, or one that does not."""
    waiting: list[pa.RecordBatch] = []
    rows, numbers = _ROWS_PER_BATCH, _NUMBERS_PER_BATCH
    """For which there is room."""
    for batch in batches:
        sizes = _numbers(batch)
        while len(sizes):
            fit = min(rows, int(np.cumsum(sizes).searchsorted(numbers, side="right")))
            if not fit and waiting:
                yield pa.concat_batches(waiting)
                waiting, rows, numbers = [], _ROWS_PER_BATCH, _NUMBERS_PER_BATCH
                continue
            fit = max(1, fit)
            waiting.append(batch.slice(0, fit))
            rows, numbers = rows - fit, numbers - int(sizes[:fit].sum())
            batch, sizes = batch.slice(fit), sizes[fit:]
    if waiting:
        yield pa.concat_batches(waiting)


def _numbers(batch: pa.RecordBatch) -> np.ndarray:
    """[rows] int64: how many numbers the lists of each row hold."""
    lists = [column for column in batch.columns if pa.types.is_list(column.type)]
    sizes: np.ndarray = np.stack([np.diff(column.offsets.to_numpy()) for column in lists]).sum(axis=0, dtype=np.int64)
    return sizes
