"""Data sets of a hub, through the `datasets` library: ``hf://org/name[@revision][/config][:split]``.

The only place of this room that may ask a network, and only for a path written ``hf://``. A folder ``org/name`` below
the working directory is taken before the hub, as `datasets` has it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import DataError
from configs.schema.model import HUB_PREFIX
from data_prep.columns import table_chunks
from data_prep.dataset import Chunk, Mark, file_sha256

_FORM = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<config>[^/:]+))?(?::(?P<split>[^/:]+))?$"
)
_BATCH_ROWS = 1024


def is_hub(path: str) -> bool:
    """Whether a path names a hub data set."""
    return path.startswith(HUB_PREFIX)


class HubDataset:
    """One split of a hub data set, downloaded and memory-mapped by `datasets`.

    Raises:
        DataError: the path is not of the form above.
    """

    def __init__(self, path: str) -> None:
        match = _FORM.match(path)
        if match is None:
            raise DataError("dataset.path", f"'{path}'", allowed="hf://org/name[@revision][/config][:split]")
        self.shown = path
        self._name, self._revision, self._config = match["name"], match["revision"], match["config"]
        self._split = match["split"] or "train"

    @cached_property
    def _data(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self._name, self._config, split=self._split, revision=self._revision)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                self.shown,
                f"cannot be loaded: {first}",
                remedy="check name, config and split; without a network, name a folder of files instead",
            ) from error

    @property
    def files(self) -> list[Path]:
        """The Arrow files that `datasets` keeps for it."""
        return [Path(file["filename"]) for file in self._data.cache_files]

    def sha256(self) -> str:
        """Hash of those files."""
        digest = hashlib.sha256(self._split.encode())
        for file in self.files:
            digest.update(file_sha256(file).encode())
        return digest.hexdigest()

    def chunks(self, after: Mark) -> Iterator[Chunk]:
        """Its rows from a mark on, numbered from 1."""
        size, total = sum(file.stat().st_size for file in self.files), max(1, len(self._data))
        batches = self._data.with_format("arrow").skip(after.offset).iter(batch_size=_BATCH_ROWS)
        tables = (batch for table in batches for batch in table.to_batches())
        yield from table_chunks(tables, after.offset, after, lambda done: size * done // total)
