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
from data_prep.dataset import file_sha256
from data_prep.readers import RawRow

_FORM = re.compile(
    r"hf://(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/:]+))?(?:/(?P<config>[^/:]+))?(?::(?P<split>[^/:]+))?$"
)
_BATCH_ROWS = 256


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

    def sha256(self) -> str:
        """Hash of the Arrow files that `datasets` keeps for it."""
        digest = hashlib.sha256(self._split.encode())
        for file in self._data.cache_files:
            digest.update(file_sha256(Path(file["filename"])).encode())
        return digest.hexdigest()

    def rows(self) -> Iterator[RawRow]:
        """Its rows, numbered from 1."""
        number = 0
        for batch in self._data.iter(batch_size=_BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield RawRow(number, dict(zip(batch, values, strict=True)))
