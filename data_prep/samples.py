"""Samples of prepared data with what is learned of them, and rows left out, for people to look at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import DataError
from data_prep import manifest as manifests

Decode = Callable[[list[int]], str]
"""Token ids -> text, special tokens included."""

_INVISIBLE = {
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *(0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
}
"""Control characters, which a terminal obeys; zero-width ones, and those that turn the direction of writing."""
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _INVISIBLE}


def visible(text: str) -> str:
    """Text with what cannot be seen written out: a record must not steer a terminal."""
    return text.translate(_ESCAPES)


@dataclass(frozen=True)
class ShownText:
    """A sequence as the model sees it, in pieces that are learned or not."""

    pieces: list[tuple[str, bool]]
    """(text, whether it is supervised), in order; special tokens are shown as they are written."""
    tokens: int
    supervised: int
    """Tokens that are learned."""


@dataclass(frozen=True)
class ShownSample:
    """A sample, a pair or a vote."""

    id: str
    split: str
    text: ShownText
    """Of a pair: the chosen conversation."""
    rejected: ShownText | None = None
    """Of a pair: the rejected one."""
    liked: bool | None = None
    """Of a vote: its label."""

    @property
    def supervised_text(self) -> list[str]:
        """The learned pieces; of a pair, those of the chosen conversation."""
        return [text for text, learned in self.text.pieces if learned]

    @property
    def parts(self) -> list[tuple[str, ShownText]]:
        """(label, text): one, or two for a pair; a plain sample's label is empty."""
        if self.rejected is not None:
            return [("chosen", self.text), ("rejected", self.rejected)]
        return [("" if self.liked is None else "liked" if self.liked else "not liked", self.text)]

    def to_json(self) -> dict[str, Any]:
        """For machines: id, split and parts."""
        parts = [
            {
                "label": label or None,
                "tokens": part.tokens,
                "supervised_tokens": part.supervised,
                "pieces": [{"text": text, "learned": learned} for text, learned in part.pieces],
            }
            for label, part in self.parts
        ]
        return {"id": self.id, "split": self.split, "parts": parts}


def shown_text(ids: Sequence[int], spans: Sequence[int], decode: Decode) -> ShownText:
    """Token ids and their learned spans (flat: start, end, start, end ...) as text."""
    pieces: list[tuple[str, bool]] = []
    at = 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        if start > at:
            pieces.append((decode(list(ids[at:start])), False))
        pieces.append((decode(list(ids[start:end])), True))
        at = end
    if at < len(ids):
        pieces.append((decode(list(ids[at:])), False))
    return ShownText(pieces, len(ids), sum(spans[1::2]) - sum(spans[::2]))


def show_samples(prepared: Path, decode: Decode, n: int = 3, *, split: str = "train") -> list[ShownSample]:
    """`n` samples of a split, as many of each source as of any other, spread evenly over its rows.

    Args:
        prepared: folder of prepared data.
        decode: see `Decode`.
        n: how many at most.
        split: which split; one that is not there has no samples.

    Raises:
        DataError: the folder is no prepared data.
    """
    return samples_of(prepared, manifests.read(prepared)["splits"].get(split, {}), decode, n, split=split)


def samples_of(folder: Path, entry: Mapping[str, Any], decode: Decode, n: int, *, split: str) -> list[ShownSample]:
    """As `show_samples`, of the split's `entry` in a manifest that may not be written yet."""
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for shard in entry.get("shards", []):
        by_source.setdefault(shard.get("source", ""), []).append(shard)
    shown: list[ShownSample] = []
    for k, shards in enumerate(by_source.values()):
        share = n // len(by_source) + (k < n % len(by_source))
        for shard, rows in _spread(shards, share):
            shown += _read(folder / shard["file"], rows, split, decode)
    return shown


def find_samples(prepared: Path, manifest: Mapping[str, Any], origin: str, decode: Decode) -> list[ShownSample]:
    """The samples made of the row at `origin`, of whatever split.

    Args:
        prepared: folder of prepared data.
        manifest: its manifest.
        origin: ``FILE:LINE``; of the file as the config named it, or of the end of that path.
        decode: see `Decode`.
    """
    import pyarrow.compute as pc

    pattern = origin_pattern(origin)
    shown: list[ShownSample] = []
    for split, entry in manifest["splits"].items():
        for shard in entry["shards"]:
            with _table(prepared / shard["file"]) as table:
                rows = pc.indices_nonzero(pc.match_substring_regex(table["id"], pattern)).to_pylist()
            if rows:
                shown += _read(prepared / shard["file"], rows, split, decode)
    return shown


def origin_pattern(origin: str) -> str:
    """A regular expression for the ids of a row's samples, or of the rows on its line, in any folder."""
    return f"(^|/){re.escape(origin)}([#/][0-9]+)*$"  # rows on one line are #2, samples of one row /2


def first_rejects(folder: Path, counts: Mapping[str, int], n: int) -> dict[str, list[dict[str, Any]]]:
    """The first `n` rows left out of each reason in `counts`; the file is read no further than needed."""
    found: dict[str, list[dict[str, Any]]] = {reason: [] for reason in counts}
    missing = sum(min(n, count) for count in counts.values())
    for row in read_rejects(folder):
        rows = found.setdefault(row["reason"], [])
        if len(rows) < n:
            rows.append(row)
            missing -= 1
        if not missing:
            break
    return found


def place(reject: Mapping[str, Any]) -> str:
    """``file:line`` of a line of ``rejects.jsonl``, with the row's number if several stand on that line."""
    return f"{reject['file']}:{reject['line']}" + (f"#{reject['part']}" if "part" in reject else "")


def read_rejects(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of ``rejects.jsonl``.

    Raises:
        DataError: they cannot be read.
    """
    path = folder / "rejects.jsonl"
    try:
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"cannot be read: {error}", remedy="prepare the records again") from error


def _spread(shards: Sequence[Mapping[str, Any]], n: int) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
    """`n` rows evenly over the shards, as (shard, rows of it)."""
    total = sum(shard["rows"] for shard in shards)
    wanted = [i * total // min(n, total) for i in range(min(n, total))]
    begin = 0
    for shard in shards:
        rows = [at - begin for at in wanted if begin <= at < begin + shard["rows"]]
        if rows:
            yield shard, rows
        begin += shard["rows"]


@contextmanager
def _table(shard: Path) -> Iterator[Any]:
    """A shard as a memory-mapped table."""
    import pyarrow as pa

    with pa.memory_map(str(shard)) as source:
        yield pa.ipc.open_file(source).read_all()


def _read(shard: Path, rows: list[int], split: str, decode: Decode) -> list[ShownSample]:
    with _table(shard) as table:
        found = table.take(rows).to_pylist()
    return [_shown(row, split, decode) for row in found]


def _shown(row: Mapping[str, Any], split: str, decode: Decode) -> ShownSample:
    rejected = None
    if "rejected_input_ids" in row:
        rejected = shown_text(row["rejected_input_ids"], row["rejected_spans"], decode)
    return ShownSample(row["id"], split, shown_text(row["input_ids"], row["spans"], decode), rejected, row.get("liked"))
