"""A job's folder ``RUN/launch`` and what is known of the job from it.

    RUN/launch/
        job.json             the spec, and what the scheduler calls the job
        launch.yaml          where and how: the config of `crosstune launch`
        request.yaml         the config that every rank reads
        <rendered files>     what the launcher submitted, as it was
        attempts/000/node-0.json   what each machine did: host, begin, end, exit code, fault
        cancelled            somebody asked for the job's end
        supervisor           signs of life of who supervises it in the foreground (`launchers.watch`)
    RUN/logs/attempt-000/node-0/   output.log, torchrun.log, workers/, errors/

A job's state is the scheduler's word joined with these marks: an exit code alone tells neither a save before a
preemption from a failure, nor a machine that was lost from one that was done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from configs.errors import EXIT_DONE, EXIT_RESUMABLE, CheckpointError, CrosstuneError, StorageError
from configs.files import write_whole
from launchers.spec import LaunchSpec

FORMAT = 1


class State(Enum):
    """Of a job."""

    pending = "pending"
    running = "running"
    preempted = "preempted"
    """It saved and stopped; it goes on when the scheduler or `crosstune resume` starts it again."""
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"
    lost = "lost"
    """The scheduler knows nothing of it, and it did not say how it ended."""


class Word(Enum):
    """What a scheduler says of a job."""

    pending = "pending"
    running = "running"
    ended = "ended"
    failed = "failed"
    """Ended, and not well, by the scheduler's own account: a machine died, a time limit was met."""
    cancelled = "cancelled"
    unknown = "unknown"
    """It knows no such job, or no more."""


@dataclass(frozen=True)
class Report:
    """A scheduler's word with what it adds, in its own terms."""

    word: Word
    detail: str = ""
    """One line, such as ``PENDING (Resources)`` or ``node n2 is down``."""


@dataclass(frozen=True)
class Mark:
    """What one machine did in one attempt; written at its begin and again at its end."""

    node: int
    attempt: int
    host: str
    pid: int
    began: float
    """`time.time` of that machine."""
    environment: str
    """See `environment_hash`: equal on all machines of an attempt."""
    ended: float | None = None
    exit_code: int | None = None
    fault: dict[str, Any] | None = None
    """As `launchers.failure.as_json` writes it, with ``time`` and ``rank``; None: none."""


@dataclass(frozen=True)
class Job:
    """What was submitted."""

    spec: LaunchSpec
    submitted: float
    handle: dict[str, Any] = field(default_factory=dict)
    """What the scheduler calls the job, or the process that supervises it; empty: nobody has said yet."""
    attempt: int = 0
    """Of the first attempt of this submission: a job that is resumed counts on."""


@dataclass(frozen=True)
class JobFolder:
    """Paths and files of a job."""

    path: Path
    """``RUN/launch``."""

    @staticmethod
    def of_run(run_dir: Path) -> JobFolder:
        """The job that made a run."""
        return JobFolder(run_dir / "launch")

    @property
    def run_dir(self) -> Path:
        """Of the run."""
        return self.path.parent

    @property
    def file(self) -> Path:
        """job.json."""
        return self.path / "job.json"

    @property
    def request(self) -> Path:
        """The config that every rank reads."""
        return self.path / "request.yaml"

    @property
    def options(self) -> Path:
        """The config of the launch."""
        return self.path / "launch.yaml"

    def logs(self, attempt: int, node: int) -> Path:
        """Folder of a machine's logs."""
        return self.run_dir / "logs" / f"attempt-{attempt:03}" / f"node-{node}"

    def output(self, attempt: int, node: int) -> Path:
        """What a machine printed; of machine 0 with what rank 0 did."""
        return self.logs(attempt, node) / "output.log"

    def write(self, job: Job) -> None:
        """Writes job.json.

        Raises:
            StorageError: it cannot be written.
        """
        make_folder(self.path)
        content = {"format": FORMAT, **asdict(job), "spec": job.spec.to_json()}
        write_whole(self.file, json.dumps(content, indent=2) + "\n")

    def read(self) -> Job:
        """What `write` wrote.

        Raises:
            CheckpointError: there is none, or it is damaged or of another format.
        """
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise CheckpointError(str(self.file), "of another format", remedy="the crosstune that launched it")
            return Job(**{**content, "spec": LaunchSpec.from_json(content["spec"])})
        except FileNotFoundError:
            raise CheckpointError(
                str(self.run_dir), "was not launched: no launch/job.json", remedy="crosstune launch, or another folder"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(str(self.file), f"damaged: {error}") from None

    def mark_file(self, attempt: int, node: int) -> Path:
        """Where a machine leaves its mark."""
        return self.path / "attempts" / f"{attempt:03}" / f"node-{node}.json"

    def mark(self, mark: Mark) -> None:
        """Leaves a machine's mark.

        Raises:
            StorageError: it cannot be written.
        """
        file = self.mark_file(mark.attempt, mark.node)
        make_folder(file.parent)
        write_whole(file, json.dumps(asdict(mark), indent=1) + "\n")

    def marks(self, attempt: int | None = None, *, since: int = 0) -> list[Mark]:
        """Marks of an attempt by machine. What is half there is left out.

        Args:
            attempt: its number; None: the latest that has any.
            since: earlier attempts do not count; those before `Job.attempt` are of jobs that were here before.
        """
        begun = [number for number in self.begun() if number >= since and attempt in (None, number)]
        found = []
        for file in self.mark_file(max(begun), 0).parent.glob("node-*.json") if begun else ():
            try:
                mark = Mark(**json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
            found.append(mark if _readable(mark.fault) else replace(mark, fault=None))
        return sorted(found, key=lambda mark: mark.node)

    def begun(self) -> list[int]:
        """Attempts that have marks, by the names of their folders alone: the marks may be hundreds of files."""
        return [int(path.name) for path in (self.path / "attempts").glob("[0-9]*")]

    def next_attempt(self, former: Job) -> int:
        """The number of the first attempt of another submission: none is used twice."""
        return max((number + 1 for number in self.begun()), default=former.attempt)

    @property
    def cancel_mark(self) -> Path:
        """There from when somebody asks for the job's end until it is resumed."""
        return self.path / "cancelled"

    def ask_to_cancel(self) -> None:
        """Notes that the job was asked to end, so that nobody starts it again."""
        write_whole(self.cancel_mark, f"{time.time()}\n")

    def take_back_cancel(self) -> None:
        """A job that is resumed is wanted again."""
        self.cancel_mark.unlink(missing_ok=True)

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for the job's end."""
        return self.cancel_mark.is_file()


def _readable(fault: Mapping[str, Any] | None) -> bool:
    """Whether a fault is one of this version's."""
    from launchers.failure import from_json

    try:
        return fault is None or bool(fault["errors"]) and from_json(dict(fault)) is not None
    except (KeyError, TypeError, ValueError):
        return False


def make_folder(path: Path) -> None:
    """Makes a folder.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(str(path), f"cannot be made: {error.strerror}") from None


def state_of(report: Report, marks: Sequence[Mark], nodes: int, *, cancelled: bool) -> State:
    """The state of a job.

    Args:
        report: the scheduler's.
        marks: of the latest attempt.
        nodes: machines that the job has.
        cancelled: somebody asked for its end.
    """
    if report.word is Word.pending:
        return State.preempted if marks else State.pending
    if report.word is Word.running:
        return State.running
    codes = [mark.exit_code for mark in marks]
    if len(marks) == nodes and codes and all(code == EXIT_DONE for code in codes):
        return State.succeeded
    if cancelled or report.word is Word.cancelled:
        return State.cancelled
    failed = [code for code in codes if code not in (None, EXIT_DONE, EXIT_RESUMABLE)]
    if failed or report.word is Word.failed:
        return State.failed
    return State.preempted if EXIT_RESUMABLE in codes else State.lost


def root_cause(marks: Sequence[Mark]) -> tuple[Mark, CrosstuneError] | None:
    """The fault that came first over all machines; the others ("connection closed by peer") only follow.

    Clocks of machines differ by little where they are kept in time, which `crosstune doctor nodes` looks at.
    """
    from launchers.failure import from_json

    left = [mark for mark in marks if mark.fault]
    if not left:
        return None
    first = min(left, key=lambda mark: (_remote(mark.fault or {}), float((mark.fault or {}).get("time", mark.began))))
    assert first.fault is not None
    return first, from_json(first.fault)


FOLLOW = ("WorkerLostError", "LostContactError", "UnexpectedError", "StoppedError")
"""Kinds of faults from the likeliest cause to the least: a killed process, which its parent tells only at the end; a
save in which the others no longer answered; what nobody foresaw, mostly the loss of a peer; a save upon the signal with
which a launcher ends the other machines."""


def _remote(fault: Mapping[str, Any]) -> int:
    """How far a fault is from being a cause; 0: a rank knew what was wrong."""
    return max((FOLLOW.index(each["kind"]) + 1 for each in fault["errors"] if each["kind"] in FOLLOW), default=0)
