"""The layout of a run folder, in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from configs.errors import CheckpointError, ConfigError, ModelError
from configs.files import write_whole

if TYPE_CHECKING:  # what looks at a machine on which something is broken reads the names below without omegaconf
    from configs.schema.model import Precision

STOP_FILE = "PREEMPT"
"""In the run's folder: whoever makes it stops the run."""
STARTED = "CROSSTUNE_STARTED"
"""For workers: `time.time` at which the command began that started them."""


@dataclass(frozen=True)
class RunRecord:
    """What a run was made from: `run.json`."""

    model_dir: str
    model_sha256: dict[str, str]
    """File name -> SHA-256 of the base's weights, config and tokenizer."""
    prepared: str
    manifest_sha256: str
    precision: str
    """``fp32`` or ``bf16``: the working weights."""
    engine: str
    world_size: int
    tuning: str
    """``lora`` or ``full``."""
    code_version: str
    total_steps: int
    run_id: str = ""
    """Drawn anew for each run; every checkpoint of it carries it."""
    carried: list[str] = field(default_factory=list)
    """Earlier precisions of the base, where adapters went on with another one: ``bf16 until step 10``."""
    kernels: list[str] = field(default_factory=list)
    """Ops that ran by the device's own version, on rank 0; the others in plain torch. Early runs do not say."""

    @property
    def precisions(self) -> str:
        """The precision, and what it was before."""
        return f"{self.precision} ({', '.join(self.carried)})" if self.carried else self.precision

    def precision_from_here(self, asked: Precision) -> Precision:
        """The precision with which the run goes on.

        Args:
            asked: `model.precision` now; ``auto``, which might mean another one on this machine, is that of before.

        Raises:
            ConfigError: another one, for weights that train.
        """
        from configs.schema.model import Precision

        if asked in (Precision.auto, Precision(self.precision)):
            return Precision(self.precision)
        if self.tuning != "lora":
            raise ConfigError(
                f"model.precision={asked.value}",
                f"this run trains all weights in {self.precision}: in another number format it is another run",
                allowed=f"{self.precision}; another one for adapters only (tuning=lora), whose base stays as it is",
                remedy="leave it out, or start a new run from this one's export",
            )
        return asked

    def refuse_changed_base(self, model_dir: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
        """Compares the base model with what the run began with, since a run keeps no copy of it.

        Args:
            model_dir: the base.
            known: SHA-256 of files that were hashed already.

        Raises:
            ModelError: a file is no longer there or holds something else.
        """
        files = {name: model_dir / name for name in self.model_sha256}
        odd = [
            name
            for name, file in files.items()
            if not file.is_file() or (known.get(name) or sha256_of(file)) != self.model_sha256[name]
        ]
        if odd:
            raise ModelError(
                str(model_dir),
                f"differs from the model that the run began with: {', '.join(odd)}",
                remedy="bring back the original files, or start a new run",
            )


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def resolved(self) -> Path:
        """The whole config as it ran."""
        return self.path / "resolved.yaml"

    @property
    def environment(self) -> Path:
        """Versions, device, relevant variables."""
        return self.path / "environment.json"

    @property
    def record(self) -> Path:
        """`RunRecord`."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One line per step."""
        return self.path / "metrics.jsonl"

    @property
    def plan(self) -> Path:
        """Memory as it was predicted, and as it was measured."""
        return self.path / "plan.json"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder of exports: adapter/, merged/."""
        return self.path / "export"

    @property
    def eval(self) -> Path:
        """Folder of answers: base.jsonl, tuned.jsonl."""
        return self.path / "eval"

    @property
    def report(self) -> Path:
        """The page that shows it all."""
        return self.path / "report.html"

    @property
    def summary(self) -> Path:
        """Figures of base and tuned model."""
        return self.path / "summary.json"

    @property
    def logs(self) -> Path:
        """Output of worker processes and error files."""
        return self.path / "logs"

    def read_record(self) -> RunRecord:
        """Reads `run.json`.

        Raises:
            CheckpointError: the folder is not that of a run, or the file is damaged.
        """
        try:
            fields: dict[str, Any] = json.loads(self.record.read_text())
            return RunRecord(**fields)
        except FileNotFoundError:
            raise CheckpointError(
                str(self.path),
                "not the folder of a run (no run.json)",
                remedy="name a folder made by `crosstune train`",
            ) from None
        except (ValueError, TypeError) as error:
            raise CheckpointError(str(self.record), f"damaged: {error}") from None

    def write_record(self, record: RunRecord) -> None:
        """Writes `run.json`, whole or not at all."""
        write_whole(self.record, json.dumps(asdict(record), indent=2, sort_keys=True) + "\n")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
