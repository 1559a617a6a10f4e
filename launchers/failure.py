"""From an exception to what the user sees and the exit code; also across processes.

A worker leaves its fault as a small JSON file, and the process that started it shows the earliest one: the other ranks'
faults ("connection closed by peer") only follow from it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs import errors as kinds
from configs.errors import (
    EXIT_RUN_FAILED,
    CrosstuneError,
    ErrorGroup,
    OutOfMemoryError,
    RunFailedError,
    WorkerLostError,
)
from configs.files import write_whole

ERROR_DIR = "CROSSTUNE_ERROR_DIR"
"""Folder in which a worker leaves its fault; set by the process that starts workers."""
LAUNCHED = "CROSSTUNE_LAUNCHED"
"""Set for the ranks of a job: no process of theirs has made the run's folder, or speaks for them."""
DEBUG = "CROSSTUNE_DEBUG"
"""Set to 1 to see tracebacks on the terminal."""


class UnexpectedError(RunFailedError):
    """An exception that nobody foresaw: a fault of ours, of a library or of the machine."""


def as_crosstune_error(error: BaseException, logs: Path | None) -> CrosstuneError:
    """The error itself, or for an unexpected one a short `UnexpectedError` with the traceback in `logs`.

    Args:
        error: what was raised.
        logs: folder for the traceback; None where there is no run folder yet.
    """
    if isinstance(error, CrosstuneError):
        return error
    text = "".join(traceback.format_exception(error))
    remedy = f"set {DEBUG}=1 to see the traceback"
    if logs is not None:
        file = logs / f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            remedy = f"the traceback is in {file}"
        except OSError:  # a full disk may be the very fault; the hint with the variable stays
            pass
    first = str(error).strip().splitlines()
    return UnexpectedError(type(error).__name__, first[0][:300] if first else "no message", remedy=remedy)


@contextmanager
def traceback_kept_in(logs: Path) -> Iterator[None]:
    """Turns an unexpected exception into a short `UnexpectedError`, its traceback kept in the run's logs."""
    try:
        yield
    except Exception as error:
        raise as_crosstune_error(error, logs) from error


def as_json(error: CrosstuneError) -> dict[str, Any]:
    """The error for machines."""
    errors = error.errors if isinstance(error, ErrorGroup) else [error]
    return {
        "exit_code": error.exit_code,
        "errors": [
            {"kind": type(e).__name__, "where": e.where, "found": e.found, "allowed": e.allowed, "remedy": e.remedy}
            for e in errors
        ],
    }


def leave_error(error: CrosstuneError) -> None:
    """In a worker: writes the fault for the parent process."""
    folder = Path(os.environ[ERROR_DIR])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"rank{os.environ.get('RANK', '0')}.json"
    write_whole(file, json.dumps({"time": time.time(), **as_json(error)}))


def last_words(error: CrosstuneError) -> None:
    """Tells a fault when this process is about to end itself: to the parent process if there is one, else aloud."""
    if ERROR_DIR in os.environ:
        leave_error(error)
    else:
        print(error.render(), file=sys.stderr, flush=True)


def earliest_error(folder: Path) -> CrosstuneError | None:
    """In the parent: the fault that a worker wrote first; None if none did."""
    left = earliest_fault(folder)
    return from_json(left) if left else None


def earliest_fault(folder: Path) -> dict[str, Any] | None:
    """The same as it was written, with its ``time`` and ``rank``."""
    left = [
        {"rank": int(file.stem.removeprefix("rank")), **json.loads(file.read_text(encoding="utf-8"))}
        for file in folder.glob("rank*.json")
    ]
    return min(left, key=lambda content: float(content["time"])) if left else None


def from_json(content: dict[str, Any]) -> CrosstuneError:
    """The error that `as_json` wrote; KeyError if it did not."""
    errors: Sequence[CrosstuneError] = [
        _kind(e["kind"])(e["where"], e["found"], allowed=e["allowed"], remedy=e["remedy"]) for e in content["errors"]
    ]
    error = errors[0] if len(errors) == 1 else ErrorGroup(errors)
    error.exit_code = int(content.get("exit_code", EXIT_RUN_FAILED))
    return error


def _kind(name: str) -> type[CrosstuneError]:
    """The class of a worker's fault; a library's own subclass becomes a plain `CrosstuneError`."""
    found = UnexpectedError if name == UnexpectedError.__name__ else getattr(kinds, name, None)
    return found if isinstance(found, type) and issubclass(found, CrosstuneError) else CrosstuneError


def with_way_on(error: RunFailedError, folder: Path) -> RunFailedError:
    """The fault of a run, with how far the run had come and how it goes on.

    Args:
        error: what ended the run.
        folder: of the run.
    """
    saved = sorted(path.parent.name for path in folder.glob("checkpoints/step-*[0-9]/COMPLETE"))
    done = last_step(folder / "metrics.jsonl")
    if saved:
        step = int(saved[-1].removeprefix("step-"))
        way_on = f"crosstune resume {shlex.quote(str(folder))} goes on after step {step}"
        if isinstance(error, OutOfMemoryError):
            way_on += ", with what is to change added as key=value"
    elif done:
        way_on = "no checkpoint was kept: start again, with checkpoint.every=STEPS"
    else:
        way_on = None
    found = f"{error.found} {_when(done)}" if isinstance(error, WorkerLostError) else error.found
    remedy = "; ".join(text for text in (error.remedy, way_on) if text)
    return type(error)(error.where, found, allowed=error.allowed, remedy=remedy or None)


def _when(last_step: int) -> str:
    return f"after step {last_step}" if last_step else "before the first step was done"


def last_step(metrics: Path) -> int:
    """Of metrics.jsonl, written by rank 0 after each step; 0 where there is none. A torn last line is left out."""
    steps = [0]
    if metrics.is_file():
        for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines()[-2:]:
            try:
                steps.append(int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue
    return max(steps)
