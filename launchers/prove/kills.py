"""When a run is killed: moments spread over the run at random, every second one inside a save."""

from __future__ import annotations

import random
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import CrosstuneError
from launchers.prove.runs import Command, Seen, ended_with_us

LAST_SHARE = 0.8
"""No moment is in the rest of the run: the kill must come before its end."""


@dataclass(frozen=True)
class Moment:
    """One of them, as it was drawn."""

    step: int
    """Once this one is done; where it is inside a save, that of this step or the next one that is due."""
    inside_save: bool
    share: float
    """Of the length of a step, or of a save, that passes until the kill."""

    def __str__(self) -> str:
        return f"{self.share:.0%} into {f'the save of step {self.step}' if self.inside_save else 'the step'}" + (
            "" if self.inside_save else f" after step {self.step}"
        )


def draw(seed: int, kills: int, steps: int, every: int) -> list[Moment]:
    """`kills` moments of a run of `steps` steps that saves `every` so many, one in each equal part of it.

    The last comes after the first save: where there is nothing to resume yet, nothing is proven.
    """
    rng = random.Random(seed)
    last = max(kills, int(LAST_SHARE * steps))
    moments = []
    for number in range(kills):
        part = [*range(1 + number * last // kills, 1 + (number + 1) * last // kills)]
        if number == kills - 1:
            part = [step for step in part if step > every] or part
        saves = [step for step in part if step % every == 0]
        inside = bool(number % 2 and saves)
        moments.append(Moment(rng.choice(saves if inside else part), inside, rng.random()))
    return moments


@dataclass
class Rhythm:
    """How long steps and saves take, seen on the run without a kill."""

    step_seconds: float = 0.0
    save_seconds: float = 0.0
    _saves: int = 0
    _since: float | None = None

    def look(self, seen: Seen) -> None:
        """Takes the time of saves, to a few milliseconds."""
        now = time.monotonic()
        if seen.saving and self._since is None:
            self._since = now
        elif not seen.saving and self._since is not None:
            self._saves += 1
            self.save_seconds += (now - self._since - self.save_seconds) / self._saves
            self._since = None


@dataclass(frozen=True)
class Kill:
    """What a kill met."""

    planned: str
    step: int
    """Steps that metrics.jsonl had."""
    processes: int
    torn_save: bool
    """A folder was left that was being written."""
    goes_on_from: int
    """Step of the newest complete checkpoint; 0: none, the run begins anew."""

    def __str__(self) -> str:
        torn = ", a torn save left" if self.torn_save else ""
        return (
            f"{self.planned}: {self.processes} process{'es' if self.processes > 1 else ''} killed with {self.step} "
            f"steps done{torn}; goes on from {f'step {self.goes_on_from}' if self.goes_on_from else 'the beginning'}"
        )

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def kill_at(moment: Moment, command: Command, run_dir: Path, rhythm: Rhythm, every: int) -> Kill | None:
    """Waits for the moment and kills every process of the command.

    Returns:
        What the kill met; None if the command ended before.
    """
    with ended_with_us(command):
        for seen in command.watch(run_dir):
            # A save that is over in a few milliseconds may pass between two looks.
            missed = seen.step >= moment.step + every
            if seen.step >= moment.step and (seen.saving or missed or not moment.inside_save):
                break
        else:
            return None
        time.sleep(moment.share * (rhythm.save_seconds if moment.inside_save else rhythm.step_seconds))
        if command.process.poll() is not None:
            return None
        processes = command.kill()
        torn = any((run_dir / "checkpoints").glob("step-*.partial"))
        return Kill(str(moment), seen.step, processes, torn, newest(run_dir))


def newest(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    found = (path.parent.name for path in run_dir.glob("checkpoints/step-*[0-9]/COMPLETE"))
    return max((int(name.removeprefix("step-")) for name in found if name[5:].isdigit()), default=0)


def clear(run_dir: Path) -> None:
    """Takes away a run that was killed before its first checkpoint: there is nothing to resume."""
    shutil.rmtree(run_dir)


def ends_well(command: Command) -> CrosstuneError | None:
    """Waits for the end; the fault, if it ended with one."""
    with ended_with_us(command):
        return command.wait()
