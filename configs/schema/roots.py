"""The root of each command's config. Keys that people type most are the same in every command."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from configs.errors import ConfigError, not_empty
from configs.schema.clean import CleanConfig, DedupConfig, ExecutorConfig
from configs.schema.dataset import DatasetConfig
from configs.schema.device import DeviceConfig
from configs.schema.guard import GuardConfig
from configs.schema.model import ModelConfig
from configs.schema.objective import CausalLMConfig, ObjectiveConfig
from configs.schema.optim import OptimConfig, ScheduleConfig
from configs.schema.outputs import BestBy, CheckpointConfig, EvalConfig, ExportConfig
from configs.schema.sharding import ShardingConfig
from configs.schema.template import TemplateConfig
from configs.schema.tuning import LoraConfig, TuningConfig
from configs.sizes import bytes_of


class Packing(Enum):
    """Whether several samples share a row, each seeing only itself."""

    auto = "auto"
    """On where it is proven exact for the model's family; else one sample a row, and the log says so."""
    on = "on"
    """Stop if the family is not proven."""
    off = "off"
    """Rows padded to the longest of their micro-batch."""


class TooLong(Enum):
    """What becomes of a sample of more than `max_length` tokens; the manifest counts it in any case."""

    reject = "reject"
    truncate_right = "truncate_right"
    """The end is cut off. What is left of a cut answer is learned; its end token is gone."""
    truncate_left = "truncate_left"
    """The beginning is cut off, but for a begin token. An answer that loses its beginning is not learned."""
    chunk = "chunk"
    """Plain text is cut into pieces, each token learned once; conversations are rejected."""


@dataclass
class PrepConfig:
    """`crosstune prep`: raw records -> prepared data."""

    name: str = "crosstune"
    """Name of the job; part of folder names."""
    seed: int = 0
    cache_dir: str = "~/.cache/crosstune"
    """Where converted models and prepared data are kept."""
    max_length: int = 1024
    """Tokens of the longest sample."""
    max_image_pixels: int = 50_000_000
    """Of the largest image of a record, as it is stored; a larger one is a fault of its row."""
    image_folder: str | None = None
    """Where relative paths of images begin; null: the folder of the file that names them."""
    too_long: TooLong = TooLong.reject
    workers: int = 0
    """Processes that prepare data; 0: one per core, and none beside our own for little data. The result is the same."""
    out: str | None = None
    """prep: folder of the prepared data (null: in cache_dir, by content). export: folder of the export."""
    overwrite: bool = False
    """Replace `out` if it holds something else."""
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    clean: CleanConfig = field(default_factory=CleanConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError("workers", str(self.workers), allowed="0 (one per core) or more")
        not_empty("cache_dir", self.cache_dir)
        not_empty("out", self.out)
        if not 0 <= self.seed < 2**62:
            raise ConfigError("seed", str(self.seed), allowed="0 or more, below 2**62")
        if self.max_image_pixels < 1:
            raise ConfigError("max_image_pixels", str(self.max_image_pixels), allowed="1 or more")
        not_empty("image_folder", self.image_folder)
        if self.max_length < 2:
            raise ConfigError("max_length", str(self.max_length), allowed="2 or more tokens")


@dataclass
class TrainConfig(PrepConfig):
    """`crosstune train`: prepares the data if needed, then prepared data -> checkpoints."""

    run_dir: str | None = None
    """Folder of the run; null: ``runs/<name>-<date>-<time>``."""
    nproc: int = 1
    """Processes, one per device, started with torchrun underneath when more than one."""
    max_steps: int = 0
    """Global steps; 0: as many as `epochs` gives."""
    epochs: float = 1.0
    batch_tokens: int = 4096
    """Tokens of a global step over all ranks; whole samples are taken while they fit.

    One per cent less than a multiple of ``nproc * micro_batch_tokens`` leaves packing the room without which a rank
    often needs one more pass.
    """
    micro_batch_tokens: int = 2048
    """Tokens, padding included, of one forward pass on one rank; only memory depends on it, not the gradients."""
    packing: Packing = Packing.auto
    check_packing: bool = True
    """Before the first step packed rows are tried on the real model; a leak from one sample into another stops the run.
    Costs three passes over at most some 590 tokens, more with blocks above 128."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    activation_checkpointing_every: int = 1
    """Only every n-th layer recomputes; n = 1: all of them."""
    activation_budget: str | None = None
    """Memory that a process may take (of the device; on a CPU, its resident set), such as ``12GiB``, or ``auto``: 90 %
    of what there is. As few layers recompute as the plan predicts to be enough; in place of both keys above."""
    eval_every: int = 0
    """Steps between measurements of the validation loss; 0: never."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        not_empty("run_dir", self.run_dir)
        for key in ("nproc", "batch_tokens", "micro_batch_tokens", "activation_checkpointing_every"):
            if getattr(self, key) < 1:
                raise ConfigError(key, str(getattr(self, key)), allowed="1 or more")
        for key in ("max_steps", "eval_every"):
            if getattr(self, key) < 0:
                raise ConfigError(key, str(getattr(self, key)), allowed="0 or more")
        if self.epochs <= 0:
            raise ConfigError("epochs", str(self.epochs), allowed="above 0")
        if self.activation_budget is not None:
            self._check_activation_budget(self.activation_budget)
        elif self.activation_checkpointing_every > 1 and not self.activation_checkpointing:
            raise ConfigError(
                "activation_checkpointing_every",
                f"{self.activation_checkpointing_every}, but activation_checkpointing=false",
                remedy="activation_checkpointing=true, or activation_checkpointing_every=1",
            )
        if self.max_length > self.micro_batch_tokens:
            raise ConfigError(
                "max_length",
                f"{self.max_length}, above micro_batch_tokens={self.micro_batch_tokens}: such a sample fits no pass",
                remedy="lower max_length or raise micro_batch_tokens",
            )
        indexer = isinstance(self.objective, CausalLMConfig) and self.objective.indexer_weight > 0
        if indexer and isinstance(self.tuning, LoraConfig):
            raise ConfigError(
                "objective.indexer_stage",
                "trains the indexer, on which tuning=lora puts no adapter",
                remedy="tuning=full",
            )
        best = self.checkpoint.keep_best and self.checkpoint.best_by is BestBy.validation_loss
        if best and (not self.eval_every or self.checkpoint.every % self.eval_every):
            raise ConfigError(
                "checkpoint.keep_best",
                f"by the validation loss, which eval_every={self.eval_every} does not measure at each checkpoint",
                allowed=f"with eval_every a divisor of checkpoint.every={self.checkpoint.every}",
                remedy="set eval_every, or checkpoint.best_by=loss",
            )

    @property
    def recompute_every(self) -> int:
        """Every how many layers one recomputes its activations; 0: none does."""
        return self.activation_checkpointing_every if self.activation_checkpointing else 0

    def _check_activation_budget(self, budget: str) -> None:
        if budget != "auto" and bytes_of(budget) is None:
            raise ConfigError("activation_budget", f"'{budget}'", allowed="such as 12GiB, auto, null")
        if self.activation_checkpointing or self.activation_checkpointing_every > 1:
            raise ConfigError(
                "activation_budget",
                f"{budget}, which chooses what activation_checkpointing is",
                remedy="leave one of them out",
            )


@dataclass
class RunConfig(TrainConfig):
    """`crosstune run`: the whole road, prep, train, export and eval."""

    export: ExportConfig = field(default_factory=ExportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass
class ExportJobConfig:
    """`crosstune export`: checkpoint of a run -> adapter and merged model."""

    run_dir: str = "???"
    checkpoint: str = "latest"
    """``latest``, a step number, or a folder."""
    out: str | None = None
    """Null: ``<run_dir>/export``."""
    overwrite: bool = False
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass
class EvalJobConfig:
    """`crosstune eval`: figures of a run's checkpoint, or of any model folder, on prepared data."""

    run_dir: str | None = None
    """Measure this run's tuned model (and its base) on the data it was trained from."""
    checkpoint: str = "latest"
    model: ModelConfig = field(default_factory=lambda: ModelConfig(path=""))
    """Measure this model instead of a run's; needs `data`."""
    data: str | None = None
    """Folder of prepared data; null: the run's own."""
    out: str | None = None
    """Folder for the figures; null: ``<run_dir>``, or for a model ``runs/eval-<model>-<date>-<time>``."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
