"""What a checkpoint is and whether it is whole, for people: `crosstune report RUN/checkpoints/step-...`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import EXIT_DONE, EXIT_USER_FAULT, CheckpointError
from train.checkpoint.layout import (
    COMPLETE,
    INDEX,
    PARTIAL,
    STALE,
    STEP_FOLDER,
    CheckpointReader,
    Index,
    way_back,
)
from train.run_folder import RunFolder

SHOWN = 8
"""Files named one by one."""


@dataclass(frozen=True)
class FileState:
    """One rank's file."""

    name: str
    state: str
    """``whole``, ``missing``, ``elsewhere`` or ``damaged``."""
    host: str
    """That wrote it."""
    bytes: int
    detail: str = ""


@dataclass(frozen=True)
class Description:
    """A checkpoint, looked at."""

    path: Path
    index: Index
    files: list[FileState]
    faults: list[str]
    """What is wrong with it as a whole."""

    @property
    def exit_code(self) -> int:
        """0: nothing is damaged, though files may be on other machines; else 2."""
        return EXIT_USER_FAULT if self.faults or {f.state for f in self.files} & {"damaged", "missing"} else EXIT_DONE

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        index = self.index
        return {
            "checkpoint": str(self.path),
            "run_id": index.run_id,
            "step": index.state.step,
            "world_size": index.world_size,
            "optimizer": index.optimizer,
            "parameters": len(index.params),
            "elements": _elements(index),
            "bytes": _bytes(index),
            "metrics": index.metrics,
            "faults": self.faults,
            "files": [asdict(file) for file in self.files],
            "exit_code": self.exit_code,
        }

    def __str__(self) -> str:
        index, state = self.index, self.index.state
        hosts = Counter(facts.host for facts in index.files.values())
        kinds = sorted({kind for entry in index.params.values() for kind in entry.kinds})
        figures = ", ".join(f"{name} {value:g}" for name, value in index.metrics.items())
        writers = ", ".join(f"{host} ({count})" for host, count in hosts.most_common(SHOWN))
        counts = Counter(file.state for file in self.files)
        lines = [
            f"checkpoint  {self.path}",
            f"run         {index.run_id or 'not named'}",
            f"step        {state.step} in epoch {state.epoch}; {state.samples_seen:,} samples,"
            f" {state.tokens_seen:,} tokens seen; seed {state.seed}",
            f"figures     {figures or 'none'}",
            f"holds       {_elements(index):,} trained weights in {len(index.params):,} parameters:"
            f" {', '.join(kinds)}; {_bytes(index) / 2**20:,.1f} MiB for any engine",
            f"optimizer   {index.optimizer}",
            f"written     by {index.world_size} rank(s) on {writers}{', ...' if len(hosts) > SHOWN else ''}",
            "files       " + ", ".join(f"{count} {state}" for state, count in counts.items()),
        ]
        odd = [file for file in self.files if file.state != "whole"]
        lines += [f"  {f.name}: {f.detail or f.state}" for f in odd[:SHOWN]]
        lines += [f"  and {len(odd) - SHOWN} more"] if len(odd) > SHOWN else []
        lines += [f"  {fault}" for fault in self.faults]
        if counts["elsewhere"]:
            lines.append(
                "  without a shared file system a resume brings the files together from the machines that have them"
            )
        if self.exit_code:
            lines.append(f"remedy      {way_back(self.path)}")
        return "\n".join(lines)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one of a checkpoint, be it damaged or torn."""
    return path.is_dir() and (
        STEP_FOLDER.match(path.name) is not None or (path / INDEX).exists() or (path / COMPLETE).exists()
    )


def describe(path: Path) -> Description:
    """Reads every file that is here once, one piece at a time.

    Args:
        path: a ``step-...`` folder.

    Raises:
        CheckpointError: there is no index to go by: the save was cut off, or the index is damaged.
    """
    with CheckpointReader(path, verify=False, only=()) as reader:
        here = {name for name in reader.files if (path / name).is_file()}
        nodes_here = {reader.files[name].node for name in here}
        found = []
        for name, facts in reader.files.items():
            state, detail = "whole", ""
            if name not in here:
                # A machine keeps all files of its ranks: one that lacks some of them has lost them.
                state = "missing" if facts.node in nodes_here or not here else "elsewhere"
                detail = f"not here; host {facts.host} wrote it"
            else:
                try:
                    reader.verify([name])
                except CheckpointError as error:
                    state, detail = "damaged", error.found
            found.append(FileState(name, state, facts.host, facts.bytes, detail))
        return Description(path, reader.index, found, _faults(path, reader.index))


def _faults(path: Path, index: Index) -> list[str]:
    faults = []
    if path.suffix in (PARTIAL, STALE):
        faults.append(f"is not in use: a save, or the removal of a checkpoint, was cut off ({path.suffix})")
    run = RunFolder(path.parents[1])
    if path.parent == run.checkpoints and run.record.is_file() and run.read_record().run_id != index.run_id:
        faults.append(f"belongs to another run: that of this folder has the run_id {run.read_record().run_id}")
    return faults


def _elements(index: Index) -> int:
    return sum(entry.numel for entry in index.params.values())


def _bytes(index: Index) -> int:
    """Of all tensors, fp32."""
    return sum(4 * entry.numel * len(entry.kinds) for entry in index.params.values())
