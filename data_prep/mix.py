"""Several sources of files as one data set."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from configs.schema.dataset import Learn, MixDatasetConfig, SourceConfig
from data_prep.dataset import Dataset, Part, Preview
from data_prep.sources import FilePart, FilesDataset, check_disjoint


class MixDataset(Dataset):
    """See `MixDatasetConfig`. Sources are read in the order of their names, whatever order they are given in.

    The mixture's `system` and `learn` hold for sources that say nothing else. How often each source is shown does not
    matter here: every row is prepared once, and the manifest says the rest.
    """

    def __init__(self, cfg: MixDatasetConfig, *, seed: int = 0) -> None:
        super().__init__(cfg, seed=seed)
        self._sources = {
            name: FilesDataset(_inheriting(source, cfg), seed=seed, place=f"dataset.sources.{name}")
            for name, source in sorted(cfg.source_configs().items())
        }
        licenses = sorted({source.license for source in self._sources.values() if source.license})
        self.license = cfg.license or "; ".join(licenses) or None
        self._mixing = [cfg.mixing.value, cfg.temperature, cfg.tokens]
        self._shares = {name: [s.weight, s.epochs] for name, s in sorted(cfg.source_configs().items())}

    def settings(self) -> dict[str, Any]:
        """See `Dataset.settings`."""
        return {
            "sources": {name: source.settings() for name, source in self._sources.items()},
            "mixing": self._mixing,
            "shares": self._shares,
        }

    def parts(self) -> list[Part]:
        """See `Dataset.parts`."""
        found = list(itertools.chain.from_iterable(source.parts() for source in self._sources.values()))
        check_disjoint([part for part in found if isinstance(part, FilePart)])
        return found

    def open(self) -> None:
        """See `Dataset.open`."""
        for source in self._sources.values():
            source.open()
        self.notes = [note for source in self._sources.values() for note in source.notes]

    def preview(self, rows: int) -> list[Preview]:
        """See `Dataset.preview`."""
        return [preview for source in self._sources.values() for preview in source.preview(rows)]


def _inheriting(source: SourceConfig, cfg: MixDatasetConfig) -> SourceConfig:
    learn = cfg.learn if source.learn is Learn.all else source.learn
    return replace(source, system=source.system or cfg.system, learn=learn)
