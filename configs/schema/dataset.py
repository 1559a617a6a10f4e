"""The dataset group: where records come from, how they are read and split."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from configs.errors import ConfigError, not_empty


class RecordFormat(Enum):
    """The shape of a raw record; `auto` looks at the first rows, says what it recognised, and stops when unsure."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    text = "text"


@dataclass
class DatasetConfig:
    """What every dataset has; `FilesDatasetConfig` and others add where it comes from."""

    _target_: str = MISSING
    """Class that yields the records; a subclass of ``data_prep.sources.Dataset``."""
    name: str = "data"
    """Used in folder names, reports and the model card."""
    license: str | None = None
    """Licence of the data, for the model card."""
    system: str | None = None
    """System turn put before records that have none."""
    max_rejects: int = 100
    """More rows than this left out for a fault of theirs stop the preparation. -1: no limit."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError("dataset.name", f"'{self.name}'", allowed="a name for a folder, without / and no . first")
        if self.max_rejects < -1:
            raise ConfigError("dataset.max_rejects", str(self.max_rejects), allowed="-1 (no limit), 0 or more")


@dataclass
class FilesDatasetConfig(DatasetConfig):
    """Records in files: jsonl, json, csv, parquet, arrow, txt, each also gzipped; or a hub dataset."""

    _target_: str = "data_prep.sources.FilesDataset"
    path: str = MISSING
    """File, folder or glob; a folder made by `crosstune prep`; or ``hf://org/name`` (asks the network)."""
    validation_path: str | None = None
    test_path: str | None = None
    format: RecordFormat = RecordFormat.auto
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name -> theirs, e.g. ``{prompt: question, completion: answer}``."""
    validation_fraction: float = 0.0
    """Share of the records of `path`, chosen by a hash of their content, held out without a `validation_path`."""
    test_fraction: float = 0.0
    """As `validation_fraction`, for the test split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("path", "validation_path", "test_path"):
            not_empty(f"dataset.{key}", getattr(self, key))
        for key in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"dataset.{key}", str(getattr(self, key)), allowed="0 up to, not including, 1")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ConfigError("dataset.test_fraction", "validation and test together leave nothing to train on")


@dataclass
class LicensesDatasetConfig(DatasetConfig):
    """Licence notices of the package `licensedcode-data`: given the notice, answer its licence expression."""

    _target_: str = "data_prep.licenses.LicensesDataset"
    name: str = "licenses"
    license: str | None = "CC-BY-4.0"
    path: str | None = None
    """Folder of ``*.RULE`` files; null: the one inside the installed package `licensedcode-data`."""
    min_chars: int = 40
    max_chars: int = 900
    min_per_label: int = 25
    """Expressions with fewer distinct notices are left out."""
    max_per_label: int = 120
    """Head classes are capped at this many notices."""
    exclude_labels: list[str] = field(default_factory=list)
    """Shell-style patterns of catch-all labels that name no licence."""
    test_fraction: float = 0.11
    validation_fraction: float = 0.02
    near_duplicate_jaccard: float = 0.8
    """A training notice this alike to a held-out one is taken out of training."""
    shingle_words: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.near_duplicate_jaccard <= 1:
            raise ConfigError(
                "dataset.near_duplicate_jaccard", str(self.near_duplicate_jaccard), allowed="above 0 up to 1"
            )
        for key in ("max_per_label", "shingle_words"):
            if getattr(self, key) < 1:
                raise ConfigError(f"dataset.{key}", str(getattr(self, key)), allowed="1 or more")
        for key in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"dataset.{key}", str(getattr(self, key)), allowed="0 up to, not including, 1")
        if self.min_chars > self.max_chars:
            raise ConfigError("dataset.min_chars", f"{self.min_chars} > dataset.max_chars={self.max_chars}")
