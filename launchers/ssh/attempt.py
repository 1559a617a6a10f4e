"""One attempt of a job on machines that are ready: started, followed, ended together."""

from __future__ import annotations

import itertools
import json
import queue
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_RESUMABLE,
    EXIT_RUN_FAILED,
    EXIT_USER_FAULT,
    CrosstuneError,
    RunFailedError,
    StorageError,
    WorkerLostError,
)
from launchers.failure import as_json
from launchers.job import JobFolder, Mark, make_folder
from launchers.ssh.beats import Lapse
from launchers.ssh.connection import Connection, Event
from launchers.supervise import StopSignals

LOOK_SECONDS = 0.2
CANCEL_LOOK_SECONDS = 1.0
"""Between two looks for `JobFolder.cancelled`."""
SETTLE_SECONDS = 5.0
"""From the first machine that ends badly to the word to the others: most end by themselves, and say more then."""
STEP_SECONDS = 5.0
"""From that word, which nobody can answer with a save once ranks are missing, to a second one, and on to SIGKILL."""
EXIT_TERMINATED = 128 + signal.SIGTERM
LAST_LINES = 5
"""Of the output of a machine that ended before it could leave a mark."""


@dataclass
class _Machine:
    """What is known of one machine."""

    connection: Connection
    shared: bool
    """It sees this command's run folder."""
    began: float = field(default_factory=time.time)
    heard: float = field(default_factory=time.monotonic)
    heard_at: float = field(default_factory=time.time)
    mark: Mark | None = None
    code: int | None = None
    """Of its end."""
    step: int = -1
    last: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))

    @property
    def over(self) -> bool:
        return self.code is not None


class Attempt:
    """See the module.

    Args:
        number: of the attempt.
        folder: of the job.
        connections: to agents that are ready.
        answers: what the machines answered, by number.
        inbox: of the connections.
        stops: signals that this command gets.
        silence_seconds: see `SshLauncherConfig`.
        grace_seconds: time that the run has to save.
        show: takes lines of output.
    """

    def __init__(
        self,
        number: int,
        folder: JobFolder,
        connections: Sequence[Connection],
        answers: Mapping[int, Mapping[str, Any]],
        inbox: queue.Queue[Event],
        stops: StopSignals,
        *,
        silence_seconds: float,
        grace_seconds: float,
        show: Callable[[str], None],
    ) -> None:
        self.number, self.folder, self._inbox, self._stops = number, folder, inbox, stops
        self._silence, self._grace, self._show = silence_seconds, grace_seconds, show
        self.machines = {each.node: _Machine(each, bool(answers[each.node]["shared"])) for each in connections}
        self._passed, self._cancelled, self._looked = 0, False, time.monotonic()
        self._plan: deque[tuple[float, str]] = deque()
        """What machines that do not end are still told, and when."""
        self._begin = float("inf")
        """When the first of it is due, or was."""
        self._keeps = True
        """This machine's disk takes marks and logs."""
        self._told_environment = False
        self._width = len(str(len(self.machines) - 1))

    def run(self, start: Callable[[int], dict[str, Any]]) -> int:
        """Starts all machines and follows them to the end of the last.

        Args:
            start: what each agent is told, by number; see `launchers.agent.Agent.start`.

        Returns:
            The worst exit code: 2 before 3 before others before 75 before 0.
        """
        for node, machine in self.machines.items():
            machine.connection.send("start", **start(node))
        lapse = Lapse(2 * LOOK_SECONDS)
        while not all(machine.over for machine in self.machines.values()):
            # All that has come is heard before anybody is found silent.
            with suppress(queue.Empty):
                for wait in (LOOK_SECONDS, *itertools.repeat(0.0, self._inbox.qsize())):
                    connection, frame = self._inbox.get(timeout=wait)
                    machine = self.machines[connection.node]
                    if machine.connection is connection and not machine.over:
                        self._hear(connection.node, machine, frame)
            now = time.monotonic()
            lapsed = lapse(now)
            for machine in self.machines.values():
                machine.heard = min(now, machine.heard + lapsed)
            self._look_around(now)
        code = worst(machine.code for machine in self.machines.values() if machine.code is not None)
        return EXIT_INTERRUPTED if code == EXIT_TERMINATED and signal.SIGINT in self._stops.heard else code

    @property
    def step(self) -> int:
        """The newest checkpoint that a machine told of; -1: none did."""
        return max(machine.step for machine in self.machines.values())

    def _hear(self, node: int, machine: _Machine, frame: dict[str, Any]) -> None:
        machine.heard, machine.heard_at = time.monotonic(), time.time()
        kind = frame["kind"]
        if kind == "line":
            self._on_line(node, machine, frame["text"])
        elif kind == "mark":
            machine.mark = Mark(**frame["mark"])
            if not machine.shared or machine.mark.ended is not None:  # a mark of the begin may be behind the times
                self._keep(self.folder.mark, machine.mark)
            self._compare_environments()
        elif kind == "fault":
            [(where, found, remedy)] = frame["faults"]
            self._ended(node, machine, EXIT_RUN_FAILED, RunFailedError(where, found, remedy=remedy))
        elif kind == "ended":
            machine.step = frame["step"]
            if frame["left"]:
                self._say(node, machine, f"ended what was left behind: {', '.join(frame['left'])}")
            without_mark = machine.mark is None or machine.mark.ended is None
            fault = self._unmarked(machine, frame["code"]) if without_mark and frame["code"] != EXIT_DONE else None
            self._ended(node, machine, frame["code"], fault)
        elif kind == "closed":
            self._lose(node, machine, machine.connection.complaints() or "the connection was closed")

    def _on_line(self, node: int, machine: _Machine, text: str) -> None:
        machine.last.append(text)
        self._show(text if len(self.machines) == 1 else f"{node:{self._width}}: {text}")
        if not machine.shared:  # for `crosstune logs` here
            self._keep(self._write_line, self.folder.output(self.number, node), text)

    def _write_line(self, path: Path, text: str) -> None:
        make_folder(path.parent)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def _keep(self, write: Callable[..., None], *content: object) -> None:
        """Writes into the folder here; a job that runs elsewhere does not end because this disk is full."""
        try:
            write(*content)
        except (OSError, StorageError) as error:
            if self._keeps:
                self._show(f"{self.folder.run_dir} takes no more marks and logs here: {error}")
            self._keeps = False

    def _say(self, node: int, machine: _Machine, text: str) -> None:
        self._show(f"node {node} ({machine.connection.host}): {text}")

    def _unmarked(self, machine: _Machine, code: int) -> CrosstuneError:
        said = "; ".join(line.strip() for line in machine.last if line.strip()) or "without a word"
        return WorkerLostError(machine.connection.host, f"ended with exit code {code}: {said}")

    def _lose(self, node: int, machine: _Machine, why: str) -> None:
        self._say(node, machine, f"lost: {why}")
        remedy = "the machine ends its part by itself; is it up, and the network to it?"
        self._ended(node, machine, EXIT_RUN_FAILED, WorkerLostError(machine.connection.host, why, remedy=remedy))

    def _ended(self, node: int, machine: _Machine, code: int, fault: CrosstuneError | None) -> None:
        """A machine is done with.

        Args:
            node: its number.
            machine: the machine.
            code: exit code of its part.
            fault: what it could not say itself; None: its mark says it.
        """
        own = self._own_mark(node) if fault is not None and machine.shared else None
        if own is not None:  # it told the end of its part itself, though not over the connection
            machine.mark, fault, code = own, None, own.exit_code or EXIT_DONE
        machine.code = code
        machine.connection.close()
        if fault is not None:
            name, ended = machine.connection.host, machine.heard_at
            mark = machine.mark or Mark(node, self.number, name, 0, machine.began, "", ended)
            told = mark.fault or {"rank": None, "time": ended, **as_json(fault)}
            machine.mark = replace(mark, ended=ended, exit_code=code, fault=told)
            self._keep(self.folder.mark, machine.mark)
        if code != EXIT_DONE:
            self._end_others(node, machine, code)

    def _own_mark(self, node: int) -> Mark | None:
        """The mark that a machine left at its end; None: it has not ended, or did not say so."""
        with suppress(OSError, ValueError, TypeError):
            mark = Mark(**json.loads(self.folder.mark_file(self.number, node).read_text(encoding="utf-8")))
            return mark if mark.ended is not None else None
        return None

    def _end_others(self, node: int, machine: _Machine, code: int) -> None:
        """Plans the end of machines that do not end by themselves; a failure hastens what a save has planned."""
        saves = code == EXIT_RESUMABLE or self._cancelled or bool(self._stops.heard)
        begin = time.monotonic() + (self._grace if saves else SETTLE_SECONDS)
        if begin > self._begin or all(machine.over for machine in self.machines.values()):
            return
        if not saves:
            self._say(node, machine, f"ended with exit code {code}: the other machines end, too")
        self._begin = begin
        self._plan = deque([(begin, "stop"), (begin + STEP_SECONDS, "stop"), (begin + 2 * STEP_SECONDS, "kill")])

    def _look_around(self, now: float) -> None:
        running = [(node, machine) for node, machine in self.machines.items() if not machine.over]
        for number in self._stops.heard[self._passed :]:
            self._passed += 1
            for _, machine in running:
                # Means the same to `launchers.node`; Python itself, still at its imports, would leave a traceback.
                asked = signal.SIGTERM if number == signal.SIGINT else number
                machine.connection.send("stop" if self._passed <= 2 else "kill", signal=asked)
        if now - self._looked > CANCEL_LOOK_SECONDS:
            self._looked = now
            if not self._cancelled and self.folder.cancelled:
                self._cancelled = True
                for _, machine in running:
                    machine.connection.send("stop", signal=signal.SIGTERM)
        while self._plan and now > self._plan[0][0]:
            _, word = self._plan.popleft()
            for _, machine in running:
                machine.connection.send(word, signal=signal.SIGTERM)
        for node, machine in running:
            if now - machine.heard > self._silence:
                self._lose(node, machine, f"no sign of it for {now - machine.heard:.0f} s")

    def _compare_environments(self) -> None:
        marks = [machine.mark for machine in self.machines.values() if machine.mark]
        hashes = {mark.environment for mark in marks}
        if len(marks) == len(self.machines) and len(hashes) > 1 and not self._told_environment:
            self._told_environment = True
            told = ", ".join(f"{mark.host} {mark.environment}" for mark in marks)
            why = (
                "a variable of their login shells or of cluster.setup is not the same; `ssh HOST env` shows the former"
            )
            self._show(f"the machines' environments differ ({told}): {why}")


def worst(codes: Iterable[int]) -> int:
    """Of exit codes: 2, which no restart mends, before 3 before those of signals before 75 before 0."""
    order = (EXIT_DONE, EXIT_RESUMABLE)
    last = (EXIT_RUN_FAILED, EXIT_USER_FAULT)

    def badness(code: int) -> int:
        return order.index(code) if code in order else 3 + last.index(code) if code in last else 2

    return max(codes, key=badness)
