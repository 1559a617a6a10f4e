"""What a user sees when something is wrong.

Every fault that a user can cause is a `CrosstuneError`: it says where (a config key, a ``file:line``), what was
found, what is allowed and what to do. The command line prints it without a traceback and exits with its code.
`assert` is left for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

EXIT_DONE = 0
EXIT_USER_FAULT = 2
EXIT_RUN_FAILED = 3
EXIT_RESUMABLE = 75
EXIT_INTERRUPTED = 130
"""As a shell's of a program that SIGINT ended."""


class CrosstuneError(Exception):
    """A fault with a place, a finding, what is allowed and a remedy.

    Args:
        where: config key, ``file:line`` or path that is at fault.
        found: what was met there.
        allowed: what may stand there, if that can be said.
        remedy: what the user can do next.
    """

    exit_code = EXIT_USER_FAULT

    def __init__(self, where: str, found: str, *, allowed: str | None = None, remedy: str | None = None) -> None:
        self.where, self.found, self.allowed, self.remedy = where, found, allowed, remedy
        super().__init__(self.render())

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker's fault reaches its parent as it was."""
        return partial(type(self), self.where, self.found, allowed=self.allowed, remedy=self.remedy), ()

    def render(self) -> str:
        """The message as the terminal shows it, a few lines."""
        lines = [f"{self.where}: {self.found}"]
        if self.allowed:
            lines.append(f"  allowed: {self.allowed}")
        if self.remedy:
            lines.append(f"  remedy:  {self.remedy}")
        return "\n".join(lines)


class ConfigError(CrosstuneError):
    """A config key is unknown, missing, of the wrong type or contradicts another."""


class DataError(CrosstuneError):
    """Records, or a folder of prepared data, cannot be used."""


class ModelError(CrosstuneError):
    """A model folder, tokenizer or template cannot be used."""


class DeviceError(CrosstuneError):
    """The device is not there or cannot do what was asked."""


class CheckpointError(CrosstuneError):
    """A checkpoint or run folder is missing, torn, damaged or belongs to something else."""


class StorageError(CrosstuneError):
    """A path cannot be written, or there is no room."""


class NoRoomError(StorageError):
    """A disk or a quota is full, or would be."""


class RunFailedError(CrosstuneError):
    """The run itself failed, through no fault of the user's input."""

    exit_code = EXIT_RUN_FAILED


class OutOfMemoryError(RunFailedError):
    """Memory of a device, or of the host, ran out."""


class WorkerLostError(RunFailedError):
    """A process of the run was killed, or ended without a word."""


class HangError(RunFailedError):
    """No rank advanced for too long."""


class StoppedError(CrosstuneError):
    """The run was stopped before its end, and can go on from a checkpoint."""

    exit_code = EXIT_RESUMABLE


class ErrorGroup(CrosstuneError):
    """Several faults shown at once, so that a user mends them in one go."""

    def __init__(self, errors: Sequence[CrosstuneError]) -> None:
        self.errors = list(errors)
        self.exit_code = min(error.exit_code for error in errors)  # what the user can mend comes first
        super().__init__(self.errors[0].where, self.errors[0].found)

    def __reduce__(self) -> tuple[Any, ...]:
        """See `CrosstuneError.__reduce__`."""
        return type(self), (self.errors,)

    def render(self) -> str:
        """All messages, one under the other."""
        return "\n".join(e.render() for e in self.errors)


def not_empty(key: str, path: str | None) -> None:
    """Refuses an empty path, which would mean the working folder: mostly a shell variable that is not set.

    Raises:
        ConfigError: it is empty.
    """
    if path is not None and not path.strip():
        raise ConfigError(
            key, "empty", allowed="a path", remedy="is a shell variable not set? '.' is the working folder"
        )


def first_line(message: object) -> str:
    """The first line of an error or a warning, for a message of ours; empty where it says nothing."""
    lines = str(message).strip().splitlines()
    return lines[0] if lines else ""


def nearest(name: str, choices: Iterable[str]) -> str | None:
    """The choice most like `name`, for "did you mean"; None where nothing is near."""
    matches = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return matches[0] if matches else None


def raise_all(faults: Sequence[CrosstuneError]) -> None:
    """Raises faults that were gathered: one as it is, several together; none of them: nothing.

    Raises:
        CrosstuneError: the only one.
        ErrorGroup: several.
    """
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise ErrorGroup(list(faults))
