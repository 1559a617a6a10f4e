"""Arrow shards of one split, written in order with bounded memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.dataset import file_sha256
from data_prep.render import Sample

ROWS_PER_SHARD = 64 * 1024
_ROWS_PER_BATCH = 1024

SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("spans", pa.list_(pa.int32()), nullable=False),
        pa.field("id", pa.string(), nullable=False),
    ]
)
"""`spans` is flat: start, end, start, end ...; token indices that are learned, half-open, sorted, disjoint, above 0."""


class SplitWriter:
    """Writes ``<folder>/shard-00000.arrow`` and so on, and counts what it writes.

    Args:
        folder: made if needed.
        max_length: tokens; sets the widths of the length histogram.
        rows_per_shard: rows after which a new file begins.
    """

    def __init__(self, folder: Path, *, max_length: int, rows_per_shard: int) -> None:
        folder.mkdir(parents=True)
        self._folder, self._rows_per_shard = folder, rows_per_shard
        self._bin = max(1, -(-max_length // 32))
        self._waiting: list[Sample] = []
        self._file: Any = None
        self._shards: list[dict[str, Any]] = []
        self._bins: Counter[int] = Counter()
        self.rows = self.tokens = self.supervised = self.longest = 0

    def add(self, sample: Sample) -> None:
        """Takes a sample; it may be written later."""
        length = len(sample.input_ids)
        self.rows += 1
        self.tokens += length
        self.supervised += sample.supervised
        self.longest = max(self.longest, length)
        self._bins[-(-length // self._bin) * self._bin] += 1
        self._waiting.append(sample)
        if len(self._waiting) == min(_ROWS_PER_BATCH, self._rows_per_shard):
            self._flush()

    def close(self) -> dict[str, Any]:
        """Writes what waits; the split's entry of the manifest.

        Its `length_histogram` maps the upper edge of a bin, in tokens and inclusive, to the rows in it; bins are
        equally wide, and those between the first and the last are there even if empty.
        """
        self._flush()
        self._end_shard()
        edges = range(min(self._bins, default=0), max(self._bins, default=-1) + 1, self._bin)
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "max_length": self.longest,
            "length_histogram": {str(edge): self._bins[edge] for edge in edges},
            "shards": self._shards,
        }

    def abandon(self) -> None:
        """Closes the open file after a failure; what was written is of no use."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._file is None:
            name = f"shard-{len(self._shards):05d}.arrow"
            self._file = pa.ipc.new_file(str(self._folder / name), SCHEMA)
            self._shards.append({"file": f"{self._folder.name}/{name}", "rows": 0})
        columns = [
            pa.array([s.input_ids for s in self._waiting], SCHEMA.field(0).type),
            pa.array([[k for span in s.spans for k in span] for s in self._waiting], SCHEMA.field(1).type),
            pa.array([s.id for s in self._waiting], SCHEMA.field(2).type),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=SCHEMA))
        self._shards[-1]["rows"] += len(self._waiting)
        self._waiting = []
        if self._shards[-1]["rows"] >= self._rows_per_shard:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        path = self._folder.parent / self._shards[-1]["file"]
        self._shards[-1] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
