"""The checkpoint, export and eval groups."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError
from configs.schema.model import Precision


@dataclass
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 100
    """Steps between checkpoints; there is always one at the end. 0: only that one."""
    keep_last: int = 2
    """Older complete checkpoints are removed after a new one is complete. 0: keep all."""

    def __post_init__(self) -> None:
        for key in ("every", "keep_last"):
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

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "examples", "limit"):
            if getattr(self, key) < 0:
                raise ConfigError(f"eval.{key}", str(getattr(self, key)), allowed="0 or more")
        if self.batch_tokens < 1:
            raise ConfigError("eval.batch_tokens", str(self.batch_tokens), allowed="1 or more")
