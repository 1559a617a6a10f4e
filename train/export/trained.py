"""What a run trained, read from its folder: the checkpoint's weights by name, and how they fit onto the base."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.compose import load_resolved
from configs.errors import CheckpointError, ConfigError
from configs.schema.roots import TrainConfig
from configs.schema.tuning import LoraConfig
from train.checkpoint.layout import CheckpointReader, checkpoints, step_folder
from train.checkpoint.retention import latest
from train.run_folder import RunFolder, RunRecord

PEFT_PREFIX = "base_model.model."
"""What peft puts before the name of every module of the model that it wraps."""
MODULE_COPY = ".modules_to_save.default."
"""What peft puts before the weights of a module that trains whole beside an adapter."""
_LORA = re.compile(rf"{re.escape(PEFT_PREFIX)}(?P<module>.+)\.lora_(?P<part>[AB])\.default\.weight")


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted module; the update is ``alpha / rank * B @ A``."""

    a: str
    """Name of the parameter A ``[rank, in]``."""
    b: str
    """Name of the parameter B ``[out, rank]``."""


def lora_pairs(names: Iterable[str]) -> dict[str, LoraPair]:
    """Path of each adapted module -> its factors.

    Adapters of several weights of one module are nested: the inner ones' paths end in ``.base_layer``.

    Raises:
        CheckpointError: a name is not one of peft's, or one factor of a pair is missing.
    """
    found: dict[str, dict[str, str]] = {}
    strange = []
    for name in names:
        match = _LORA.fullmatch(name)
        if match:
            found.setdefault(match["module"], {})[match["part"]] = name
        elif not name.startswith(PEFT_PREFIX):
            strange.append(name)
    strange += [next(iter(parts.values())) for parts in found.values() if len(parts) < 2]
    if strange or not found:
        raise CheckpointError(
            "checkpoint",
            f"parameters that are no pair of LoRA factors: {', '.join(strange[:5]) or 'none at all'}",
            allowed=f"{PEFT_PREFIX}<module>.lora_A.default.weight and its lora_B",
        )
    return {module: LoraPair(parts["A"], parts["B"]) for module, parts in found.items()}


def trained_beside(names: Iterable[str]) -> dict[str, str]:
    """Parameters that trained themselves beside an adapter: name in the model -> name in the checkpoint."""
    own = [name for name in names if name.startswith(PEFT_PREFIX) and not _LORA.fullmatch(name)]
    return {name.removeprefix(PEFT_PREFIX).replace(MODULE_COPY, ".").replace(".base_layer.", "."): name for name in own}


def find_checkpoint(run: RunFolder, which: str) -> Path:
    """The folder of a checkpoint.

    Args:
        run: the run.
        which: ``latest``, a step number, or a folder.

    Raises:
        CheckpointError: there is no such complete checkpoint.
    """
    if which == "latest":
        return latest(run.checkpoints)
    path = step_folder(run.checkpoints, int(which)) if which.isdecimal() else Path(which).expanduser()
    there = checkpoints(path.parent)
    if path.resolve() not in [p.resolve() for p in there]:
        steps = [p.name for p in checkpoints(run.checkpoints)]
        raise CheckpointError(
            f"checkpoint={which}", "no complete checkpoint there", allowed=", ".join(["latest", *steps]) or "latest"
        )
    return path


@dataclass
class Trained:
    """A run's checkpoint, opened, together with what the run recorded."""

    run: RunFolder
    record: RunRecord
    cfg: TrainConfig
    checkpoint: Path
    reader: CheckpointReader

    @classmethod
    def open(cls, run: RunFolder, which: str = "latest") -> Trained:
        """Opens a checkpoint of a run; its hashes are verified.

        Raises:
            CheckpointError: not a run, no such checkpoint, or a damaged one.
        """
        record = run.read_record()
        cfg = load_resolved(run.resolved)
        if not isinstance(cfg, TrainConfig):
            raise CheckpointError(str(run.resolved), f"the config of a {type(cfg).__name__}, nothing that trains")
        path = find_checkpoint(run, which)
        return cls(run, record, cfg, path, CheckpointReader(path))

    @property
    def base_dir(self) -> Path:
        """Folder of the base model.

        Raises:
            CheckpointError: it is no longer there.
        """
        folder = Path(self.record.model_dir)
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                str(self.run.record),
                f"the base model is no longer at {folder}",
                remedy="put it back there; a run does not copy its base",
            )
        return folder

    @property
    def working_dtype(self) -> torch.dtype:
        """Number format that the base had while it was trained on."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.record.precision]

    @property
    def is_lora(self) -> bool:
        """Whether adapters trained, or the weights themselves."""
        return self.record.tuning == "lora"

    @property
    def lora(self) -> LoraConfig:
        """The adapter's settings.

        Raises:
            ConfigError: the run's tuning method has none.
        """
        if not isinstance(self.cfg.tuning, LoraConfig):
            where, found = f"{self.run.resolved}: tuning", f"'{self.cfg.tuning._target_}'"
            raise ConfigError(where, found, allowed="LoRA, where an adapter is read")
        return self.cfg.tuning

    @property
    def pairs(self) -> Mapping[str, LoraPair]:
        """The adapted modules."""
        return lora_pairs(self.reader.params)

    def close(self) -> None:
        """Lets go of the checkpoint's files."""
        self.reader.close()

    def __enter__(self) -> Trained:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
