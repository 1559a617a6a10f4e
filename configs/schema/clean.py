"""The groups clean, dedup and executor: what is done to records before they are rendered, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from configs.errors import ConfigError


class UnicodeForm(Enum):
    """Unicode normalisation of every text."""

    none = "none"
    NFC = "NFC"
    NFKC = "NFKC"


class Pii(Enum):
    """Personal data that can be masked."""

    email = "email"
    ip = "ip"
    phone = "phone"
    iban = "iban"
    credit_card = "credit_card"
    """Numbers whose check digit is right."""
    id_card_cn = "id_card_cn"
    """Chinese resident identity numbers whose check digit is right."""


@dataclass
class CleanConfig:
    """What is changed in records, and which are left out. By default nothing is."""

    unicode: UnicodeForm = UnicodeForm.none
    control_characters: bool = False
    """Take out control and zero-width characters that no script or emoji needs; every line ends in a line feed."""
    whitespace: bool = False
    """Take out white space at the ends of lines and texts, and more than two line breaks in a row."""
    min_chars: int = 0
    """Characters of all turns together; records with fewer are left out."""
    max_chars: int = 0
    """As `min_chars`; 0: no limit."""
    languages: list[str] = field(default_factory=list)
    """ISO 639-1 codes, e.g. ``[en, zh]``; records surely in others are left out. Needs ``crosstune[languages]``."""
    max_repetition: float = 0.0
    """Share of a turn in repeated lines or repeated runs of ten words above which a record is left out; 0: off."""
    drop_matching: list[str] = field(default_factory=list)
    """Regular expressions; a record with a match in a turn is left out."""
    keep_matching: list[str] = field(default_factory=list)
    """Regular expressions; a record without a match of each in some turn is left out."""
    mask_pii: list[Pii] = field(default_factory=list)
    """Personal data replaced by ``<EMAIL>`` and so on, in every turn."""

    def __post_init__(self) -> None:
        for key in ("min_chars", "max_chars"):
            if getattr(self, key) < 0:
                raise ConfigError(f"clean.{key}", str(getattr(self, key)), allowed="0 or more")
        if 0 < self.max_chars < self.min_chars:
            raise ConfigError("clean.min_chars", f"{self.min_chars} > clean.max_chars={self.max_chars}")
        if not 0 <= self.max_repetition <= 1:
            raise ConfigError("clean.max_repetition", str(self.max_repetition), allowed="0 (off) to 1")
        for key in ("drop_matching", "keep_matching"):
            for pattern in getattr(self, key):
                _check_pattern(f"clean.{key}", pattern)
        for code in self.languages:
            if not re.fullmatch("[a-z]{2}", code):
                raise ConfigError("clean.languages", f"'{code}'", allowed="ISO 639-1 codes: en, zh, de, ...")


class DedupScope(Enum):
    """Where duplicates are looked for."""

    all = "all"
    """Everywhere: one of each is kept, in test rather than validation, in validation rather than train."""
    across = "across"
    """Between splits only: what repeats a held-out record leaves training; repetition within a split stays."""


@dataclass
class DedupConfig:
    """Removal of records that occur more than once. What is removed is written to ``rejects.jsonl``."""

    exact: bool = False
    """Records whose texts are equal but for case, white space and punctuation."""
    near: bool = False
    """Records that are nearly equal, by MinHash of their word shingles."""
    threshold: float = 0.8
    """Jaccard index from which two records are nearly equal."""
    shingle_words: int = 5
    scope: DedupScope = DedupScope.all

    def __post_init__(self) -> None:
        if not 0.5 <= self.threshold <= 1:
            raise ConfigError("dedup.threshold", str(self.threshold), allowed="0.5 to 1")
        if self.shingle_words < 1:
            raise ConfigError("dedup.shingle_words", str(self.shingle_words), allowed="1 or more")


@dataclass
class ExecutorConfig:
    """Where cleaning and deduplication run. Rendering and tokenizing always run here."""

    _target_: str = "data_prep.corpus.Here"


@dataclass
class HereConfig(ExecutorConfig):
    """In this process and its workers."""


@dataclass
class DatatroveConfig(ExecutorConfig):
    """On datatrove's executors, for corpora beyond one machine. Needs ``pip install crosstune[corpus]``."""

    work_dir: str = MISSING
    """Folder that all machines see; intermediate files and logs go there."""
    tasks: int = 16
    """Parts the corpus is cut into; each is one task."""

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise ConfigError("executor.tasks", str(self.tasks), allowed="1 or more")


@dataclass
class LocalConfig(DatatroveConfig):
    """datatrove's executor for one machine: what Slurm and Ray do, to try it out."""

    _target_: str = "data_prep.corpus.Local"
    workers: int = 2
    """Processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers < 1:
            raise ConfigError("executor.workers", str(self.workers), allowed="1 or more")


@dataclass
class SlurmConfig(DatatroveConfig):
    """datatrove's executor for Slurm: job arrays, one after the other."""

    _target_: str = "data_prep.corpus.Slurm"
    partition: str = MISSING
    time: str = "08:00:00"
    """Time limit of one task."""
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 2
    """GiB."""
    workers: int = -1
    """Tasks at a time; -1: as many as Slurm gives."""
    sbatch_args: dict[str, str] = field(default_factory=dict)
    """More options of sbatch, e.g. ``{account: legal}``."""


@dataclass
class RayConfig(DatatroveConfig):
    """datatrove's executor for a Ray cluster that is up already."""

    _target_: str = "data_prep.corpus.Ray"
    workers: int = -1
    """Tasks at a time; -1: all."""
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 2
    """GiB."""


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(key, f"'{pattern}' is no regular expression: {error}") from None
