"""What `crosstune prep inspect` shows of a folder of prepared data: its summary, samples, one record, the rejects."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from configs.errors import DataError, ModelError
from configs.schema.roots import PrepConfig
from data_prep import manifest as manifests
from data_prep.samples import (
    Decode,
    ShownSample,
    find_samples,
    first_rejects,
    origin_pattern,
    place,
    read_rejects,
    samples_of,
    visible,
)
from data_prep.summary import summary_lines
from data_prep.terminal import legend, print_line, print_sample
from data_prep.tokenizer import load_tokenizer, tokenizer_sha256


@dataclass(frozen=True)
class Wanted:
    """What to show of a folder."""

    path: Path
    n: int = 5
    """Samples; with `rejects`, rows of each reason."""
    split: str = "train"
    """Split whose samples are shown."""
    id: str | None = None
    """``FILE:LINE``: what became of this row, in place of samples."""
    rejects: bool = False
    """Rows that were left out, by reason, in place of samples."""
    model: Path | None = None
    """Folder with the tokenizer; None: the one the manifest names."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    path: Path
    summary: list[str]
    samples: list[ShownSample] = field(default_factory=list)
    rejects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Reason -> rows as in ``rejects.jsonl``, the commonest reason first."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Reason -> how many rows it has in all."""
    specials: list[str] = field(default_factory=list)
    """Texts of the tokenizer's special tokens."""

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "prepared": str(self.path),
            "summary": self.summary,
            "samples": [sample.to_json() for sample in self.samples],
            "rejects": [{"reason": k, "rows": self.counts[k], "first": rows} for k, rows in self.rejects.items()],
        }

    def show(self, console: Console) -> None:
        """Prints it."""
        for line in [str(self.path), *(f"  {line}" for line in self.summary)]:
            print_line(console, visible(line))
        if self.samples:
            print_line(console, "")
            print_line(console, legend(console))
        for sample in self.samples:
            print_sample(console, sample, self.specials)
        for reason, rows in self.rejects.items():
            print_line(console, "")
            head = Text(visible(reason), style="bold red").append(f"  {_rows(self.counts[reason])}", style="not bold")
            print_line(console, head.append(", the first:" if self.counts[reason] > len(rows) else ":"))
            for row in rows:
                print_line(
                    console, f"  {visible(place(row))}" + visible(f"  {row['detail']}" if "detail" in row else "")
                )


def _rows(count: int) -> str:
    return f"{count:,} row" + ("s" if count != 1 else "")


def inspect(wanted: Wanted) -> Inspection:
    """Reads what is wanted.

    Raises:
        DataError: `path` is no whole folder of prepared data, or has not what is wanted.
        ModelError: the tokenizer is not there or is another one.
    """
    _refuse_raw_records(wanted.path)
    manifest = manifests.read(wanted.path)
    summary = summary_lines(manifest, wanted.path)
    if wanted.rejects:
        counts = manifest["rejects"]["by_reason"]
        return Inspection(wanted.path, summary, rejects=first_rejects(wanted.path, counts, wanted.n), counts=counts)
    folder = _tokenizer_folder(manifest, wanted.model)
    decode, specials = _decoder(folder)
    if wanted.id is not None:
        return _one_record(wanted, wanted.id, manifest, decode, specials)
    if wanted.split not in manifest["splits"]:
        raise DataError(f"split={wanted.split}", "no such split", allowed=", ".join(manifest["splits"]))
    samples = samples_of(wanted.path, manifest["splits"][wanted.split], decode, wanted.n, split=wanted.split)
    return Inspection(wanted.path, summary, samples, specials=specials)


def _refuse_raw_records(path: Path) -> None:
    if path.exists() and not manifests.is_prepared(path):
        raise DataError(
            str(path),
            "no folder of prepared data",
            remedy=f"if these are raw records: crosstune prep --dry-run model.path=MODEL dataset.path={path}",
        )


def _one_record(
    wanted: Wanted, origin: str, manifest: Mapping[str, Any], decode: Decode, specials: list[str]
) -> Inspection:
    """The samples of a row, or why there are none."""
    samples = find_samples(wanted.path, manifest, origin, decode)
    gone = [row for row in read_rejects(wanted.path) if re.search(origin_pattern(origin), place(row))]
    if not samples and not gone:
        files = [source["path"] for source in manifest["sources"]]
        shown = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if files[5:] else "")
        raise DataError(f"id={origin}", "no such row, neither kept nor left out", allowed=f"FILE:LINE of {shown}")
    rejects: dict[str, list[dict[str, Any]]] = {}
    for row in gone:
        rejects.setdefault(row["reason"], []).append(row)
    counts = {reason: len(rows) for reason, rows in rejects.items()}
    return Inspection(wanted.path, [], samples, rejects, counts, specials)


def _tokenizer_folder(manifest: Mapping[str, Any], given: Path | None) -> Path:
    """The folder of the tokenizer that made the data."""
    named = manifest["tokenizer"].get("path")
    if given is not None:
        candidates = [given]
    elif named:
        candidates = [Path(named).expanduser(), Path(PrepConfig.cache_dir).expanduser() / "models" / named]
    else:
        candidates = []
    there = [folder for folder in candidates if folder.is_dir()]
    for folder in there:
        if tokenizer_sha256(folder) == manifest["tokenizer"]["sha256"]:
            return folder
    where = f"model.path={given or named or ''}"
    found = "holds another tokenizer than the data was made with" if there else "no such folder"
    raise ModelError(where, found, remedy="model.path=DIR, the model folder that the data was prepared for")


def _decoder(folder: Path) -> tuple[Decode, list[str]]:
    """How ids become text, and the texts of the special tokens.

    The tokenizers library alone opens a folder in a fraction of a second; transformers, which takes seconds to import,
    is only asked where the folder holds another kind of tokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
        specials = [token.content for token in fast.get_added_tokens_decoder().values() if token.special]
        return lambda ids: str(fast.decode(ids, skip_special_tokens=False)), specials
    slow: Any = load_tokenizer(folder)
    return lambda ids: str(slow.decode(ids, skip_special_tokens=False)), list(slow.all_special_tokens)
