"""Which files a path means: one file, a glob, or a folder read recursively; and which split a folder's file is for."""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from configs.errors import DataError, nearest
from data_prep import manifest
from data_prep.readers import READERS, kind_of_file
from data_prep.streams import COMPRESSED

_SPLIT_NAME = re.compile(r"(train|validation|valid|val|dev|test)(?![A-Za-z])", re.IGNORECASE)
_SPLITS = {"train": "train", "test": "test"}
_ALIKE = 0.85
"""`SequenceMatcher.ratio` from which a missing file's name may be a slip for another's."""
_NOT_RECORDS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""What `datasets` and others lay beside records, to describe them."""


@dataclass(frozen=True)
class LocalFile:
    """A file to read; `shown` is how the config named it, `split` what its place in a folder says."""

    path: Path
    shown: str
    split: str | None = None


def locate(key: str, path: str) -> tuple[list[LocalFile], list[str]]:
    """The files of a path in sorted order, and notes on what was passed over.

    Args:
        key: config key, for messages.
        path: file, folder or glob.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        return _in_folder(key, path, expanded)
    if expanded.exists():
        if kind_of_file(expanded) is None:
            raise DataError(path, f"a file of unknown kind '{expanded.suffix}'", allowed=_kinds())
        return [LocalFile(expanded, path)], []
    if glob.has_magic(path):
        matches = sorted(m for m in glob.glob(str(expanded), recursive=True) if Path(m).is_file())
        files = [LocalFile(Path(m), m) for m in matches if kind_of_file(Path(m)) is not None]
        if not files:
            raise DataError(
                f"{key}={path}", f"no file that can be read matches ({len(matches)} match at all)", allowed=_kinds()
            )
        return files, [f"{m}: passed over, its kind is not read" for m in matches if kind_of_file(Path(m)) is None]
    near = _alike(expanded)
    raise DataError(
        f"{key}={path}", "no such file or folder" + (f"; did you mean '{expanded.parent / near}'?" if near else "")
    )


def _alike(path: Path) -> str | None:
    """The name of a neighbour that may be meant: a letter or two differ, or the ending."""
    try:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir() or kind_of_file(p) is not None]
    except OSError:
        return None
    near = nearest(path.name, siblings)
    if near and (Path(near).stem == path.stem or SequenceMatcher(None, near, path.name).ratio() >= _ALIKE):
        return near
    return None


def _in_folder(key: str, path: str, folder: Path) -> tuple[list[LocalFile], list[str]]:
    files, notes = [], []
    everything = sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix())
    prepared = {p.parent for p in everything if p.name == manifest.NAME and manifest.is_prepared(p.parent)}
    for each in sorted(prepared):
        notes.append(f"{path.rstrip('/')}/{each.relative_to(folder).as_posix()}: passed over, it is prepared data")
    for file in everything:
        relative = file.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not prepared.isdisjoint(file.parents):
            continue
        shown = f"{path.rstrip('/')}/{relative.as_posix()}"
        if file.is_symlink() and not file.is_file():
            notes.append(f"{shown}: passed over, a link to {'a folder' if file.is_dir() else 'nothing'}")
        if not file.is_file():
            continue
        if kind_of_file(file) is None or file.name in _NOT_RECORDS:
            notes.append(f"{shown}: passed over, it holds no records by its name")
            continue
        files.append(LocalFile(file, shown, _split_of(relative.parts[0])))
    if not files:
        found = f"the folder holds no file that can be read{', only prepared data' if prepared else ''}"
        remedy = f"name the prepared data itself: {key}={min(prepared)}" if prepared else None
        raise DataError(f"{key}={path}", found, allowed=_kinds(), remedy=remedy)
    return files, notes


def _split_of(name: str) -> str | None:
    """``test.jsonl``, ``test-00000.parquet``, a folder ``test``: the test split; other names are of no split."""
    match = _SPLIT_NAME.match(name)
    return _SPLITS.get(match[1].lower(), "validation") if match else None


def _kinds() -> str:
    return ", ".join(f".{kind}" for kind in READERS) + f" (text kinds also packed: {', '.join(COMPRESSED)})"
