"""The passes over a data set, in chunks, by workers; interrupted, another process goes on with them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from configs.schema.roots import PrepConfig
from data_prep.dataset import Dataset, Mark
from data_prep.dedup import Signer
from data_prep.journal import Journal
from data_prep.output import Output
from data_prep.pool import map_here, map_ordered, usable_cores
from data_prep.progress import PrepProgress, Progress, Stage
from data_prep.render import Renderer
from data_prep.survey import Survey, SurveyFiles, is_needed
from data_prep.work import MakeWork, Task

LITTLE_BYTES = 4 * 2**20
"""Less than this is prepared before workers would have begun."""
_PROGRESS_SECONDS = 0.2


@dataclass(frozen=True)
class Position:
    """Where a pass stands: between two chunks."""

    part: int = 0
    mark: Mark = Mark()
    chunks: int = 0
    """Before it, of all parts."""
    stored: int = 0
    """Bytes of this part before it."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Position:
        """Undoes `dataclasses.asdict`."""
        return cls(**{**value, "mark": Mark(**value["mark"])})


class Passes:
    """All passes over a data set.

    Args:
        cfg: the whole config.
        dataset: opened.
        folder: the work folder; it exists.
        journal: of that folder.
        renderer: makes the renderer.
        on_progress: see `Progress`.
    """

    def __init__(
        self,
        cfg: PrepConfig,
        dataset: Dataset,
        folder: Path,
        journal: Journal,
        renderer: Callable[[], Renderer],
        on_progress: Progress | None,
    ) -> None:
        self._cfg, self._dataset, self._parts = cfg, dataset, dataset.parts()
        self._folder, self._journal = folder, journal
        self._renderer, self._on_progress = renderer, on_progress
        self._sizes = [part.source.bytes for part in self._parts]
        self._workers = cfg.workers or (usable_cores() if sum(self._sizes) > LITTLE_BYTES else 1)
        self._survey: Survey | None = None
        self.output: Output | None = None
        """What the main pass wrote, once it has begun."""

    def steps(self, entry: dict[str, Any] | None) -> Generator[None]:
        """Does everything, a few seconds' work a step; each ends with an entry in the journal.

        Args:
            entry: of the journal, to go on from; None: from the beginning.

        Raises:
            DataError: a source cannot be read, or too many rows are at fault.
            ModelError: the model's chat template cannot be used.
            RunFailedError: a worker died.
        """
        entry = entry or {}
        position = Position.from_json(entry["position"]) if entry else Position()
        begun = entry.get("output")
        known: dict[str, Any] = {}
        if is_needed(self._cfg.dedup, self._parts):
            width = Signer(self._cfg.dedup).width if self._cfg.dedup.near else 0
            files = SurveyFiles(self._folder / "survey", self._parts, width, entry.get("survey"))
            with closing(files):
                if begun is None:
                    make = MakeWork(self._cfg, self._parts, None)
                    yield from self._pass("survey", make, files, position, known)
                    position = Position()
                known = {"survey": files.state()}
                self._survey = files.decide(self._cfg.dedup)
        self.output = Output(self._folder, self._parts, self._cfg.dataset.max_rejects, begun)
        with closing(self.output):
            make = MakeWork(self._cfg, self._parts, self._renderer)
            yield from self._pass("output", make, self.output, position, known)
            self.output.end()

    def tidy(self) -> None:
        """Takes from the folder what only another process would need."""
        assert self.output is not None
        self._journal.remove()
        self.output.tidy()
        shutil.rmtree(self._folder / "survey", ignore_errors=True)

    def duplicates(self) -> dict[str, int]:
        """The manifest's entry."""
        assert self.output is not None
        counted = self._survey.duplicates if self._survey else self._dataset.duplicates
        return self.output.duplicates() if counted is None else dict(counted)

    def cleaned(self) -> dict[str, int]:
        """The manifest's entry."""
        assert self.output is not None
        return dict(sorted((self._dataset.cleaned + self.output.cleaned).items()))

    def _pass(
        self,
        key: Literal["survey", "output"],
        make: MakeWork,
        sink: SurveyFiles | Output,
        position: Position,
        known: dict[str, Any],
    ) -> Iterator[None]:
        """One pass, from a position on; `key` is that of the sink's state in the journal."""
        tasks = self._tasks(position)
        run = map_ordered(make, tasks, self._workers, _size) if self._workers > 1 else map_here(make, tasks)
        resumed, shown = self._done(position), 0.0
        with closing(run):
            for position, made in run:
                sink.take(position.part, made)
                if time.monotonic() - shown >= _PROGRESS_SECONDS:
                    shown = time.monotonic()
                    self._show(sink, self._done(position), resumed)
                if self._journal.is_due:
                    self._journal.write({"position": asdict(position), key: sink.state(), **known})
                    yield
        self._show(sink, sum(self._sizes), resumed)

    def _tasks(self, position: Position) -> Iterator[tuple[Position, Task]]:
        """The chunks from a position on, each with the position after it."""
        chunks, mark = position.chunks, position.mark
        for number in range(position.part, len(self._parts)):
            for chunk in self._parts[number].chunks(mark):
                rulings = self._survey.rulings(chunks) if self._survey else None
                chunks += 1
                yield (
                    Position(number, chunk.end, chunks, chunk.stored),
                    Task(number, chunk.payload, rulings, chunk.size),
                )
            mark = Mark()

    def _done(self, position: Position) -> int:
        return sum(self._sizes[: position.part]) + min(position.stored, self._sizes[position.part])

    def _show(self, sink: SurveyFiles | Output, done: int, resumed: int) -> None:
        if self._on_progress is not None:
            stage: Stage = "prepare" if isinstance(sink, Output) else "survey"
            rows, tokens = (sum(sink.rows), sink.tokens) if isinstance(sink, Output) else (sink.rows, 0)
            self._on_progress(PrepProgress(stage, rows, tokens, done, sum(self._sizes), resumed))


def _size(task: Task) -> int:
    return task.size
