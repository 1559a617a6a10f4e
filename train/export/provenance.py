"""Where an export came from: written beside it, and read back with a check of everything that is still there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from configs.errors import CheckpointError
from train.export.trained import Trained
from train.observe.environment import code_version, package_versions
from train.run_folder import sha256_of

NAME = "provenance.json"
KIND = "crosstune export"
FORMAT_VERSION = 1


def write_provenance(trained: Trained, folder: Path, hashes: Mapping[str, str]) -> None:
    """Writes provenance.json for the export in `folder`, whose own files are complete.

    Args:
        trained: what was exported.
        folder: with the files.
        hashes: SHA-256 of those that were hashed as they were written.
    """
    record, prepared = trained.record, Path(trained.record.prepared)
    content = {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: hashes.get(name) or sha256_of(folder / name) for name in _files(folder)},
        "checkpoint": {
            "path": str(trained.checkpoint.resolve()),
            "step": trained.reader.state.step,
            "index_sha256": sha256_of(trained.checkpoint / "index.json"),
        },
        "run": {
            "path": str(trained.run.path.resolve()),
            "engine": record.engine,
            "world_size": record.world_size,
            "precision": record.precisions,
            "code": record.code_version,
        },
        "data": {
            "path": str(prepared),
            "manifest_sha256": record.manifest_sha256,
            "fingerprint": _fingerprint(prepared),
            "name": trained.cfg.dataset.name,
            "license": trained.cfg.dataset.license,
        },
        "base": {"path": record.model_dir, "named": trained.cfg.model.path, "sha256": record.model_sha256},
        "config": yaml.safe_load(trained.run.resolved.read_text(encoding="utf-8")),
        "exporter": {"code": code_version(), "packages": package_versions()},
    }
    (folder / NAME).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != NAME)


def _fingerprint(prepared: Path) -> str | None:
    try:
        found: str = json.loads((prepared / "manifest.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None  # the data has gone since; its hash is in the run's record
    return found


@dataclass
class Link:
    """One thing that the export depends on."""

    title: str
    lines: list[str]
    files: dict[str, str] = field(default_factory=dict)
    """File -> ``unchanged``, ``changed`` or ``not here``."""

    @property
    def state(self) -> str:
        """The worst of its files; ``recorded`` where there is nothing to compare."""
        for state in ("changed", "not here", "unchanged"):
            if state in self.files.values():
                return state
        return "recorded"

    def __str__(self) -> str:
        odd = [f"{name}: {state}" for name, state in self.files.items() if state != "unchanged"]
        if len(odd) > 4:
            odd = [*odd[:4], f"and {len(odd) - 4} more"]
        return "\n".join([f"{self.title}  [{self.state}]", *(f"    {line}" for line in [*self.lines, *odd])])


@dataclass
class Chain:
    """From an export back to its base model."""

    export: Path
    links: list[Link]

    def __str__(self) -> str:
        return "\n".join(str(link) for link in self.links)

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        links = [{"title": k.title, "state": k.state, "lines": k.lines, "files": k.files} for k in self.links]
        return {"export": str(self.export), "links": links}


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of an export's provenance.json.

    Raises:
        CheckpointError: there is none, or it is not ours.
    """
    try:
        content: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            str(folder), f"not an export (no {NAME})", remedy="name a folder such as RUN/export/merged"
        ) from None
    except ValueError as error:
        raise CheckpointError(str(folder / NAME), f"damaged: {error}") from None
    if content.get("kind") != KIND or content.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            str(folder / NAME),
            f"kind '{content.get('kind')}', version {content.get('format_version')}",
            allowed=f"'{KIND}', version {FORMAT_VERSION}",
        )
    return content


def read_chain(folder: Path) -> Chain:
    """The chain from an export to its base model; whatever can still be reached is hashed again and compared.

    Args:
        folder: adapter/ or merged/ of an export.

    Raises:
        CheckpointError: the folder holds no provenance.json of ours.
    """
    content = read_provenance(folder)
    checkpoint, run, data, base = (content[key] for key in ("checkpoint", "run", "data", "base"))
    return Chain(
        folder,
        [
            Link(
                f"export      {folder}",
                [f"made {content['made']} by crosstune {content['exporter']['code']}", _versions(content)],
                _compare(folder, content["files"]),
            ),
            Link(
                f"checkpoint  {checkpoint['path']}",
                [f"step {checkpoint['step']}, index {checkpoint['index_sha256'][:16]}"],
                _compare_listed(Path(checkpoint["path"]), "index.json", checkpoint["index_sha256"]),
            ),
            Link(
                f"run         {run['path']}",
                [f"{run['engine']} on {run['world_size']} process(es), {run['precision']}, crosstune {run['code']}"],
            ),
            Link(
                f"data        {data['path']}",
                [
                    f"{data['name']}, licence: {data['license'] or 'not stated'}",
                    f"manifest {data['manifest_sha256'][:16]}, fingerprint {str(data['fingerprint'])[:16]}",
                ],
                _compare_listed(Path(data["path"]), "manifest.json", data["manifest_sha256"]),
            ),
            Link(f"base        {base['named']}", [f"in {base['path']}"], _compare(Path(base["path"]), base["sha256"])),
        ],
    )


def _versions(content: Mapping[str, Any]) -> str:
    packages = content["exporter"]["packages"]
    return ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages)


def _compare_listed(folder: Path, index: str, sha256: str) -> dict[str, str]:
    """Compares an index, and if that is unchanged also the files whose hashes it lists."""
    states = _compare(folder, {index: sha256})
    if states[index] == "unchanged":
        content = json.loads((folder / index).read_text(encoding="utf-8"))
        listed = {name: facts["sha256"] for name, facts in content.get("files", {}).items()}
        for split in content.get("splits", {}).values():
            listed |= {shard["file"]: shard["sha256"] for shard in split["shards"] if "sha256" in shard}
        states |= _compare(folder, listed)
    return states


def _compare(folder: Path, expected: Mapping[str, str]) -> dict[str, str]:
    states = {}
    for name, sha256 in expected.items():
        path = folder / name
        if not path.is_file():
            states[name] = "not here"
        else:
            states[name] = "unchanged" if sha256_of(path) == sha256 else "changed"
    return states
