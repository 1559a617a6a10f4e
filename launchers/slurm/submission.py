"""Hands a batch script to Slurm, and finds a job again that it may have taken without a word.

A controller under load may answer later than sbatch waits for, or not at all, and take the job all the same; so it may
where sbatch is killed. Such a job is found by its name and by the folder from which it was submitted.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import CrosstuneError, RunFailedError
from configs.files import write_whole
from launchers.base import UnknownOutcomeError
from launchers.job import Job, JobFolder
from launchers.slurm.commands import call, killed_by, no_answer, on_cluster, refused

logger = logging.getLogger(__name__)
LATE = re.compile(
    r"timed out|unable to contact|(communication|connection|message|endpoint|socket).* (failure|error|reset|closed)|"
    r"zero bytes|unexpected message|not connected|standby mode",
    re.IGNORECASE,
)
"""What sbatch says where the way to the controller failed, not the job."""
NOT_REACHED = re.compile(r"connect failure|connection refused|standby mode", re.IGNORECASE)
"""Of these the ones with which nothing was sent."""
ACCEPTED = re.compile(r"(?P<number>\d+)(;(?P<cluster>\S+))?")
LOOK_UP_SECONDS = 300
"""So long a controller that does not answer is asked whether it has a job."""
ABSENT_SECONDS = 30
"""Slurm must have said for so long that it has no such job: it may be at work on the submission yet."""
PAUSE_SECONDS = 5
MARK = "\x1e"
"""Around a job in what squeue prints: paths may hold whatever else a line does."""
ARRAY = "array.json"


@dataclass(frozen=True)
class Place:
    """Under what Slurm finds a job of which no number is known."""

    name: str
    """Slurm's: of a sweep, that of its first job."""
    folder: str
    """From where it was submitted."""
    task: int | None = None
    """Number in an array."""


@dataclass(frozen=True)
class Submitted:
    """What Slurm calls a submission."""

    number: str
    cluster: str = ""
    """Where several are served; empty: the only one."""


def submit_script(script: str, place: Place, clusters: str = "") -> Submitted:
    """Hands over a script.

    Slurm's own output goes to the working folder, so that its path is in no line of #SBATCH.

    Args:
        script: its name in the folder.
        place: where it would be found.
        clusters: among which Slurm chooses; empty: there is one.

    Raises:
        ConfigError: Slurm refused the job.
        RunFailedError: Slurm was not reached, or says that it does not have the job.
        UnknownOutcomeError: Slurm does not say whether it has the job.
    """
    try:
        done = call(["sbatch", "--parsable", script], cwd=Path(place.folder))
    except RunFailedError as error:
        return _taken_late(error, place, clusters)
    if done.returncode:
        if killed_by(done.returncode) or not done.stderr.strip():
            return _taken_late(no_answer(done), place, clusters)  # a refusal comes with a word
        if not LATE.search(done.stderr):
            raise refused(done.stderr)
        if NOT_REACHED.search(done.stderr):
            raise no_answer(done)
        return _taken_late(no_answer(done), place, clusters)
    accepted = ACCEPTED.fullmatch(done.stdout.strip().rpartition("\n")[2])
    if accepted is None:
        fault = RunFailedError("sbatch", f"answers '{done.stdout.strip()}', which names no job")
        return _taken_late(fault, place, clusters)
    return Submitted(accepted["number"], accepted["cluster"] or "")


def _taken_late(fault: RunFailedError, place: Place, clusters: str) -> Submitted:
    logger.warning("%s: %s; Slurm is asked whether it has the job", fault.where, fault.found)
    give_up, absent = time.monotonic() + LOOK_UP_SECONDS, None
    while True:
        try:
            if (found := find(place, clusters)) is not None:
                return found
            absent = absent or time.monotonic()
        except CrosstuneError:
            absent = None
        now = time.monotonic()
        if absent is not None and now - absent >= ABSENT_SECONDS:
            told = f"{fault.found}; Slurm says that it does not have the job"
            raise RunFailedError(
                fault.where, told, remedy="once more, when scontrol ping tells that the controller is up"
            )
        if absent is None and now >= give_up:
            raise UnknownOutcomeError(
                fault.where,
                f"{fault.found}; nor does Slurm say whether it has the job {place.name}",
                remedy="crosstune status, once Slurm answers: it finds the job by its name",
            )
        time.sleep(PAUSE_SECONDS)


def find(place: Place, clusters: str = "") -> Submitted | None:
    """The job of a place; None: Slurm has none, or has forgotten it, as it does some minutes after a job's end.

    Raises:
        RunFailedError: Slurm cannot be asked.
    """
    asked = ["--noheader", "--states=all", f"--name={place.name}", f"--format={MARK}%F %Z{MARK}"]
    done = call(["squeue", *on_cluster(clusters), *asked])
    if done.returncode:
        raise no_answer(done)
    cluster, (between, *rest) = clusters, done.stdout.split(MARK)
    for record, after in zip(rest[::2], rest[1::2], strict=True):
        if header := re.search(r"CLUSTER: (\S+)", between):
            cluster = header[1]
        number, _, folder = record.partition(" ")
        if os.path.realpath(folder) == os.path.realpath(place.folder):
            return Submitted(number, cluster)
        between = after
    return None


def clusters_of(options: Sequence[str]) -> str:
    """The clusters that further options of sbatch name."""
    named = [value for key, _, value in (option.partition("=") for option in options) if key == "--clusters"]
    return named[-1] if named else ""


def note_array(jobs: Sequence[tuple[Job, JobFolder]], folder: Path) -> None:
    """Leaves with each job of an array under what Slurm will find it.

    Raises:
        StorageError: it cannot be written.
    """
    for task, (job, own) in enumerate(jobs):
        place = Place(jobs[0][0].spec.name, str(folder), task)
        write_whole(own.path / ARRAY, json.dumps({"job": job.spec.name, **asdict(place)}) + "\n")


def place_of(job: Job, folder: JobFolder) -> Place:
    """Where Slurm finds a job: an array's, unless it was submitted by itself since."""
    try:
        noted = json.loads((folder.path / ARRAY).read_text(encoding="utf-8"))
        if noted.pop("job") == job.spec.name:
            return Place(**noted)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return Place(job.spec.name, str(folder.path))
