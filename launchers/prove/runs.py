"""The real commands in processes of their own: started, watched, killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from configs.errors import EXIT_DONE, CrosstuneError, RunFailedError, WorkerLostError
from launchers.failure import from_json
from launchers.torchrun import end_with_parent, hangups_are_ignored

POLL_SECONDS = 0.002
GONE_SECONDS = 60
"""Time that the kernel may take to clear away killed processes, with the memory of their devices."""


@dataclass(frozen=True)
class Seen:
    """A run at one moment, as its folder shows it."""

    step: int
    """Of the last line in metrics.jsonl."""
    saving: bool
    """A checkpoint is being written."""


class Command:
    """``crosstune words...`` at work.

    Args:
        words: of the command.
        logs: folder for its output.
        name: of the files there: ``<name>.log``, and ``<name>.json`` for what it answered.
    """

    def __init__(self, words: Sequence[str], logs: Path, name: str) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.words, self.log, self._answer = list(words), logs / f"{name}.log", logs / f"{name}.json"
        command = [sys.executable, "-P", "-m", "launchers.cli", *words, "--json"]
        with self.log.open("wb") as log, self._answer.open("wb") as answer:
            # A session of its own: Ctrl-C reaches it through us.
            self.process = psutil.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=answer,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def wait(self) -> CrosstuneError | None:
        """Waits for the end.

        Returns:
            Its fault; None if it was done.
        """
        return self.fault(self.process.wait())

    def fault(self, code: int) -> CrosstuneError | None:
        """What an exit code stands for, in the command's own words where it left any."""
        if code == EXIT_DONE:
            return None
        remedy = f"its output is in {self.log}"
        with suppress(ValueError, KeyError):
            left = from_json(json.loads(self._answer.read_text(encoding="utf-8")))
            left.remedy = "; ".join(text for text in (left.remedy, remedy) if text)
            return left
        ending = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return WorkerLostError(f"crosstune {self.words[0]}", f"{ending} without a message", remedy=remedy)

    def watch(self, run_dir: Path) -> Iterator[Seen]:
        """Where the run stands, again and again until the command ends."""
        while self.process.poll() is None:
            yield seen(run_dir)
            time.sleep(POLL_SECONDS)

    def kill(self) -> int:
        """SIGKILL to all of its processes; waits until they are gone.

        Returns:
            How many there were.
        """
        return kill_all(self.process)


def seen(run_dir: Path) -> Seen:
    """Reads a run's folder."""
    try:
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
        step = int(json.loads(text[: text.rindex("\n")].rpartition("\n")[2])["step"])
    except (OSError, ValueError, KeyError):  # not there yet, or just being written
        step = 0
    return Seen(step, any((run_dir / "checkpoints").glob("step-*.partial")))


def kill_all(process: psutil.Process) -> int:
    """SIGKILL to a process and all below it: frozen first, so that none starts another in the meantime."""
    frozen: dict[int, psutil.Process] = {}
    while new := [each for each in _family(process) if each.pid not in frozen]:
        for each in new:
            frozen[each.pid] = each
            with suppress(psutil.NoSuchProcess):
                each.suspend()
    for each in frozen.values():
        with suppress(psutil.NoSuchProcess):
            each.kill()
    end = time.monotonic() + GONE_SECONDS
    while left := [each for each in frozen.values() if not _is_gone(each)]:
        if time.monotonic() > end:
            raise RunFailedError(f"process {left[0].pid}", "is still there after kill -9", remedy="look at its device")
        time.sleep(POLL_SECONDS)
    return len(frozen)


def _family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_gone(process: psutil.Process) -> bool:
    """A dead process that its parent has not asked about (a container's first process may never do) is gone."""
    if isinstance(process, psutil.Popen):
        return process.poll() is not None
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def ended_with_us(command: Command) -> Iterator[Command]:
    """Whatever ends the proof ends the command: they have no terminal in common."""
    numbers = [signal.SIGTERM, *([] if hangups_are_ignored() else [signal.SIGHUP])]
    before = {number: signal.signal(number, _leave) for number in numbers}
    try:
        yield command
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if command.process.poll() is None:
            command.kill()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
