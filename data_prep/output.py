"""What the main pass writes, in the order of the rows: shards, rejects, and the counts of the manifest."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import DataError
from data_prep.counts import Counts, split_entry
from data_prep.dataset import SPLITS, Part
from data_prep.journal import cut
from data_prep.rejects import RejectLog
from data_prep.shards import ShardWriter
from data_prep.work import Made, count_repeated

_TAGS = "tags"


class Output:
    """A work folder that fills.

    Args:
        folder: the work folder.
        parts: of the data set.
        max_rejects: see `RejectLog`.
        state: what `state` returned in an earlier process; what came after it is forgotten.
    """

    def __init__(self, folder: Path, parts: Sequence[Part], max_rejects: int, state: dict[str, Any] | None) -> None:
        self._folder, self._parts = folder, parts
        state = state or {}
        self.rejects = RejectLog(folder / "rejects.jsonl", max_rejects, state.get("rejects"))
        self.rejects.check(parts[0].source.path)
        self.rows: list[int] = state.get("rows") or [0] * len(parts)
        """Of each part, rejects included."""
        self.tokens: int = state.get("tokens", 0)
        self.kind: str | None = state.get("kind")
        """A key of `shards.SCHEMAS`; None until there is a sample."""
        self._kind_of: str = state.get("kind_of", "")
        """Where the first one came from."""
        self._notes = Counter[str](state.get("notes", {}))
        self.cleaned = Counter[str](state.get("cleaned", {}))
        """What cleaning changed."""
        self._counts = {
            split: {source: Counts.from_json(found) for source, found in by_source.items()}
            for split, by_source in state.get("counts", {}).items()
        }
        self._writers = {
            split: ShardWriter(folder, split, str(self.kind), found)
            for split, found in state.get("writers", {}).items()
        }
        if state:
            cut(folder / _TAGS, state["tags"])
        self._tags = (folder / _TAGS).open("ab" if state else "wb")

    def take(self, number: int, made: Made) -> None:
        """Adds what became of a chunk of the part of this number.

        Raises:
            DataError: too many rows are at fault, or a folder would hold data of two kinds.
        """
        source = self._parts[number].source
        self.rows[number] += made.rows
        for reject, split in made.rejects:
            self.rejects.add(reject, split, source.name)
        self._check_kind(made.kind, source.path)
        for split, (batch, counts) in made.batches.items():
            if split not in self._writers:
                self._writers[split] = ShardWriter(self._folder, split, str(self.kind))
            self._writers[split].append(source.name, batch, counts.rows, images=counts.images > 0)
            self._counts.setdefault(split, {}).setdefault(source.name, Counts()).merge(counts)
            self.tokens += counts.tokens
        self._tags.write(made.tags)
        self._notes.update(made.notes)
        self.cleaned.update(made.cleaned)

    def state(self) -> dict[str, Any]:
        """What another process needs to go on from here, once it is on the disk; JSON values."""
        self._tags.flush()
        os.fsync(self._tags.fileno())
        return {
            "rejects": self.rejects.state(),
            "rows": self.rows,
            "tokens": self.tokens,
            "kind": self.kind,
            "kind_of": self._kind_of,
            "notes": self._notes,
            "cleaned": self.cleaned,
            "counts": {
                split: {source: counts.to_json() for source, counts in by_source.items()}
                for split, by_source in self._counts.items()
            },
            "writers": {split: writer.state() for split, writer in self._writers.items()},
            "tags": self._tags.tell(),
        }

    def close(self) -> None:
        """Closes all files and leaves them, for another process."""
        self.rejects.close()
        self._tags.close()
        for writer in self._writers.values():
            writer.close()

    def end(self) -> None:
        """Finishes the last shards. A state from before is still of use."""
        for writer in self._writers.values():
            writer.finish()

    def tidy(self) -> None:
        """Removes what only another process would need."""
        (self._folder / _TAGS).unlink()
        for writer in self._writers.values():
            writer.tidy()

    def splits(self, max_length: int) -> dict[str, Any]:
        """The manifest's entry of each split that has rows."""
        return {
            split: split_entry(self._counts[split], max_length, self._writers[split].shards)
            for split in SPLITS
            if split in self._writers
        }

    def training_tokens(self) -> dict[str, int]:
        """Source -> tokens of its training rows."""
        counts = self._counts.get("train", {})
        return {part.source.name: counts.get(part.source.name, Counts()).tokens for part in self._parts}

    @property
    def images(self) -> int:
        """How many images all samples show."""
        return sum(counts.images for by_source in self._counts.values() for counts in by_source.values())

    def notes(self) -> list[str]:
        """What was counted on the way, in words."""
        return [f"{what}: {count:,}" for what, count in sorted(self._notes.items()) if count]

    def duplicates(self) -> dict[str, int]:
        """How many records repeat another, where no survey has counted them; 18 bytes a record in memory."""
        tags = np.fromfile(self._folder / _TAGS, np.uint64)
        return {**count_repeated(tags), "removed": 0}

    def _check_kind(self, kind: str | None, path: str) -> None:
        if kind is None or kind == self.kind:
            return
        if self.kind is not None:
            raise DataError(
                path,
                f"holds {kind}, but {self._kind_of} holds {self.kind}; a folder of prepared data holds one kind",
                remedy="prepare them apart; dataset.preference=chosen makes samples of pairs",
            )
        self.kind, self._kind_of = kind, path
