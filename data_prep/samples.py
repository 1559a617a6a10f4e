"""Samples of prepared data with what is learned of them, for people to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep import manifest as manifests


@dataclass(frozen=True)
class ShownSample:
    """A sample as text, in pieces that are learned or not."""

    id: str
    split: str
    pieces: list[tuple[str, bool]]
    """(text, whether it is supervised), in order; special tokens are shown as they are written."""

    @property
    def supervised_text(self) -> list[str]:
        """The learned pieces."""
        return [text for text, learned in self.pieces if learned]


def show_samples(
    prepared: Path, decode: Callable[[list[int]], str], n: int = 3, *, split: str = "train"
) -> list[ShownSample]:
    """`n` samples of a split, spread evenly over its first shard.

    Args:
        prepared: folder of prepared data.
        decode: token ids -> text, special tokens included.
        n: how many at most.
        split: which split.

    Raises:
        DataError: the folder is no prepared data.
    """
    entry = manifests.read(prepared)["splits"].get(split)
    if not entry:
        return []
    return samples_of_shard(prepared / entry["shards"][0]["file"], decode, n, split=split)


def samples_of_shard(shard: Path, decode: Callable[[list[int]], str], n: int, *, split: str) -> list[ShownSample]:
    """As `show_samples`, of one shard."""
    import pyarrow as pa

    with pa.memory_map(str(shard)) as source:
        table = pa.ipc.open_file(source).read_all()
        count = min(n, table.num_rows)
        rows = table.take([i * table.num_rows // count for i in range(count)]).to_pylist()
    return [ShownSample(row["id"], split, _pieces(row["input_ids"], row["spans"], decode)) for row in rows]


def _pieces(ids: list[int], spans: list[int], decode: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    pieces, at = [], 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        if start > at:
            pieces.append((decode(ids[at:start]), False))
        pieces.append((decode(ids[start:end]), True))
        at = end
    if at < len(ids):
        pieces.append((decode(ids[at:]), False))
    return pieces
