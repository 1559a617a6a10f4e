"""What a worker does with a chunk: in the survey, what its rows are; in the main pass, all that becomes of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError
from configs.schema.dataset import SplitBy
from configs.schema.roots import PrepConfig
from data_prep.clean import Cleaner
from data_prep.counts import Counts
from data_prep.dataset import SPLITS, Part, Row
from data_prep.dedup import Signer, exact_digest
from data_prep.records import AnyRecord, Reject
from data_prep.render import Renderer
from data_prep.rendered import AnySample
from data_prep.shards import encode, kind_of_record
from data_prep.split import by_digest

NO_RECORD, UNDECIDED = -1, -2
"""Codes of rows beside those of `SPLITS`: a reject; one whose split depends on other rows."""
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near-duplicate"


@dataclass(frozen=True, slots=True)
class Rulings:
    """What the survey decided for the rows of a chunk."""

    codes: NDArray[np.int8]
    """[rows]: position in `SPLITS`, or `NO_RECORD`."""
    duplicates: dict[int, tuple[str, str]]
    """Row of the chunk, from 0 -> reason to leave it out, and the row that stays in its place."""


@dataclass(frozen=True, slots=True)
class Task:
    """A chunk of a part, for a worker."""

    part: int
    payload: Any
    rulings: Rulings | None = None
    size: int = 0
    """See `Chunk.size`."""


@dataclass(slots=True)
class Surveyed:
    """What the survey learns of a chunk; arrays of one entry a row, rejects included."""

    codes: NDArray[np.int8]
    digests: NDArray[np.uint64]
    """[rows, 2]: `exact_digest`, whose first half is big-endian; zero for rejects."""
    keys: NDArray[np.uint64]
    """Hash of what the holdout goes by."""
    lines: NDArray[np.uint32]
    """[rows, 2]: line and part of each row's origin."""
    signatures: NDArray[np.uint8] | None


@dataclass(slots=True)
class Made:
    """What became of a chunk."""

    rows: int = 0
    kind: str | None = None
    """A key of `shards.SCHEMAS`; None: no record came through."""
    batches: dict[str, tuple[bytes, Counts]] = field(default_factory=dict)
    """Split -> encoded samples, counted."""
    rejects: list[tuple[Reject, str | None]] = field(default_factory=list)
    """With their splits, as far as they are known; in the order of the rows."""
    tags: bytes = b""
    """Without a survey, uint64 a record: its digest, the lowest two bits replaced by the code of its split."""
    notes: Counter[str] = field(default_factory=Counter)
    """What a reader of the manifest should know, counted."""
    cleaned: Counter[str] = field(default_factory=Counter)
    """What cleaning changed."""


class Work:
    """Turns chunks into what the main process keeps.

    Args:
        cfg: the whole config.
        parts: of the data set, in order, opened.
        renderer: None for a survey.
    """

    def __init__(self, cfg: PrepConfig, parts: Sequence[Part], renderer: Renderer | None) -> None:
        self._parts, self._renderer = parts, renderer
        self.cleaner = Cleaner(cfg.clean)
        self._signer = Signer(cfg.dedup) if cfg.dedup.near else None

    def survey(self, task: Task) -> Surveyed:
        """The first pass over a chunk."""
        part = self._parts[task.part]
        return self.surveyed(part, list(self.cleaned(part, task.payload)))

    def surveyed(self, part: Part, rows: Sequence[Row]) -> Surveyed:
        """What the survey learns of rows that are clean."""
        digests = [b"\0" * 16 if isinstance(row.item, Reject) else exact_digest(row.item) for row in rows]
        records = [row.item for row in rows if not isinstance(row.item, Reject)]
        signatures = None
        if self._signer is not None:
            signatures = np.zeros((len(rows), self._signer.width), np.uint8)
            signatures[[not isinstance(row.item, Reject) for row in rows]] = self._signer(records)
        pairs = zip(rows, digests, strict=True)
        keys = [_key(row, digest) for row, digest in zip(rows, digests, strict=True)]
        return Surveyed(
            np.array([_code(part, row, digest) for row, digest in pairs], np.int8),
            _numbers(b"".join(digests)).reshape(-1, 2),
            _numbers(b"".join(keys)),
            np.array([[row.item.origin.line, row.item.origin.part] for row in rows], np.uint32).reshape(-1, 2),
            signatures,
        )

    def prepare(self, task: Task) -> Made:
        """The main pass over a chunk.

        Raises:
            DataError: its rows are of several kinds.
            ModelError: there are conversations, and the model has no usable chat template.
        """
        assert self._renderer is not None
        part, made = self._parts[task.part], Made()
        results: list[tuple[str | None, AnyRecord | Reject]] = []
        tags: list[int] = []
        for number, row in enumerate(self.cleaned(part, task.payload)):
            item = row.item
            if isinstance(item, Reject):
                results.append((row.split or part.split or (None if part.holdout else SPLITS[0]), item))
                continue
            if task.rulings is None:
                digest = exact_digest(item)
                code = _code(part, row, digest)
                tags.append(int.from_bytes(digest[:8], "big") & ~3 | code)
            else:
                code = int(task.rulings.codes[number])
                if number in task.rulings.duplicates:
                    reason, kept = task.rulings.duplicates[number]
                    item = Reject(item.origin, reason, f"of {kept}", counts=False)
            results.append((SPLITS[code], item))
        made.rows = len(results)
        made.tags = np.array(tags, np.uint64).tobytes()
        self._render(results, made, part)
        for counts, of_chunk in ((self._renderer.notes, made.notes), (self.cleaner.masked, made.cleaned)):
            of_chunk.update(counts)
            counts.clear()
        return made

    def cleaned(self, part: Part, payload: Any) -> Iterator[Row]:
        """The rows of a chunk, cleaned."""
        for row in part.rows(payload):
            row.item = self.cleaner(row.item)
            yield row

    def _render(self, results: list[tuple[str | None, AnyRecord | Reject]], made: Made, part: Part) -> None:
        assert self._renderer is not None
        records = [item for _, item in results if not isinstance(item, Reject)]
        kinds = sorted({kind_of_record(record) for record in records})
        if len(kinds) > 1:
            raise DataError(part.source.path, f"holds {' and '.join(kinds)}, which are prepared apart")
        made.kind = kinds[0] if kinds else None
        rendered = iter(self._renderer.render(records))
        samples: dict[str, list[AnySample]] = {split: [] for split in SPLITS}
        for split, item in results:
            for outcome in [item] if isinstance(item, Reject) else next(rendered):
                if isinstance(outcome, Reject):
                    made.rejects.append((outcome, split))
                else:
                    assert split is not None
                    samples[split].append(outcome)
        for split, found in samples.items():
            if found:
                assert made.kind is not None
                counts = Counts()
                for sample in found:
                    counts.add(sample)
                made.batches[split] = encode(made.kind, found), counts


@dataclass(frozen=True)
class MakeWork:
    """Makes the function of a pass; see `pool.Make`."""

    cfg: PrepConfig
    parts: Sequence[Part]
    renderer: Callable[[], Renderer] | None
    """None: for the survey."""

    def __call__(self) -> Callable[[Task], Any]:
        """The function of the pass."""
        work = Work(self.cfg, self.parts, self.renderer() if self.renderer else None)
        return work.prepare if self.renderer else work.survey


def _code(part: Part, row: Row, digest: bytes) -> int:
    """Code of a row's split, as far as the row decides it."""
    if isinstance(row.item, Reject):
        return NO_RECORD
    if (split := row.split or part.split) is not None:
        return SPLITS.index(split)
    holdout = part.holdout
    if holdout is None:
        return 0
    if holdout.needs_survey:
        return UNDECIDED
    if holdout.by is SplitBy.key:
        digest = _key(row, digest)
    return by_digest(digest, holdout.validation, holdout.test)


def _key(row: Row, digest: bytes) -> bytes:
    """8 bytes: hash of the split key, or of the content where there is none."""
    return digest[:8] if row.key is None else hashlib.blake2b(row.key.encode(), digest_size=8).digest()


def _numbers(data: bytes) -> NDArray[np.uint64]:
    return np.frombuffer(data, ">u8").astype(np.uint64)


def count_repeated(tags: NDArray[np.uint64]) -> Mapping[str, int]:
    """How many records repeat another, and how many of different splits are equal; `tags` is sorted in place.

    Args:
        tags: see `Made.tags`.
    """
    tags.sort()
    same = (tags[1:] ^ tags[:-1]) < np.uint64(4)
    # Within a run of equal digests the splits are sorted: each change is one split more that has the record.
    across = same & (tags[1:] != tags[:-1])
    return {"exact": int(same.sum()), "across_splits": int(across.sum())}
