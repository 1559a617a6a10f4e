"""``manifest.json``: what was read, with which tokenizer and template, and what came of it. Written last of all.

It holds no times and no paths but those the config named: the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

FORMAT_VERSION = 2
"""Of the folder's layout. A reader refuses others."""
CODE_VERSION = 2
"""Raise it when the same inputs would now give other tokens or spans, so that cached data is made anew."""

NAME = "manifest.json"


def plain(settings: DataclassInstance) -> dict[str, Any]:
    """A group of the config as JSON values."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(settings), default=lambda choice: choice.value))
    return values


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hash of everything that decides the content of prepared data; 64 hex digits.

    Args:
        inputs: JSON values; the order of keys does not matter.
    """
    whole = {"format_version": FORMAT_VERSION, "code_version": CODE_VERSION, **inputs}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes the manifest; with it, the folder counts as whole."""
    text = json.dumps({"format_version": FORMAT_VERSION, **manifest}, indent=1, ensure_ascii=False) + "\n"
    temporary = folder / f".{NAME}"
    temporary.write_text(text, encoding="utf-8", newline="\n")
    temporary.replace(folder / NAME)


def is_prepared(folder: Path) -> bool:
    """Whether a folder was made by `crosstune prep`."""
    try:
        found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"format_version", "fingerprint", "splits"} <= found.keys()


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder whose shards are all there.

    Raises:
        DataError: there is none, it is of another version, or a shard is missing or of the wrong size.
    """
    if not is_prepared(folder):
        raise DataError(str(folder), "no folder of prepared data", remedy="crosstune prep makes one")
    manifest: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if manifest["format_version"] != FORMAT_VERSION:
        raise DataError(
            str(folder),
            f"prepared data of format version {manifest['format_version']}",
            allowed=f"version {FORMAT_VERSION}",
            remedy="prepare it again from the records",
        )
    for entry in manifest["splits"].values():
        for shard in entry["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                found = "missing" if size is None else f"{size} bytes long, not {shard['bytes']}"
                raise DataError(str(path), f"the shard is {found}", remedy="delete the folder and prepare again")
    return manifest
