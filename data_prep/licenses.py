"""Licence notices with their licence expressions, out of the rule files of `licensedcode-data`.

A rule file has YAML front matter between ``---`` lines, then the text of a notice as met in real software. The task is
a compliance team's: given the notice, answer its expression. What is left out, and why, is counted in the notes.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from configs.errors import DataError
from configs.schema.dataset import LicensesDatasetConfig
from data_prep.dataset import RowsDataset, Source
from data_prep.near_duplicates import near_duplicates, shingles
from data_prep.records import AnyRecord, Message, Origin, Reject, RowFault, conversation, text_of, with_system

_PACKAGE = "licensedcode-data"
_RULES = "licensedcode/data/rules"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_WANTED = ("is_license_notice", "is_license_text")
_UNWANTED = ("is_false_positive", "is_deprecated")
_MIN_TEST_PER_LABEL = 3


@dataclass(frozen=True)
class Notice:
    """One rule file's text and label."""

    file: str
    text: str
    label: str


class LicensesDataset(RowsDataset):
    """See `LicensesDatasetConfig`. The files (35,000 small ones) are read once, for their hash and the records."""

    def __init__(self, cfg: LicensesDatasetConfig, *, seed: int = 0) -> None:
        super().__init__(cfg, seed=seed)
        self._cfg = cfg
        self._source: tuple[Source, str] | None = None
        self._files = 0
        self._candidates: dict[str, bytes] = {}
        self._rejects: list[Reject] = []

    def settings(self) -> dict[str, Any]:
        """See `Dataset.settings`. The seed is in it: it decides which notices are taken and which are held out.

        `learn` is not: a notice has one answer.
        """
        cfg, skipped = self._cfg, {"_target_", "name", "license", "path", "max_rejects", "learn"}
        return {"seed": self.seed, **{k: v for k, v in vars(cfg).items() if k not in skipped}}

    def source(self) -> tuple[Source, str]:
        """See `RowsDataset.source`: the folder of rule files."""
        if self._source is None:
            folder, shown = _folder(self._cfg.path)
            sha256, size, self._files, self._candidates = _read_folder(folder, shown)
            self._source = Source(shown, self.name, size), sha256
        return self._source

    def rows(self) -> Iterator[tuple[str, AnyRecord | Reject]]:
        """See `RowsDataset.rows`."""
        self.notes, self._rejects = [], []
        splits = self.notices()
        yield from (("train", reject) for reject in self._rejects)
        for split, notices in splits.items():
            for notice in notices:
                yield split, self._record(notice)

    def notices(self) -> dict[str, list[Notice]]:
        """Split -> its notices, sorted by file name.

        Raises:
            DataError: nothing is left.
        """
        source, _ = self.source()
        found = self._kept(self._parsed())
        if not found:
            raise DataError(
                source.path, "no notice fits the limits of the config", remedy="widen dataset.min_chars and so on"
            )
        train, validation, test = self._split(found)
        validation, from_validation = self._without_near_duplicates(validation, test)
        train, from_train = self._without_near_duplicates(train, test + validation)
        self.notes.append(
            f"{len(found)} labels; {from_train} notices taken out of training and {from_validation} out of validation, "
            "near-duplicates of held-out ones"
        )
        splits = {"train": train, "validation": validation, "test": test}
        return {name: sorted(notices, key=lambda n: n.file) for name, notices in splits.items()}

    def _parsed(self) -> list[Notice]:
        """The candidates within the length limits and wanted by their flags, in order of their names."""
        found, cfg = [], self._cfg
        for name, data in sorted(self._candidates.items()):
            try:
                notice = _notice(name, data, cfg.min_chars, cfg.max_chars)
            except RowFault as fault:
                self._rejects.append(Reject(Origin(name, 1), fault.reason, fault.detail))
            else:
                if notice is not None and not any(fnmatchcase(notice.label, p) for p in cfg.exclude_labels):
                    found.append(notice)
        return found

    def _kept(self, notices: list[Notice]) -> dict[str, list[Notice]]:
        """Label -> its notices: distinct texts, frequent labels, head classes capped by a seeded choice."""
        distinct = list({n.text: n for n in reversed(notices)}.values())[::-1]
        by_label: dict[str, list[Notice]] = defaultdict(list)
        for notice in distinct:
            by_label[notice.label].append(notice)
        frequent = {k: v for k, v in sorted(by_label.items()) if len(v) >= self._cfg.min_per_label}
        kept = {label: self._shuffled(found)[: self._cfg.max_per_label] for label, found in frequent.items()}
        self.notes.append(
            f"{self._files} rule files: {len(notices)} notices and texts within the limits, "
            f"{len(distinct)} distinct, {sum(map(len, frequent.values()))} of frequent labels, "
            f"{sum(map(len, kept.values()))} after capping labels at {self._cfg.max_per_label}"
        )
        return kept

    def _shuffled(self, notices: list[Notice]) -> list[Notice]:
        """In an order that depends on the seed and the names, not on the order they came in."""
        return sorted(notices, key=lambda n: hashlib.sha256(f"{self.seed}:{n.file}".encode()).digest())

    def _split(self, found: Mapping[str, list[Notice]]) -> tuple[list[Notice], list[Notice], list[Notice]]:
        """Training, validation and test notices; every label is in test, at least `_MIN_TEST_PER_LABEL` times."""
        train: list[Notice] = []
        validation: list[Notice] = []
        test: list[Notice] = []
        for notices in found.values():
            held = max(_MIN_TEST_PER_LABEL, round(self._cfg.test_fraction * len(notices)))
            more = held + round(self._cfg.validation_fraction * len(notices))
            test += notices[:held]
            validation += notices[held:more]
            train += notices[more:]
        return train, validation, test

    def _without_near_duplicates(self, notices: list[Notice], held_out: list[Notice]) -> tuple[list[Notice], int]:
        """What is unlike every held-out notice, and how many are not."""
        size = self._cfg.shingle_words
        alike = near_duplicates(
            [shingles(n.text, size) for n in notices],
            [shingles(n.text, size) for n in held_out],
            self._cfg.near_duplicate_jaccard,
        )
        return [n for i, n in enumerate(notices) if i not in alike], len(alike)

    def _record(self, notice: Notice) -> AnyRecord:
        messages = [Message("user", notice.text), Message("assistant", notice.label, train=True)]
        return conversation(Origin(notice.file, 1), with_system(messages, self._cfg.system))


def _folder(path: str | None) -> tuple[Path, str]:
    """The folder of rule files, and how messages name it."""
    if path is not None:
        folder, shown = Path(path).expanduser(), path
    else:
        try:
            distribution = importlib.metadata.distribution(_PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            raise DataError(
                "dataset=licenses", f"the package {_PACKAGE} is not installed", remedy="pip install crosstune[demo]"
            ) from None
        folder, shown = Path(str(distribution.locate_file(_RULES))), f"{_PACKAGE} {distribution.version}"
    if not folder.is_dir():
        raise DataError(shown, f"no such folder: {folder}")
    return folder, shown


def _read_folder(folder: Path, shown: str) -> tuple[str, int, int, dict[str, bytes]]:
    """Of all rule files, in order of their names: hash, bytes, number, and the content of those that may be wanted."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".RULE"))
    if not names:
        raise DataError(shown, f"no *.RULE file in {folder}")
    digest, size, candidates = hashlib.sha256(), 0, {}
    for name in names:
        with open(folder / name, "rb", buffering=0) as file:
            data = file.read()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
        size += len(data)
        if any(f"{flag}: yes".encode() in data for flag in _WANTED):
            candidates[name] = data
    return digest.hexdigest(), size, len(names), candidates


def _notice(name: str, data: bytes, min_chars: int, max_chars: int) -> Notice | None:
    """The notice in a rule file; None if it is of the wrong length or kind.

    Raises:
        RowFault: the file is not of the form of a rule.
    """
    try:
        whole = data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise RowFault("invalid UTF-8", f"byte {error.start + 1}") from None
    _, _, rest = whole.partition("---\n")
    front, mark, text = rest.partition("\n---")
    text = text.strip()
    if whole[:3] != "---" or not mark:
        raise RowFault("no front matter")
    if not min_chars <= len(text) <= max_chars:  # before YAML, which is what takes the time
        return None
    try:
        flags = yaml.load(front, Loader=_LOADER)
    except yaml.YAMLError as error:
        raise RowFault("malformed front matter", str(error).splitlines()[0]) from None
    if not isinstance(flags, dict):
        raise RowFault("malformed front matter", "no keys")
    if not any(flags.get(f) for f in _WANTED) or any(flags.get(f) for f in _UNWANTED):
        return None
    return Notice(name, text, text_of(flags.get("license_expression"), "license_expression").strip())
