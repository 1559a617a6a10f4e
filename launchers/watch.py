"""Signs of life of the command that supervises a job in the foreground: ``RUN/launch/supervisor``.

Other machines cannot see its process, and of a sweep one process supervises all jobs, one after the other. So it
touches the file while the job runs, and writes into it that the job has ended.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from configs.errors import StorageError
from configs.files import write_whole
from launchers.job import Job, JobFolder

BEAT_SECONDS = 20.0
SILENT_SECONDS = 240.0
"""Without a sign for so long, a supervisor that cannot be asked counts as gone. A network file system may show another
machine's sign a minute late."""


@contextmanager
def watched(job: Job, folder: JobFolder) -> Iterator[None]:
    """Gives signs of life of this job until the end, and notes that."""
    file = file_of(folder)
    over = threading.Event()
    with suppress(StorageError):
        write_whole(file, _content(job, ended=False))

    def beat() -> None:
        while not over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(StorageError):  # a disk that is full; on this machine the process tells
            write_whole(file, _content(job, ended=True))


@dataclass(frozen=True)
class Sign:
    """What is known of a supervisor."""

    ended: bool
    """It said so."""
    age_seconds: float
    """Since the last sign, by the file system's own clock."""


def last_sign(job: Job, folder: JobFolder) -> Sign | None:
    """The latest sign of a job's supervisor; None: it left none."""
    file = file_of(folder)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["submitted"] != job.submitted:  # of the job that was here before
            return None
        with tempfile.NamedTemporaryFile(dir=folder.path, prefix=".now-") as now:
            age = Path(now.name).stat().st_mtime - file.stat().st_mtime
    except (OSError, ValueError, KeyError):
        return None
    return Sign(bool(content["ended"]), age)


def file_of(folder: JobFolder) -> Path:
    """Where the signs are."""
    return folder.path / "supervisor"


def _content(job: Job, *, ended: bool) -> str:
    return json.dumps({"submitted": job.submitted, "ended": ended}) + "\n"
