"""The checkpoint, export and eval groups."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from configs.errors import ConfigError
from configs.schema.model import Precision


class SaveMode(Enum):
    """Whether the steps go on while a checkpoint is written."""

    auto = "auto"
    """Asynchronous where the host's memory holds the copy; else synchronous, and the log says so."""
    asynchronous = "asynchronous"
    """The steps wait only for a copy to the host: 12 bytes per trained weight (AdamW), over all ranks."""
    synchronous = "synchronous"
    """The steps wait until the checkpoint is complete; one piece of one parameter at a time is in memory."""


class Storage(Enum):
    """Whose disk ``run_dir`` is on."""

    auto = "auto"
    """Found out by a file that every rank looks for."""
    shared = "shared"
    """All ranks see one folder."""
    per_node = "per_node"
    """Each machine has a folder of its own and keeps what its ranks own."""


class OnFullDisk(Enum):
    """What follows when a checkpoint finds no room. The earlier ones stay in any case."""

    stop = "stop"
    go_on = "go_on"
    """The steps go on, with a warning, and the next save that is due tries again."""


class BestBy(Enum):
    """By which figure a checkpoint is among the best; the lowest is."""

    validation_loss = "validation_loss"
    loss = "loss"
    """Of the step's training batch."""


@dataclass
class CheckpointConfig:
    """When and how checkpoints are written and which stay."""

    every: int = 100
    """Steps between checkpoints; there is always one at the end. 0: only that one."""
    keep_last: int = 2
    """Older complete checkpoints are removed after a new one is complete. 0: keep all."""
    keep_every: int = 0
    """Checkpoints of multiples of so many steps stay for good. 0: none."""
    keep_best: int = 0
    """So many stay besides as the best by `best_by`."""
    best_by: BestBy = BestBy.validation_loss
    mode: SaveMode = SaveMode.auto
    storage: Storage = Storage.auto
    on_full_disk: OnFullDisk = OnFullDisk.stop

    def __post_init__(self) -> None:
        for key in ("every", "keep_last", "keep_every", "keep_best"):
            if getattr(self, key) < 0:
                raise ConfigError(f"checkpoint.{key}", str(getattr(self, key)), allowed="0 or more")


@dataclass
class ExportConfig:
    """What is written from a checkpoint. The weights stream through; no model is built."""

    adapter: bool = True
    """LoRA adapter in peft's format (nothing for full fine-tuning)."""
    merged: bool = True
    """The whole model as safetensors, adapter merged, for plain transformers."""
    precision: Precision = Precision.auto
    """Number format of the merged weights; auto: that of the base as it was trained."""
    shard_gib: float = 4.0
    """Largest size of one safetensors file."""

    def __post_init__(self) -> None:
        if self.shard_gib <= 0:
            raise ConfigError("export.shard_gib", str(self.shard_gib), allowed="above 0")


@dataclass
class EvalConfig:
    """How base and tuned model are measured on the held-out split."""

    split: str = "test"
    base: bool = True
    """Also measure the base model."""
    generate: bool = True
    """Generate answers and score exact match; else perplexity only."""
    max_new_tokens: int = 0
    """0: as many as the longest reference answer of the split has, plus one."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included."""
    examples: int = 10
    """Answers shown before/after in the report."""
    limit: int = 0
    """Measure only the first so many samples; 0: all."""
    precision: Precision = Precision.auto
    """What is computed in. auto: as trained, but fp32 on a CPU. bf16 there is 2.3 to 2.6 times as fast where it has
    instructions for it, and other last digits decide some answers."""

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "examples", "limit"):
            if getattr(self, key) < 0:
                raise ConfigError(f"eval.{key}", str(getattr(self, key)), allowed="0 or more")
        if self.batch_tokens < 1:
            raise ConfigError("eval.batch_tokens", str(self.batch_tokens), allowed="1 or more")
