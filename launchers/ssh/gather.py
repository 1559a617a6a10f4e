"""Connects to all machines of a job at the same time, and has each look whether it can take part."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from configs.errors import ConfigError, CrosstuneError, ErrorGroup, first_line
from configs.schema.launcher_ssh import SshLauncherConfig
from launchers import agent
from launchers.ssh.beats import Lapse
from launchers.ssh.connection import OVERLOADED, Connection, Event, Unreachable, ssh_fault
from launchers.ssh.probe import installed
from launchers.supervise import StopSignals

LOOK_SECONDS = 0.2
LOGIN_SECONDS = 30
"""On top of the time to connect: a login shell may be slow, and a key exchange on a busy machine."""
CHECK_SECONDS = agent.PROBE_SECONDS + 30
TRIES, PAUSE_SECONDS = 4, 1.5
"""For a machine, or a jump host, that has too many connections just beginning."""
NAMED = 3
"""Machines with the same fault that a message names; the others are counted."""


@dataclass
class _Place:
    """How far one machine has come."""

    node: int
    host: str
    tries: int = 0
    due: float = 0.0
    """When to try."""
    connection: Connection | None = None
    deadline: float = float("inf")
    heard: bool = False
    """Its agent has spoken."""
    answer: dict[str, Any] | None = None
    """What it said once it was ready."""
    faults: list[CrosstuneError] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        return self.answer is not None or bool(self.faults)

    @property
    def knocks(self) -> bool:
        return self.connection is not None and not self.heard and not self.settled


@dataclass
class Gathered:
    """Machines that wait for the word to start, or the reasons why they do not."""

    connections: list[Connection]
    answers: dict[int, dict[str, Any]]
    """By machine: ``installed``, ``shared``, ``step``."""
    faults: dict[int, list[CrosstuneError]]

    def close(self) -> None:
        """Sends all away."""
        for connection in self.connections:
            connection.close()


class Gathering:
    """Connects to machines and has them look.

    Args:
        hosts: names of the machines by number.
        connect: opens a connection to one of them.
        check: what an agent gets to look at, by number; see `launchers.agent.Agent.check`.
        inbox: of the connections.
        stops: signals; one ends the gathering.
        cfg: of the launcher.
        note: takes lines for the user.
    """

    def __init__(
        self,
        hosts: Mapping[int, str],
        connect: Callable[[int, str], Connection],
        check: Callable[[int], dict[str, Any]],
        inbox: queue.Queue[Event],
        stops: StopSignals,
        cfg: SshLauncherConfig,
        note: Callable[[str], None],
    ) -> None:
        self._connect, self._check, self._inbox, self._stops = connect, check, inbox, stops
        self._cfg, self._note = cfg, note
        self._places = {node: _Place(node, host) for node, host in hosts.items()}
        self._waiting = deque(self._places.values())

    def run(self) -> Gathered:
        """All machines ready, or what is wrong with those that are not."""
        places, lapse = self._places.values(), Lapse(2 * LOOK_SECONDS)
        while not all(place.settled for place in places) and not self._stops.heard:
            self._knock()
            try:
                connection, frame = self._inbox.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                pass
            else:
                place = self._places.get(connection.node)
                if place and place.connection is connection and not place.settled:
                    self._hear(place, connection, frame)
            self._expire(now := time.monotonic(), lapse(now))
        answers = {place.node: place.answer for place in places if place.answer}
        faults = {place.node: place.faults for place in places if place.faults}
        return Gathered([place.connection for place in places if place.connection], answers, faults)

    def _knock(self) -> None:
        now = time.monotonic()
        free = self._cfg.parallel - sum(place.knocks for place in self._places.values())
        for _ in range(len(self._waiting)):
            place = self._waiting.popleft()
            if free > 0 and now >= place.due:
                free -= 1
                place.tries, place.deadline = place.tries + 1, now + self._cfg.connect_seconds + LOGIN_SECONDS
                place.connection = self._connect(place.node, place.host)
            else:
                self._waiting.append(place)

    def _expire(self, now: float, lapsed: float) -> None:
        for place in self._places.values():
            place.deadline += lapsed
            if not place.settled and place.connection and now > place.deadline:
                found = "its agent does not come to an end of its checks" if place.heard else "does not answer"
                place.faults.append(Unreachable(place.host, found))

    def _hear(self, place: _Place, connection: Connection, frame: dict[str, Any]) -> None:
        kind, now = frame["kind"], time.monotonic()
        if kind == "hello":
            place.heard, place.deadline = True, now + CHECK_SECONDS
            connection.send("check", **self._check(place.node))
        elif kind == "note":
            self._note(f"{place.host} {frame['text']}")
            place.deadline += self._check(place.node)["grace"] + agent.MARGIN_SECONDS + agent.END_SECONDS
        elif kind == "ready":
            place.answer = frame
        elif kind == "fault":
            for where, found, remedy in frame["faults"]:
                place.faults.append(ConfigError(place.host, f"{where}: {found}", remedy=remedy))
        elif kind == "closed":
            self._on_closed(place, frame["code"], connection.complaints())

    def _on_closed(self, place: _Place, code: int, complaints: str) -> None:
        assert place.connection is not None
        if place.heard:
            place.faults.append(Unreachable(place.host, f"its agent ended: {first_line(complaints) or 'no message'}"))
            return
        fault = ssh_fault(place.host, code, complaints)
        if place.tries < TRIES and isinstance(fault, Unreachable) and OVERLOADED.search(complaints):
            place.connection.close()
            place.connection, place.due = None, time.monotonic() + PAUSE_SECONDS * place.tries
            self._waiting.append(place)
        else:
            place.faults.append(fault)


def version_faults(gathered: Gathered, hosts: Mapping[int, str], python: str) -> dict[int, list[CrosstuneError]]:
    """Machines whose crosstune is not this one: ranks of different code would compute different things."""
    ours, faults = installed(), dict[int, list[CrosstuneError]]()
    for node, answer in gathered.answers.items():
        theirs = answer["installed"]
        if not theirs["sources"]:
            found, remedy = f"crosstune is not installed for '{python}'", "install it there, or python=PATH"
        elif theirs["sources"] != ours["sources"]:
            found = f"crosstune {_named(theirs)}, but here {_named(ours)}"
            remedy = "install the same crosstune on all machines"
        else:
            continue
        faults[node] = [ConfigError(hosts[node], found, remedy=remedy)]
    return faults


def _named(found: Mapping[str, object]) -> str:
    return f"{found['version'] or 'of a checkout'} (sources {found['sources']})"


def in_one(faults: Mapping[int, Sequence[CrosstuneError]]) -> CrosstuneError:
    """All faults as one error, those that several machines share told once."""
    alike: dict[tuple[str, str | None], list[CrosstuneError]] = {}
    for each in (fault for node in sorted(faults) for fault in faults[node]):
        alike.setdefault((each.found, each.remedy), []).append(each)
    errors = []
    for same in alike.values():
        more = f" and {len(same) - NAMED} more" if len(same) > NAMED else ""
        where = ", ".join(fault.where for fault in same[:NAMED]) + more
        errors.append(type(same[0])(where, same[0].found, remedy=same[0].remedy))
    return errors[0] if len(errors) == 1 else ErrorGroup(errors)
