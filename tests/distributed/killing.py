"""Kills runs with SIGKILL at random moments, some of them inside a save, and lets them go on until they are done."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.distributed.forks import Ranks
from tests.distributed.tiny_training import STEPS, Home, Setting, train_rank
from train.checkpoint.layout import PARTIAL, STALE, checkpoints, step_folder
from train.run_folder import RunFolder

PATIENCE = 120
"""Seconds in which a tiny run ends, or comes to the place where it is to be killed, on a busy machine."""
LOOKS = 0.0005
"""Seconds between two looks at the folder of the checkpoints."""
FAREWELL = 1.0
"""Seconds that the others have when one rank was killed; torchrun, too, ends them then."""


class Aim(Enum):
    """Where a kill is to strike."""

    start = "start"
    """Before the first step of the attempt: imports of the model, the load of the checkpoint."""
    anywhere = "anywhere"
    """Some time after a step, however far the next one or a save has come."""
    save = "save"
    """While a folder is being written or removed."""


@dataclass(frozen=True)
class Kill:
    """One kill, as planned."""

    aim: Aim
    step: int
    """It waits until this step is in metrics.jsonl; for `start` without meaning."""
    part: float
    """How far into the start, the step or the save, from 0 to 1."""
    only: int | None
    """The rank that is killed; None: all at once."""


@dataclass(frozen=True)
class Struck:
    """What a kill left behind."""

    setting: str
    kill: Kill
    step: int
    """Last step of metrics.jsonl."""
    torn: tuple[str, ...]
    """Names of folders that were being written or removed, with what was in them."""

    def __str__(self) -> str:
        who = "all ranks" if self.kill.only is None else f"rank {self.kill.only}"
        return f"{self.setting}: {who} killed, aim {self.kill.aim.value}, after step {self.step}; torn: {self.torn}"


def send(number: signal.Signals, ranks: Ranks) -> None:
    """To all that are still there."""
    for pid in ranks.pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def plan_kills(rng: random.Random, aims: Sequence[Aim], ranks: int) -> list[Kill]:
    """Kills of one run in the order in which they come."""
    steps = sorted(rng.randrange(1, STEPS) for _ in aims)
    single = [rng.randrange(ranks) if ranks > 1 and rng.random() < 0.4 else None for _ in aims]
    return [
        Kill(aim, step, rng.random(), only)
        for aim, step, only in zip(rng.sample(aims, len(aims)), steps, single, strict=True)
    ]


class Victim:
    """A run that is killed and goes on.

    Args:
        setting: of the run.
        home: its model and data.
        run_dir: its folder.
        pace: seconds that an uninterrupted run takes to its first step, and for each step then.
    """

    def __init__(self, setting: Setting, home: Home, run_dir: Path, pace: tuple[float, float]) -> None:
        self.setting, self.home, self.run_dir, self.pace = setting, home, run_dir, pace
        self.run, self.cfg = RunFolder(run_dir), setting.config(home, run_dir)

    @property
    def done(self) -> bool:
        """The last step is saved."""
        return step_folder(self.run.checkpoints, STEPS) in checkpoints(self.run.checkpoints)

    def begin(self) -> Ranks:
        """An attempt: goes on from the newest checkpoint, or begins anew where there is none."""
        resume = bool(checkpoints(self.run.checkpoints))
        if not resume:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            self.run_dir.mkdir(parents=True)
        arguments = (self.cfg, self.home, self.run_dir, resume)
        return Ranks(train_rank, self.setting.ranks, *arguments, logs=self.run_dir, environment={})

    def finish(self) -> None:
        """An attempt that nobody disturbs."""
        ranks = self.begin()
        codes = ranks.wait(PATIENCE)
        ranks.kill()
        assert codes == [0] * self.setting.ranks, f"{self.setting}: ended with {codes}\n{ranks.output()}"

    def strike(self, kill: Kill) -> Struck | None:
        """One attempt, killed; None if it was done before."""
        if self.done:
            return None
        ranks = self.begin()
        try:
            if kill.aim is Aim.start:
                time.sleep(kill.part * self.pace[0])
            elif not self.until(ranks, lambda: self.step() >= kill.step):
                return None
            elif kill.aim is Aim.anywhere:
                time.sleep(kill.part * 2 * self.pace[1])
            elif not self._stop_in_save(ranks, kill):
                return None
            if not ranks.pids:
                return None
            for rank, process in enumerate(ranks.processes):
                if kill.only in (None, rank):
                    process.kill()
            send(signal.SIGCONT, ranks)
            if kill.only is not None:
                ranks.wait(FAREWELL)
        finally:
            ranks.kill()
        if not any(ranks.codes):
            return None  # it came to its end on the way
        assert -signal.SIGKILL in ranks.codes, f"{self.setting}: ended with {ranks.codes}\n{ranks.output()}"
        return Struck(str(self.setting), kill, self.step(), self.torn())

    def until(self, ranks: Ranks, reached: Callable[[], bool]) -> bool:
        """Waits; False if the attempt ended first."""
        give_up = time.monotonic() + PATIENCE
        while not reached():
            assert time.monotonic() < give_up, f"{self.setting}: stuck\n{ranks.output()}"
            if None not in ranks.codes:
                assert not any(ranks.codes), f"{self.setting}: ended with {ranks.codes}\n{ranks.output()}"
                return False
            time.sleep(LOOKS)
        return True

    def _stop_in_save(self, ranks: Ranks, kill: Kill) -> bool:
        """Stops all ranks while a folder is torn; what they do in a stop and a kill is what they do in a kill."""
        wait = kill.part * min(0.02, self.pace[1])
        while self.until(ranks, lambda: bool(self._unfinished())):
            time.sleep(wait)
            send(signal.SIGSTOP, ranks)
            if self._unfinished():
                return True
            send(signal.SIGCONT, ranks)
            wait /= 2  # the save was over by then: saves are as fast as the disk
        return False

    def _unfinished(self) -> list[Path]:
        folder = self.run.checkpoints
        try:
            return sorted(path for path in folder.iterdir() if path.suffix in (PARTIAL, STALE))
        except FileNotFoundError:
            return []

    def torn(self) -> tuple[str, ...]:
        """See `Struck.torn`."""
        return tuple(f"{path.name} {sorted(file.name for file in path.iterdir())}" for path in self._unfinished())

    def step(self) -> int:
        """Whole lines of metrics.jsonl, which is one per step."""
        try:
            return self.run.metrics.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0


def uninterrupted(setting: Setting, home: Home, run_dir: Path) -> tuple[float, float]:
    """The run to compare with; returns seconds to its first step, and of a step then."""
    victim = Victim(setting, home, run_dir, (0.0, 0.0))
    ranks = victim.begin()
    started = time.monotonic()
    victim.until(ranks, lambda: victim.step() >= 1)
    first = time.monotonic()
    codes = ranks.wait(PATIENCE)
    ranks.kill()
    assert codes == [0] * setting.ranks, f"{setting}: ended with {codes}\n{ranks.output()}"
    return first - started, (time.monotonic() - first) / (STEPS - 1)
