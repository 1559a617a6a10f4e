"""The dataset group: where records come from, how they are read and split."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import ConfigError, nearest, not_empty


class RecordFormat(Enum):
    """The shape of a raw record; `auto` looks at the first rows, says what it recognised, and stops when unsure."""

    auto = "auto"
    messages = "messages"
    sharegpt = "sharegpt"
    alpaca = "alpaca"
    prompt_completion = "prompt_completion"
    preference = "preference"
    """Two answers to one prompt: the chosen one and the rejected one."""
    vote = "vote"
    """One answer and whether it was liked (KTO)."""
    text = "text"


class Learn(Enum):
    """Which of a conversation's assistant turns are learned."""

    all = "all"
    """Every turn that is not marked as context."""
    last = "last"
    """The last turn only: earlier ones are history."""


class Preference(Enum):
    """What becomes of preference pairs."""

    pairs = "pairs"
    """Prepared as pairs."""
    chosen = "chosen"
    """The chosen answer is learned like any other; the rejected one is not read."""


class SplitBy(Enum):
    """How held-out records are chosen where no files are given for them."""

    content = "content"
    """By a hash of the record: neither order, seed nor other records matter; shares are met on average."""
    key = "key"
    """By a hash of the column `split_key`: rows with an equal key stay together, now and in later exports."""
    group = "group"
    """Whole groups of `split_key`, drawn with the seed until the share of rows is reached."""
    random = "random"
    """Rows drawn with the seed; shares are met to the row."""


class Mixing(Enum):
    """How much of each source an epoch shows."""

    epochs = "epochs"
    """Each source as often as its `epochs` says."""
    weight = "weight"
    """Tokens in proportion to the sources' weights."""
    temperature = "temperature"
    """Tokens in proportion to the source's own to the power of 1/temperature."""


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
    learn: Learn = Learn.all
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
    roles: dict[str, str] = field(default_factory=dict)
    """Their name of a role -> ours (system, user, assistant, tool), e.g. ``{Kunde: user, Agent: assistant}``."""
    preference: Preference = Preference.pairs
    split_by: SplitBy = SplitBy.content
    split_key: str | None = None
    """Column of theirs for ``split_by`` key and group, e.g. ``customer_id``."""
    validation_fraction: float = 0.0
    """Share of the records of `path`, chosen by `split_by`, held out without a `validation_path`."""
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
        by_key = self.split_by in (SplitBy.key, SplitBy.group)
        if by_key and not self.split_key:
            raise ConfigError(
                "dataset.split_key", f"needed by dataset.split_by={self.split_by.value}", remedy="name the column"
            )
        if self.split_key and not by_key:
            raise ConfigError(
                "dataset.split_key", f"has no use with dataset.split_by={self.split_by.value}", allowed="key, group"
            )


@dataclass
class SourceConfig(FilesDatasetConfig):
    """One source of a mixture."""

    weight: float = 1.0
    """For ``dataset.mixing=weight``; only the proportions count."""
    epochs: float = 1.0
    """For ``dataset.mixing=epochs``: how often an epoch of the mixture shows the source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("weight", "epochs"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"dataset.{key}", str(getattr(self, key)), allowed="above 0")


@dataclass
class MixDatasetConfig(DatasetConfig):
    """Several sources of files mixed: ``dataset.sources={tickets: {path: a.jsonl, weight: 2}, faq: {path: b.csv}}``."""

    _target_: str = "data_prep.mix.MixDataset"
    name: str = "mix"
    sources: dict[str, Any] = field(default_factory=dict)
    """Name of a source -> its keys: those of ``dataset=files``, and `weight` and `epochs` (`SourceConfig`)."""
    mixing: Mixing = Mixing.epochs
    temperature: float = 1.0
    """For ``mixing=temperature``: 1 keeps the sources' sizes, more evens them out."""
    tokens: int = 0
    """Training tokens that an epoch of the mixture shows; 0: as many as the sources have together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ConfigError(
                "dataset.sources", "none is given", remedy="'dataset.sources={a: {path: a.jsonl}, b: {path: b.jsonl}}'"
            )
        if not self.temperature > 0:  # NaN is not
            raise ConfigError("dataset.temperature", str(self.temperature), allowed="above 0")
        if self.tokens < 0:
            raise ConfigError("dataset.tokens", str(self.tokens), allowed="0 or more")
        if self.tokens and self.mixing is Mixing.epochs:
            raise ConfigError(
                "dataset.tokens", "has no use with dataset.mixing=epochs", allowed="mixing=weight, mixing=temperature"
            )
        self.source_configs()

    def source_configs(self) -> dict[str, SourceConfig]:
        """The sources, typed and checked, in the order given."""
        return {name: _source(name, values) for name, values in self._nested().items()}

    def _nested(self) -> dict[str, dict[str, Any]]:
        """``{"a": {"path": x}, "a.weight": 2}``, which is what ``dataset.sources.a.weight=2`` leaves, as one."""
        found: dict[str, dict[str, Any]] = {}
        for key, value in self.sources.items():
            name, dot, inner = str(key).partition(".")
            if not dot and not isinstance(value, dict):
                raise ConfigError(f"dataset.sources.{name}", f"'{value}'", allowed="keys: {path: ..., weight: ...}")
            found.setdefault(name, {}).update({inner: value} if dot else value)
        return found


def _source(name: str, values: dict[str, Any]) -> SourceConfig:
    """One source of a mixture.

    Raises:
        ConfigError: an unknown key, or a value that does not fit.
    """
    place = f"dataset.sources.{name}"
    values = {str(key): value for key, value in values.items()}
    known = [f.name for f in fields(SourceConfig) if not f.name.startswith("_") and f.name != "max_rejects"]
    for key in values:
        if key not in known:
            near = nearest(key, known)
            raise ConfigError(
                f"{place}.{key}", "unknown key", allowed=", ".join(known), remedy=near and f"did you mean {near}?"
            )
    try:
        typed = OmegaConf.merge(OmegaConf.structured(SourceConfig), dict(values, name=name))
        if OmegaConf.is_missing(typed, "path"):
            raise ConfigError(f"{place}.path", "is not given", remedy=f"dataset.sources.{name}.path=FILE")
        source: SourceConfig = OmegaConf.to_object(typed)  # type: ignore[assignment]
        return source
    except ConfigError as fault:
        raise _moved(fault, place) from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ConfigError(f"{place}.{key}".rstrip("."), str(error).splitlines()[0]) from None


def _moved(fault: ConfigError, place: str) -> ConfigError:
    """The fault of a source, at its own place."""
    key = fault.where.removeprefix(place).removeprefix("dataset.").lstrip(".")
    return ConfigError(f"{place}.{key}", fault.found, allowed=fault.allowed, remedy=fault.remedy)


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
