"""Asks nodes through processes, such as an ssh each: so many at a time, and none is waited for in vain.

A node says that it is there (`request.HELLO`), and is asked once it is known of every node whether it is: all begin at
the same time then, however few can be called at once. Standard input stays open until a node has answered, since its
end tells the node that nobody listens any more.
"""

from __future__ import annotations

import queue
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from configs.errors import ConfigError, CrosstuneError
from launchers.doctor.nodes.call import Call, Inbox, all_end
from launchers.doctor.nodes.request import HELLO, LINE, Request, report_in
from launchers.kubernetes.signals import EndsBySignal
from launchers.node import raise_file_limit

LOOK_SECONDS = 0.2
NOTE_SECONDS = 15.0
"""Between two lines for the user who waits."""
LEAVE_SECONDS = 2.0
"""For a process to end by itself once nobody listens any more."""
END_SECONDS = 5.0
"""For one that was told to."""
NAMED = 6
"""Nodes that such a line names; the others are counted."""

Heard = tuple[int, "Sequence[str] | CrosstuneError"]
"""A node's number, and the lines that it printed, or why there is no report."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended before a node has reported."""

    code: int
    out: Sequence[str]
    """What the node printed on standard output."""
    complaints: str
    """What the process printed on standard error."""
    tries: int
    """With this one."""


class Asker(ABC):
    """Knows the processes through which nodes are asked, and what it means how they end."""

    first_seconds: float
    """From the start of a process to the first sign of each of its nodes."""
    parallel = sys.maxsize
    """Processes that wait for a first sign at the same time."""

    @abstractmethod
    def commands(self, nodes: int, seconds: float) -> Mapping[tuple[int, ...], Sequence[str]]:
        """By the nodes that each asks, all of which get its standard input.

        Args:
            nodes: machines.
            seconds: that a node may take to answer.
        """

    @abstractmethod
    def fault(self, node: int, ended: Ended) -> CrosstuneError:
        """Why a node has given no report."""

    @abstractmethod
    def called(self, node: int) -> str:
        """A node's name for the user."""

    def whose(self, nodes: Sequence[int], line: str) -> tuple[int, str] | None:
        """Of a line that a process printed, the node and its text; None: no node's."""
        return nodes[0], line

    def again(self, ended: Ended) -> float | None:
        """After how many seconds a process that ended so, before a first sign, is tried again; None: it is not."""
        return None

    def run_on_each(self, requests: Sequence[Request], seconds: float) -> Generator[Heard, None, None]:
        """See `launchers.doctor.nodes.carry.AsksNodes`; the seconds are those after a node was asked."""
        yield from Conversation(self, requests, seconds).run()


@dataclass
class Conversation:
    """See the module.

    Args:
        asker: whose nodes are asked.
        requests: by node number.
        seconds: after the question in which a node must have answered.
    """

    asker: Asker
    requests: Sequence[Request]
    seconds: float
    present: set[int] = field(default_factory=set)
    """Nodes that have given a sign."""
    over: set[int] = field(default_factory=set)
    """Nodes that have answered, or will not."""
    last: float | None = None
    """When all must have answered; None before they are asked."""

    def run(self) -> Generator[Heard, None, None]:
        """One answer per node, as they come."""
        asked = self.asker.commands(len(self.requests), self.seconds)
        self.calls = [Call(nodes, command) for nodes, command in asked.items()]
        self.waiting = deque(self.calls)
        self.lines: dict[int, list[str]] = {request.node: [] for request in self.requests}
        self.inbox: Inbox = queue.Queue()
        self.noted = time.monotonic()
        raise_file_limit()  # three files for each process
        with EndsBySignal() as signals:
            try:
                while len(self.over) < len(self.requests):
                    for node, heard in self._step():
                        self.over.add(node)
                        yield node, heard
            finally:
                signals.clearing()
                self._close()

    def _step(self) -> Iterator[Heard]:
        yield from self._start()
        with suppress(queue.Empty):
            wait = LOOK_SECONDS
            while True:
                call, process, line = self.inbox.get(timeout=wait)
                wait = 0.0
                if call.process is process:
                    yield from self._hear(call, line)
        yield from self._give_up()
        if self.last is None and len(self.present | self.over) == len(self.requests):
            self._ask()
        self._note()

    def _start(self) -> Iterator[Heard]:
        """Starts what may be started now."""
        knocking = [call for call in self.calls if call.process and not self._known(call)]
        free, now = self.asker.parallel - len(knocking), time.monotonic()
        for _ in range(len(self.waiting)):
            call = self.waiting.popleft()
            if free <= 0 or now < call.due:
                self.waiting.append(call)
                continue
            free -= 1
            call.late = now + self.asker.first_seconds
            try:
                call.start(self.inbox)
            except OSError as error:
                found = f"'{call.command[0]}' cannot be run here: {error.strerror}"
                why = ConfigError("launcher", found, remedy="doctor where the jobs are launched from")
                yield from ((node, why) for node in call.nodes)

    def _known(self, call: Call) -> bool:
        return all(node in self.present or node in self.over for node in call.nodes)

    def _hear(self, call: Call, line: str | None) -> Iterator[Heard]:
        """A line of a process, or its end."""
        if line is None:
            yield from self._hear_end(call)
        elif (found := self.asker.whose(call.nodes, line)) and found[0] in call.nodes and found[0] not in self.over:
            node, text = found
            self.lines[node].append(text)
            if HELLO in text:
                self.present.add(node)
            elif LINE.search(text) and report_in(self.lines[node]) is not None:
                yield node, self.lines[node]

    def _hear_end(self, call: Call) -> Iterator[Heard]:
        assert call.process is not None
        left = [node for node in call.nodes if node not in self.over]
        code, complaints = call.process.returncode, call.said()
        ends = {node: Ended(code, self.lines[node], complaints, call.tries) for node in left}
        if left and not self.present & set(left) and (pause := self.asker.again(ends[left[0]])) is not None:
            call.process, call.due = None, time.monotonic() + pause
            self.waiting.append(call)
        else:
            yield from ((node, self.asker.fault(node, ended)) for node, ended in ends.items())

    def _give_up(self) -> Iterator[Heard]:
        """Nodes that give no sign, or no answer, in their time."""
        now = time.monotonic()
        for call in self.calls:
            left = [node for node in call.nodes if node not in self.over]
            if call.process and now > call.late:
                silent = [node for node in left if node not in self.present]
                yield from ((node, self._without_sign(node, call)) for node in silent)
            if self.last is not None and now > self.last:
                found = f"nothing came within {self.seconds:.0f} s"
                yield from ((n, CrosstuneError(self.asker.called(n), found)) for n in left if n not in self.over)
            if left and self.over.issuperset(call.nodes):
                call.end()

    def _without_sign(self, node: int, call: Call) -> CrosstuneError:
        said = [line for line in (*call.said().splitlines(), *self.lines[node]) if line.strip()]
        last = f"; it said last: {said[-1][:200]}" if said else ""
        return CrosstuneError(
            self.asker.called(node),
            f"no sign within {self.asker.first_seconds:.0f} s{last}",
            remedy="does a login there come to an end, and the setup? A dead file system holds them up",
        )

    def _ask(self) -> None:
        """Puts the question to all who are there."""
        self.last, now = time.monotonic() + self.seconds, time.time()
        for call in self.calls:
            if any(node in self.present and node not in self.over for node in call.nodes):
                call.say(replace(self.requests[call.nodes[0]], asked_at=now).to_json() + "\n")

    def _note(self) -> None:
        """Tells from time to time who is waited for."""
        if time.monotonic() - self.noted < NOTE_SECONDS:
            return
        self.noted = time.monotonic()
        left = [each.node for each in self.requests if each.node not in self.over]
        absent = [node for node in left if node not in self.present]
        for nodes, what in ((absent, "no sign yet of"), ([] if absent else left, "still at work:")):
            if nodes:
                names = ", ".join(self.asker.called(node) for node in nodes[:NAMED])
                more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
                count = f"{len(nodes)} of {len(self.requests)} nodes"
                print(f"doctor nodes: {what} {names}{more} ({count})", file=sys.stderr, flush=True)

    def _close(self) -> None:
        """Ends all processes: by the end of what they read, which nodes hear, too; srun's tasks hear nothing else."""
        for call in self.calls:
            call.hush()
        running = [call.process for call in self.calls if call.process is not None]
        if not all_end(running, LEAVE_SECONDS):
            for process in running:
                process.terminate()
            if not all_end(running, END_SECONDS):
                for process in running:
                    process.kill()
