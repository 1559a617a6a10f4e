"""From an exception to what the user sees and the exit code; also across processes.

A worker leaves its fault as a small JSON file, and the process that started it shows the earliest one: the other ranks'
faults ("connection closed by peer") only follow from it.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import EXIT_RUN_FAILED, CrosstuneError, ErrorGroup, RunFailedError

ERROR_DIR = "CROSSTUNE_ERROR_DIR"
"""Folder in which a worker leaves its fault; set by the process that starts workers."""
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
    partial = file.with_suffix(".tmp")
    partial.write_text(json.dumps({"time": time.time(), **as_json(error)}), encoding="utf-8")
    partial.replace(file)


def earliest_error(folder: Path) -> CrosstuneError | None:
    """In the parent: the fault that a worker wrote first; None if none did."""
    left = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("rank*.json")]
    return _rebuilt(min(left, key=lambda content: float(content["time"]))) if left else None


def _rebuilt(content: dict[str, Any]) -> CrosstuneError:
    errors: Sequence[CrosstuneError] = [
        (UnexpectedError if e["kind"] == UnexpectedError.__name__ else CrosstuneError)(
            e["where"], e["found"], allowed=e["allowed"], remedy=e["remedy"]
        )
        for e in content["errors"]
    ]
    error = errors[0] if len(errors) == 1 else ErrorGroup(errors)
    error.exit_code = int(content.get("exit_code", EXIT_RUN_FAILED))
    return error
