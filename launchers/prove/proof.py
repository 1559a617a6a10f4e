"""One proof: its folder, the runs it starts, what was found, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.compose import save_resolved, to_yaml
from configs.errors import EXIT_DONE, EXIT_RUN_FAILED, ConfigError, CrosstuneError
from configs.schema.prove import ProveConfig
from configs.schema.roots import TrainConfig
from launchers.prove.page import show, write
from launchers.prove.runs import Command, Seen, ended_with_us
from launchers.prove.setting import Setting, choose_model
from launchers.run_dir import fresh_folder, make_writable
from launchers.stages import Stages
from train.prove.comparison import Comparison, Difference

REPORT, PAGE, LOGS, RUNS = "proof.json", "proof.html", "logs", "runs"


@dataclass
class Part:
    """What one run, or one way to lay it out, was found to be."""

    title: str
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    """Why there was nothing to compare."""
    left_out: bool = False
    """It cannot be tried here, and nobody asked for it by name; `notes` says why."""

    @property
    def holds(self) -> bool:
        """Nothing failed and nothing differs."""
        return self.failure is None and all(each.same for each in self.comparisons)

    def first_difference(self) -> Difference | None:
        """The first of those that were found."""
        return next((each.first for each in self.comparisons if each.first is not None), None)


class Proof:
    """Collects the evidence of one proof.

    Args:
        cfg: of the command.
        name: ``resume``, ``reshard`` or ``layout``.
        promise: what is to be proven, as a sentence.
        setting: what its runs have in common.
        stages: how many there will be.

    Raises:
        ConfigError: `out` holds something else, or an outer launcher has started this process.
        StorageError: `out` cannot be written.
    """

    def __init__(self, cfg: ProveConfig, name: str, promise: str, setting: Setting, *, stages: int) -> None:
        if "RANK" in os.environ:
            raise ConfigError("RANK", "set, but a proof starts its own processes", remedy="start it without torchrun")
        if cfg.run_dir is not None:
            raise ConfigError("run_dir", "a proof has runs of its own", remedy="out=FOLDER names its folder")
        self.cfg, self.name, self.promise, self.setting = cfg, name, promise, setting
        self.began = time.time()
        self.folder = _own_folder(cfg, name)
        self.runs, self.logs = self.folder / RUNS, self.folder / LOGS
        self.runs.mkdir()
        self.stages = Stages(stages)
        self.parts: list[Part] = []
        self.more: dict[str, Any] = {}
        """Seeds, kills, figures: what else belongs into proof.json."""
        self.stages.line(f"{promise}; on {cfg.model.path}")

    def settle_model(self, *, quiet: bool) -> None:
        """See `setting.choose_model`; and says what is otherwise than in the user's config."""
        if quiet or self.cfg.shrink:
            from train.models.load import ensure_model

            cache = Path(self.cfg.cache_dir).expanduser()
            model_dir = ensure_model(self.cfg.model, cache, on_note=self.stages.note)
            choose_model(self.setting, self.cfg, model_dir, self.runs, quiet=quiet)
        for change in self.setting.changes:
            self.stages.note(f"changed for the proof: {change}")

    def start(self, name: str, cfg: TrainConfig) -> Command:
        """Begins ``crosstune train`` with this config in `run_of(name)`."""
        request = self.runs / f"{name}.yaml"
        save_resolved(replace(cfg, run_dir=str(self.run_of(name))), request)
        return Command(["train", "--resolved", str(request)], self.logs, name)

    def run_of(self, name: str) -> Path:
        """Folder of one of the proof's runs."""
        return self.runs / name

    def train(self, name: str, cfg: TrainConfig, *, on_look: Callable[[Seen], None] = lambda seen: None) -> Path:
        """Trains from beginning to end.

        Raises:
            CrosstuneError: as the run ended with it.
        """
        with ended_with_us(self.start(name, cfg)) as command:
            for look in command.watch(self.run_of(name)):
                on_look(look)
            if fault := command.wait():
                raise fault
        return self.run_of(name)

    def compare(self, part: Part, comparisons: Callable[[], Iterable[Comparison]]) -> None:
        """Adds what is found; a checkpoint that does not open is a finding too."""
        try:
            for each in comparisons():
                part.comparisons.append(each)
        except CrosstuneError as error:
            part.failure = error.render()

    def finish(self, reference: Path) -> dict[str, Any]:
        """Writes the report, shows it and takes the proof's runs away.

        Args:
            reference: the run whose config and environment the report keeps.

        Returns:
            The report, with ``exit_code``.
        """
        result = self._result(reference)
        if result["proven"] and not self.cfg.keep_runs:
            shutil.rmtree(self.runs)
        write(result, self.folder / REPORT, self.folder / PAGE)
        show(result, self.folder)
        return result

    def _result(self, reference: Path) -> dict[str, Any]:
        from train.run_folder import RunFolder

        run = RunFolder(reference)
        record = run.read_record()
        tried = [part for part in self.parts if not part.left_out]
        proven = bool(tried) and all(part.holds for part in tried)
        first = next((found for part in self.parts if (found := part.first_difference())), None)
        return {
            "exit_code": EXIT_DONE if proven else EXIT_RUN_FAILED,
            "proof": self.name,
            "promise": self.promise,
            "proven": proven,
            "first_difference": asdict(first) | {"text": str(first)} if first else None,
            "began": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.began)),
            "seconds": round(time.time() - self.began, 1),
            "model": self.cfg.model.path,
            "base_sha256": record.model_sha256,
            "precision": record.precision,
            "tuning": record.tuning,
            **self.more,
            "changes": [asdict(change) | {"text": str(change)} for change in self.setting.changes],
            "parts": [asdict(part) | {"holds": part.holds} for part in self.parts],
            "config": to_yaml(self.setting.train),
            "environment": json.loads(run.environment.read_text(encoding="utf-8")),
        }


def _own_folder(cfg: ProveConfig, name: str) -> Path:
    """An empty folder, new or cleared of an earlier proof."""
    if cfg.out is None:
        folder = fresh_folder(f"prove-{name}")
    else:
        folder = Path(cfg.out).expanduser().resolve()
    make_writable(folder, "out")
    held = {path.name for path in folder.iterdir()}
    if held:
        # By the report, which is there from the start: folders of these names alone may be a user's own runs.
        earlier = REPORT in held and held <= {REPORT, PAGE, LOGS, RUNS}
        if not (earlier and cfg.overwrite):
            remedy = "name another folder" + (", or overwrite=true" if earlier else "")
            found = _earlier_proof(folder) if earlier else "something else"
            raise ConfigError("out", f"'{folder}' holds {found}", remedy=remedy)
        for part in (REPORT, PAGE):
            (folder / part).unlink(missing_ok=True)
        for part in (LOGS, RUNS):
            shutil.rmtree(folder / part, ignore_errors=True)
    (folder / REPORT).write_text(json.dumps({"proof": name, "proven": None}) + "\n", encoding="utf-8")
    return folder


def _earlier_proof(folder: Path) -> str:
    try:
        unfinished = json.loads((folder / REPORT).read_text(encoding="utf-8")).get("proven") is None
    except (OSError, ValueError, AttributeError):
        unfinished = True
    return "a proof that did not come to its end" if unfinished else "an earlier proof"
