"""Where cleaning and deduplication run; see the package."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from configs import errors
from configs.errors import ConfigError, CrosstuneError, RunFailedError, StorageError
from configs.schema.clean import (
    CleanConfig,
    DatatroveConfig,
    DedupConfig,
    ExecutorConfig,
    LocalConfig,
    RayConfig,
    SlurmConfig,
)
from configs.schema.roots import PrepConfig
from data_prep.corpus.layout import Layout, read_json
from data_prep.corpus.staged import StagedDataset
from data_prep.corpus.steps import DecideStep, GatherStep, MarkStep, MeetStep, ReadStep, Step
from data_prep.dataset import Dataset, Part
from data_prep.survey import is_needed

C = TypeVar("C", bound=DatatroveConfig)
OnNote = Callable[[str], None]

Stage = tuple[Step, int]
"""A step, and its number of tasks."""

_SHORTEST_WAIT, _LONGEST_WAIT = 1.0, 30.0
"""Seconds between two looks at what is done."""
_IDLE_LOOKS = 4
"""Looks at which no job is left and yet not all is done: a shared folder may show late what tasks wrote."""


class Executor(ABC):
    """Where cleaning and deduplication run.

    Args:
        cfg: the executor group of the config.
    """

    def __init__(self, cfg: ExecutorConfig) -> None:
        self.cfg = cfg

    def rest(self, cfg: PrepConfig) -> PrepConfig:
        """The config of what remains to be done with the data set that `stage` gives."""
        return cfg

    @abstractmethod
    def stage(self, cfg: PrepConfig, dataset: Dataset, *, on_note: OnNote) -> Dataset:
        """Does what runs elsewhere, and gives the data set to go on with. What was done before is not repeated.

        Args:
            cfg: the whole config.
            dataset: opened.
            on_note: told what happens, a line each.

        Raises:
            ConfigError: the executor cannot be used here.
            DataError: the data cannot be used.
            RunFailedError: a task failed.
            StorageError: the work folder cannot be written.
        """


class Here(Executor):
    """Nothing runs elsewhere."""

    def stage(self, cfg: PrepConfig, dataset: Dataset, *, on_note: OnNote) -> Dataset:
        """See `Executor.stage`."""
        return dataset


class _Datatrove(Executor, Generic[C]):
    """What those on datatrove share."""

    cfg: C

    def __init__(self, cfg: C) -> None:
        super().__init__(cfg)
        try:
            import datatrove  # noqa: F401
        except ImportError:
            raise ConfigError(
                "executor", "the package datatrove is not installed", remedy="pip install 'crosstune[corpus]'"
            ) from None

    def rest(self, cfg: PrepConfig) -> PrepConfig:
        """See `Executor.rest`: rows come cleaned, with their splits, and without duplicates."""
        return replace(cfg, clean=CleanConfig(), dedup=DedupConfig())

    def stage(self, cfg: PrepConfig, dataset: Dataset, *, on_note: OnNote) -> Dataset:
        """See `Executor.stage`."""
        parts = dataset.parts()
        layout = Layout(self._folder(cfg, dataset), self.cfg.tasks)
        stages = _stages(cfg, parts, layout)
        left = [stage for stage in stages if _missing(layout, stage)]
        if left:
            on_note(f"{sum(tasks for _, tasks in left)} tasks to do; logs are in {layout.folder}/logs")
            self._run(layout, stages, on_note)
        _check(layout, stages)
        return StagedDataset(cfg.dataset, dataset, layout, surveyed=is_needed(cfg.dedup, parts))

    @abstractmethod
    def _run(self, layout: Layout, stages: Sequence[Stage], on_note: OnNote) -> None:
        """Runs what is missing of the stages, one after the other, and waits."""

    def _folder(self, cfg: PrepConfig, dataset: Dataset) -> Path:
        """In the work folder, by what decides what is in it."""
        stamps = [part.stamp() for part in dataset.parts()]
        deciding = [repr(cfg.clean), repr(cfg.dedup), dataset.settings(), dataset.seed, stamps, self.cfg.tasks]
        digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
        folder = Path(self.cfg.work_dir).expanduser().resolve() / f"{cfg.dataset.name}-{digest[:12]}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"executor.work_dir={self.cfg.work_dir}", f"cannot be written: {error.strerror}"
            ) from error
        return folder


class Local(_Datatrove[LocalConfig]):
    """datatrove's executor for one machine."""

    def _run(self, layout: Layout, stages: Sequence[Stage], on_note: OnNote) -> None:
        from data_prep.corpus.local import QuietLocal

        for step, tasks in stages:
            executor = QuietLocal([step], tasks, min(self.cfg.workers, tasks), _logs(layout, step))
            _run_one(executor, layout, (step, tasks), on_note)


class Slurm(_Datatrove[SlurmConfig]):
    """datatrove's executor for Slurm: one job array a stage, each after the one before it.

    All are submitted at once, so that they go on when this process ends; run again, it waits for them.
    """

    def _run(self, layout: Layout, stages: Sequence[Stage], on_note: OnNote) -> None:
        from data_prep.corpus.slurm import Jobs, submit

        jobs = Jobs(layout.folder / "jobs.json")
        if jobs.active():
            on_note(f"jobs {jobs} are at work already")
        else:
            jobs.write(submit(self.cfg, stages, lambda step: _logs(layout, step)))
            on_note(f"submitted jobs {jobs}; if this command is stopped they go on, and it may be run again")
        for stage in stages:
            if not _wait(layout, stage, jobs.active, on_note):
                break  # `_check` says what became of it


class Ray(_Datatrove[RayConfig]):
    """datatrove's executor for a Ray cluster that is up: the one that ``RAY_ADDRESS`` names, or this machine's."""

    def __init__(self, cfg: RayConfig) -> None:
        super().__init__(cfg)
        try:
            import ray  # noqa: F401
        except ImportError:
            raise ConfigError(
                "executor", "the package ray is not installed", remedy="pip install 'ray>=2.40'"
            ) from None

    def _run(self, layout: Layout, stages: Sequence[Stage], on_note: OnNote) -> None:
        for step, tasks in stages:
            _run_one(self.executor(step, tasks, _logs(layout, step)), layout, (step, tasks), on_note)

    def executor(self, step: Step, tasks: int, logs: Path) -> Any:
        """Datatrove's executor of a stage."""
        from datatrove.executor.ray import RayPipelineExecutor
        from loguru import logger

        logger.remove()  # tasks write their logs to files
        return RayPipelineExecutor(
            [step],
            tasks=tasks,
            workers=self.cfg.workers,
            cpus_per_task=self.cfg.cpus_per_task,
            mem_per_cpu_gb=self.cfg.mem_per_cpu_gb,
            logging_dir=str(logs),
        )


def _stages(cfg: PrepConfig, parts: Sequence[Part], layout: Layout) -> list[Stage]:
    """What has to be done, in order."""
    large = len(layout.large(parts))
    stages: list[Stage] = [(MarkStep(cfg, parts, layout), large)] if large else []
    stages.append((ReadStep(cfg, parts, layout), layout.tasks))
    if is_needed(cfg.dedup, parts):
        stages.append((GatherStep(cfg, parts, layout), 1))
        if cfg.dedup.near:
            stages.append((MeetStep(cfg, parts, layout), layout.tasks))
        stages.append((DecideStep(cfg, parts, layout), 1))
    return stages


def _logs(layout: Layout, step: Step) -> Path:
    return layout.folder / "logs" / step.name


def _missing(layout: Layout, stage: Stage) -> list[int]:
    """Tasks of a stage that are not done."""
    step, tasks = stage
    done = _logs(layout, step) / "completions"
    there = {path.name for path in done.iterdir()} if done.is_dir() else set()
    return [task for task in range(tasks) if f"{task:05d}" not in there]


def _run_one(executor: Any, layout: Layout, stage: Stage, on_note: OnNote) -> None:
    """Runs a stage; a task's fault is raised by `_check`, as the user should see it."""
    if not _missing(layout, stage):
        return
    try:
        executor.run()
    except Exception as error:
        _check(layout, [stage], error)
        raise
    _check(layout, [stage])
    on_note(f"{stage[0].name}: {stage[1]} of {stage[1]} tasks done")


def _wait(layout: Layout, stage: Stage, at_work: Callable[[], bool], on_note: OnNote) -> bool:
    """Until all tasks of a stage are done, or nobody works on them any more; whether they are."""
    step, tasks = stage
    told, pause, idle = -1, _SHORTEST_WAIT, 0
    while missing := _missing(layout, stage):
        if tasks - len(missing) != told:
            told, pause = tasks - len(missing), _SHORTEST_WAIT
            on_note(f"{step.name}: {told} of {tasks} tasks done")
        idle = 0 if at_work() else idle + 1
        if idle == _IDLE_LOOKS:
            return False
        time.sleep(pause)
        pause = min(_LONGEST_WAIT, pause * 1.5)
    on_note(f"{step.name}: {tasks} of {tasks} tasks done")
    return True


def _check(layout: Layout, stages: Sequence[Stage], cause: BaseException | None = None) -> None:
    """Makes sure that all is done.

    Raises:
        CrosstuneError: what a task found wrong with the data or the config.
        RunFailedError: a task failed otherwise.
    """
    for stage in stages:
        step, tasks = stage
        missing = _missing(layout, stage)
        for task in missing:
            if (path := layout.fault(step.name, task)).exists():
                kind, where, found, allowed, remedy = read_json(path)
                fault: type[CrosstuneError] = getattr(errors, kind, errors.DataError)
                raise fault(where, found, allowed=allowed, remedy=remedy) from cause
        if missing:
            raise RunFailedError(
                f"executor.work_dir, stage {step.name}",
                f"{len(missing)} of {tasks} tasks failed, the first is task {missing[0]}",
                remedy=f"see {_logs(layout, step)}; run the same command again to go on with what is missing",
            ) from cause
