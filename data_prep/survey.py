"""The first of two passes, where a row's fate depends on other rows: splits by group or at random, and duplicates.

What it learns of the rows is kept in files beside the journal, 24 bytes a row, and the signature where near-duplicates
are looked for. Deciding takes memory: up to 65 bytes a row for splits, about 100 and more for duplicates (`dedup`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.schema.clean import DedupConfig
from configs.schema.dataset import SplitBy
from data_prep.dataset import Holdout, Part
from data_prep.dedup import Meetings, find_duplicates
from data_prep.journal import cut
from data_prep.records import Origin
from data_prep.split import at_random, by_group
from data_prep.work import DUPLICATE, NEAR_DUPLICATE, UNDECIDED, Rulings, Surveyed, count_repeated

_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "codes": (np.int8, 1),
    "digests": (np.uint64, 2),
    "keys": (np.uint64, 1),
    "lines": (np.uint32, 2),
}
"""File -> type, and numbers a row; see `Surveyed`."""


def arrays_of(width: int) -> dict[str, tuple[type[np.generic], int]]:
    """Names of the survey's files, with types and numbers a row.

    Args:
        width: bytes of a signature; 0: there are none.
    """
    return _ARRAYS | ({"signatures": (np.uint8, width)} if width else {})


def read_arrays(folder: Path, width: int) -> dict[str, NDArray[Any]]:
    """The survey's files, memory-mapped."""
    found: dict[str, NDArray[Any]] = {}
    for name, (of, numbers) in arrays_of(width).items():
        path = folder / name
        flat = np.memmap(path, of, "r") if path.stat().st_size else np.zeros(0, of)
        found[name] = flat.reshape(-1, numbers) if numbers > 1 else flat
    return found


def is_needed(dedup: DedupConfig, parts: Sequence[Part]) -> bool:
    """Whether rows cannot be prepared one by one."""
    return dedup.exact or dedup.near or any(part.holdout and part.holdout.needs_survey for part in parts)


class SurveyFiles:
    """What the survey has learned so far.

    Args:
        folder: made if needed.
        parts: of the data set.
        width: bytes of a signature; 0: there are none.
        state: what `state` returned in an earlier process; rows that came after it are forgotten.
    """

    def __init__(self, folder: Path, parts: Sequence[Part], width: int, state: dict[str, Any] | None = None) -> None:
        self._folder, self._parts = folder, parts
        self._arrays, self._width = arrays_of(width), width
        self._chunks: list[int] = state["chunks"] if state else []
        """Rows of each chunk."""
        self._part_rows: list[int] = state["part_rows"] if state else [0] * len(parts)
        self.rows = sum(self._chunks)
        """So far."""
        folder.mkdir(exist_ok=True)
        if state:
            for name, size in self._sizes().items():
                cut(folder / name, size)
        self._files = {name: (folder / name).open("ab" if state else "wb") for name in self._arrays}

    def take(self, part: int, found: Surveyed) -> None:
        """Adds a chunk."""
        for name, file in self._files.items():
            file.write(getattr(found, name).tobytes())
        rows = len(found.codes)
        self._chunks.append(rows)
        self._part_rows[part] += rows
        self.rows += rows

    def state(self) -> dict[str, Any]:
        """What another process needs to go on from here, once it is on the disk; JSON values."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {"chunks": self._chunks, "part_rows": self._part_rows}

    def close(self) -> None:
        """Closes the files."""
        for file in self._files.values():
            file.close()

    def decide(self, dedup: DedupConfig, meetings: Iterable[Meetings] | None = None) -> Survey:
        """What becomes of the rows. It is decided anew by each process that goes on from here, to the same end.

        Args:
            dedup: what goes.
            meetings: see `find_duplicates`.
        """
        self.close()
        arrays = read_arrays(self._folder, self._width)
        codes = np.array(arrays["codes"])
        self._draw_splits(codes, arrays["digests"][:, 0], arrays["keys"])
        origins = (arrays["lines"], np.cumsum(self._part_rows), [part.source.path for part in self._parts])
        if not (dedup.exact or dedup.near):
            tags = (arrays["digests"][:, 0] & ~np.uint64(3)) | codes.astype(np.uint64)
            counts = {**count_repeated(tags[codes >= 0]), "removed": 0}
            return Survey(codes, None, None, origins, self._chunks, counts)
        found = find_duplicates(dedup, arrays["digests"], arrays.get("signatures"), codes, meetings)
        gone = found.of >= 0
        counts = {
            "exact": int((gone & ~found.near).sum()),
            **({"near": int((gone & found.near).sum())} if dedup.near else {}),
            "across_splits": int((codes[gone] != codes[found.of[gone]]).sum()),
            "removed": int(gone.sum()),
        }
        return Survey(codes, found.of, found.near, origins, self._chunks, counts)

    def _draw_splits(self, codes: NDArray[np.int8], digests: NDArray[np.uint64], keys: NDArray[np.uint64]) -> None:
        """Decides what the rows alone did not: each source by itself."""
        sources: dict[str, tuple[Holdout, list[NDArray[np.int64]]]] = {}
        end = 0
        for part, rows in zip(self._parts, self._part_rows, strict=True):
            begin, end = end, end + rows
            if part.holdout and part.holdout.needs_survey:
                undecided = begin + np.flatnonzero(codes[begin:end] == UNDECIDED)
                sources.setdefault(part.source.name, (part.holdout, []))[1].append(undecided)
        for holdout, found in sources.values():
            rows_of_source = np.concatenate(found)
            draw, by = (by_group, keys) if holdout.by is SplitBy.group else (at_random, digests)
            codes[rows_of_source] = draw(by[rows_of_source], holdout.seed, holdout.validation, holdout.test)

    def _sizes(self) -> dict[str, int]:
        return {name: self.rows * width * np.dtype(of).itemsize for name, (of, width) in self._arrays.items()}


class Survey:
    """What was decided for every row."""

    def __init__(
        self,
        codes: NDArray[np.int8],
        of: NDArray[np.int64] | None,
        near: NDArray[np.bool_] | None,
        origins: tuple[NDArray[np.uint32], NDArray[np.int64], list[str]],
        chunks: Sequence[int],
        duplicates: Mapping[str, int],
    ) -> None:
        self._codes, self._of, self._near = codes, of, near
        self._lines, self._part_ends, self._paths = origins
        self._starts = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64)
        self.duplicates = duplicates
        """For the manifest: how many records are exact or near duplicates, of another split's, and how many go."""

    def rulings(self, chunk: int) -> Rulings:
        """For the rows of the chunk of this number."""
        return self.between(int(self._starts[chunk]), int(self._starts[chunk + 1]))

    def between(self, begin: int, end: int) -> Rulings:
        """For the rows from one number to another."""
        duplicates = {}
        if self._of is not None and self._near is not None:
            for row in np.flatnonzero(self._of[begin:end] >= 0).tolist():
                reason = NEAR_DUPLICATE if self._near[begin + row] else DUPLICATE
                duplicates[row] = reason, str(self._origin(int(self._of[begin + row])))
        return Rulings(self._codes[begin:end], duplicates)

    def save(self, folder: Path) -> None:
        """Writes what was decided, for another process."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("codes", "of", "near", "lines", "part_ends"):
            if (array := getattr(self, f"_{name}")) is not None:
                np.save(folder / f"{name}.npy", array)
        about = {"paths": self._paths, "duplicates": dict(self.duplicates)}
        (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")

    @classmethod
    def saved(cls, folder: Path) -> Survey:
        """What `save` wrote, memory-mapped."""
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        names = [path.stem for path in folder.glob("*.npy")]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
        origins = (arrays["lines"], arrays["part_ends"], about["paths"])
        return cls(arrays["codes"], arrays.get("of"), arrays.get("near"), origins, [], about["duplicates"])

    def _origin(self, row: int) -> Origin:
        line, part = self._lines[row].tolist()
        return Origin(self._paths[int(np.searchsorted(self._part_ends, row, side="right"))], line, part)
