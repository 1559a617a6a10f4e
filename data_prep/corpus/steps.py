"""The steps of a corpus pipeline: functions of a task's number, as datatrove calls them.

Each reads and writes files of the work folder only, and writes the same again when it is repeated.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from configs.errors import CrosstuneError
from configs.schema.clean import DedupScope
from configs.schema.roots import PrepConfig
from data_prep.corpus.layout import Layout, Piece, load_meetings, save_meetings, write_json
from data_prep.corpus.staged import encode_rows
from data_prep.dataset import Chunk, Part
from data_prep.dedup import in_one_band
from data_prep.minhash import Banding, Signer
from data_prep.survey import SurveyFiles, arrays_of, is_needed, read_arrays
from data_prep.work import NO_RECORD, UNDECIDED, Work


class Step(ABC):
    """What all steps share.

    Args:
        cfg: the whole config.
        parts: of the data set, opened.
        layout: of the work folder.
    """

    name: ClassVar[str]
    """Of the stage and its folder of logs."""

    def __init__(self, cfg: PrepConfig, parts: Sequence[Part], layout: Layout) -> None:
        self.cfg, self.parts, self.layout = cfg, parts, layout
        self._working_folder = os.getcwd()

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """Does the work of task `rank`; a fault of the user's is left where `executors` finds it."""
        os.chdir(self._working_folder)  # relative paths of the config
        fault = self.layout.fault(self.name, rank)
        fault.unlink(missing_ok=True)
        try:
            self.run(rank)
        except CrosstuneError as error:
            found = [type(error).__name__, error.where, error.found, error.allowed, error.remedy]
            write_json(fault, found)
            raise

    @abstractmethod
    def run(self, task: int) -> None:
        """Does the work of a task.

        Raises:
            DataError: the data cannot be used.
        """


class MarkStep(Step):
    """One task a large part: where it can be cut."""

    name = "mark"

    def run(self, task: int) -> None:
        """See `Step.run`."""
        number = self.layout.large(self.parts)[task]
        part = self.parts[number]
        apart = part.source.bytes / self.layout.tasks / 8
        found: list[tuple[int, int, int]] = []
        for chunk in part.chunks():
            if not found or chunk.stored - found[-1][2] >= apart:
                found.append((chunk.end.offset, chunk.end.line, chunk.stored))
        write_json(self.layout.marks(number), found)


class ReadStep(Step):
    """Reads a task's pieces: rows, cleaned, and what the survey needs of them."""

    name = "read"

    def run(self, task: int) -> None:
        """See `Step.run`."""
        work = Work(self.cfg, self.parts, None)
        rows: Counter[int] = Counter()
        folder = self.layout.survey(task)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with closing(SurveyFiles(folder, self.parts, _width(self.cfg))) as survey:
            for piece in self.layout.pieces(self.parts, task):
                part, path = self.parts[piece.part], self.layout.rows(task, piece.part)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    for chunk in _chunks(part, piece):
                        found = list(work.cleaned(part, chunk.payload))
                        file.write(encode_rows(found))
                        rows[piece.part] += len(found)
                        if is_needed(self.cfg.dedup, self.parts):
                            survey.take(piece.part, work.surveyed(part, found))
        write_json(self.layout.report(task), {"rows": rows, "cleaned": work.cleaner.masked})


def _chunks(part: Part, piece: Piece) -> Iterator[Chunk]:
    for chunk in part.chunks(piece.begin):
        yield chunk
        if chunk.end == piece.end:
            return


class GatherStep(Step):
    """One task: the arrays of all tasks, end to end."""

    name = "gather"

    def run(self, task: int) -> None:
        """See `Step.run`."""
        folder = self.layout.gathered
        folder.mkdir(parents=True, exist_ok=True)
        for name in arrays_of(_width(self.cfg)):
            with (folder / name).open("wb") as file:
                for each in range(self.layout.tasks):
                    with (self.layout.survey(each) / name).open("rb") as found:
                        shutil.copyfileobj(found, file, 2**20)


class MeetStep(Step):
    """Records that agree in a band. Bands are cut into parts where there are more tasks than bands."""

    name = "meet"

    def run(self, task: int) -> None:
        """See `Step.run`."""
        arrays = read_arrays(self.layout.gathered, _width(self.cfg))
        codes, cfg = arrays["codes"], self.cfg.dedup
        if (codes == UNDECIDED).any():  # splits are drawn later, so all meetings count
            cfg = replace(cfg, scope=DedupScope.all)
        rows = np.flatnonzero(codes != NO_RECORD)
        bands = Banding.of(cfg.threshold).bands
        parts = -(-self.layout.tasks // bands)
        mine = range(task, bands * parts, self.layout.tasks)
        met = [in_one_band(cfg, arrays["signatures"], codes, rows, i // parts, i % parts, parts) for i in mine]
        save_meetings(self.layout.meetings(task), met)


class DecideStep(Step):
    """One task: splits that depend on other rows, and which duplicates go."""

    name = "decide"

    def run(self, task: int) -> None:
        """See `Step.run`."""
        reports = self.layout.reports()
        part_rows = [sum(report["rows"].get(str(n), 0) for report in reports) for n in range(len(self.parts))]
        state = {"chunks": [sum(part_rows)], "part_rows": part_rows}
        files = SurveyFiles(self.layout.gathered, self.parts, _width(self.cfg), state)
        meetings = None
        if self.cfg.dedup.near:
            meetings = (load_meetings(self.layout.meetings(each)) for each in range(self.layout.tasks))
        files.decide(self.cfg.dedup, meetings).save(self.layout.decided)


def _width(cfg: PrepConfig) -> int:
    """Bytes of a signature; 0: there are none."""
    return Signer(cfg.dedup).width if cfg.dedup.near else 0
