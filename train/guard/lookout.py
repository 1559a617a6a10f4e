"""The watch over hangs: when no rank advances, one rank judges who is late, and all end with exit code 3.

One thread a rank (`watch.py`), beside that of the steps, needs neither the device nor the collectives nor a common
file system. In a run that goes well each rank writes one short sign now and then and reads one key. A rank that has not
advanced for a tenth of the time-out begins to look at the others; when none has advanced for all of it, the lowest rank
that is heard of calls for accounts, judges, writes the report, and tells the others to leave.

Not covered: a single process in code that keeps Python's lock; setup and end of a run, before the first step and after
the last (there the collectives' own time-out ends a wait).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from configs.errors import HangError
from train.guard.board import CALL, Board, answer, cell, packed, unpacked
from train.guard.hang_report import hang_error, publish, render
from train.guard.heartbeat import Heartbeat
from train.guard.limits import FIRST_STEP_FACTOR, Limits
from train.guard.sightings import Sightings
from train.guard.verdict import Place, Sign, judge
from train.guard.witness import Account, Member

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Call:
    """A call for accounts that this rank has made."""

    number: int
    until: float
    beats: dict[int, int]
    """Of the ranks that are to answer."""


@dataclass(frozen=True)
class _Leave:
    """When this rank ends itself."""

    at_first: float
    at_last: float
    others: frozenset[int]
    """Ranks whose farewell is waited for between the two."""
    silent: list[int]


class Lookout:
    """The logic of one rank, without thread or store of its own: whoever calls `tick` now and then drives it.

    Args:
        me: this rank.
        members: all, by rank.
        heartbeat: of this rank.
        boards: tables that all ranks share, each with all that is said; none where the rank is alone.
        limits: times.
        first_step: steps done before the command began.
        give_account: looks at this process; None: it could not.
        tell: the error, where this rank speaks for its machine.
        leave: ends the silent ranks of this machine, which cannot do it themselves, and this process.
        folder: of the run, for the report.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        me: Member,
        members: Sequence[Member],
        heartbeat: Heartbeat,
        boards: Sequence[Board],
        limits: Limits,
        *,
        first_step: int,
        give_account: Callable[[], Account | None],
        tell: Callable[[HangError], None],
        leave: Callable[[list[Member]], None],
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me, self.members, self.heartbeat, self.boards, self.limits = me, members, heartbeat, boards, limits
        self.first_step, self.folder, self._clock = first_step, folder, clock
        self._give_account, self._tell, self._leave = give_account, tell, leave
        self.began = time.time()
        now = clock()
        self._ticked = self._changed = now
        self._beats = -1
        self._tick = self._answered = self._number = 0
        self._call: _Call | None = None
        self._account: Account | None = None
        self._posts: dict[str, str] = {}
        self.leaving: _Leave | None = None
        """Set once there is a verdict."""
        self.ended: str | None = None
        """Set when this rank leaves the steps."""
        self.sightings = Sightings([Sign(0, 0, first_step, 0, heartbeat.phase.value, 0, 0)] * len(members), now)

    @property
    def pause(self) -> float:
        """Seconds until the next tick."""
        if self._call is not None or self.leaving is not None:
            return min(self.limits.interval, 0.1)
        # Nearer to a verdict the ranks hear each other sooner.
        return self.limits.interval / (5 if self._clock() - self._changed > self.limits.timeout / 2 else 1)

    def tick(self) -> None:
        """Looks, answers, judges."""
        now = self._clock()
        if now - self._ticked > max(5 * self.limits.interval, self.limits.silence):
            self._start_anew(now)
        self._ticked = now
        self._tick += 1
        self._look(now)
        call = self._newest_call()
        if self.leaving is not None:
            self._farewell(now)
        elif call.get("end"):
            self._obey(call["end"])
        else:
            if call.get("number", 0) > self._answered:
                self._answer(call["number"])
            if self._call is not None:
                self._collect(self._call, now)
            elif self._is_due(now):
                self._call_all(now)
        self._exchange()

    def sign(self, now: float) -> Sign:
        """Of this rank."""
        beat = self.heartbeat
        idle, in_phase = now - self._changed, now - beat.since
        return Sign(self._tick, beat.beats, beat.step, beat.entered, beat.phase.value, idle, in_phase, self.ended)

    def _start_anew(self, now: float) -> None:
        """This process stood still, as on a machine that slept: what it did not see does not count."""
        logger.info("hang watch: this process did not run for %.0f s, watching anew", now - self._ticked)
        self._changed, self._call = now, None
        self.sightings.start_anew(now)

    def _look(self, now: float) -> None:
        if self.heartbeat.beats != self._beats:
            self._beats, self._changed = self.heartbeat.beats, now
        self.sightings.look_at(self._worth_a_look(now), now)
        for board in self.boards:
            for rank in self.sightings.looked_at:
                if found := unpacked(board.read(cell(rank))):
                    self.sightings.see(rank, Sign(**found), now)
        self.sightings.see(self.me.rank, self.sign(now), now)

    def _worth_a_look(self, now: float) -> frozenset[int]:
        """Nobody while this rank advances; rank 0, which would judge; all, where this rank may have to judge."""
        if now - self._changed < self.limits.timeout / 10:
            return frozenset()
        if self.me.rank == 0 or (0 in self.sightings.looked_at and not self._is_heard(0, now)):
            return frozenset(range(len(self.members)))
        return self.sightings.looked_at | {0}

    def _is_heard(self, rank: int, now: float) -> bool:
        if self.sightings.signs[rank].ended is not None:
            return False
        return rank == self.me.rank or self.sightings.silence(rank, now) < self.limits.silence

    def _is_due(self, now: float) -> bool:
        """Whether this rank has to judge, now."""
        first = self.heartbeat.step <= self.first_step + 1
        limit = self.limits.timeout * (FIRST_STEP_FACTOR if first else 1)
        if now - self._changed < limit or any(self._is_heard(rank, now) for rank in range(self.me.rank)):
            return False
        if len(self.sightings.looked_at) < len(self.members):
            return False
        for rank in self.sightings.under_way():
            # Of a silent rank no more is known than its silence, which others have been looking at for a while only.
            heard, silence = self._is_heard(rank, now), self.sightings.silence(rank, now)
            if (self.sightings.idle(rank, now) < limit) if heard else (silence < self.limits.timeout / 2):
                return False
        return True

    def _call_all(self, now: float) -> None:
        """Asks all that are heard of for an account."""
        ranks = [rank for rank in range(len(self.members)) if self._is_heard(rank, now)]
        number = max(self._number, self._answered) + 1
        beats = {rank: self.sightings.signs[rank].beats for rank in ranks}
        self._number, self._call = number, _Call(number, now + self.limits.patience, beats)
        self._posts[CALL] = packed({"number": number})
        self._answer(number)

    def _answer(self, number: int) -> None:
        self._answered, self._account = number, self._give_account()
        if self._account is not None:
            content = {"number": number, "account": self._account.to_json()}
            self._posts[answer(self.me.rank)] = packed(content)

    def _collect(self, call: _Call, now: float) -> None:
        """Waits for the answers; judges, unless a rank has moved meanwhile."""
        answers = self._answers(call)
        if any(answers[rank].beats != call.beats[rank] for rank in answers):
            self._call = None
            return
        if len(answers) < len(call.beats) and now < call.until:
            return
        self._call = None
        places = [self._place(member, answers, call, now) for member in self.members]
        self._pronounce(places, now)

    def _answers(self, call: _Call) -> dict[int, Account]:
        found = {} if self._account is None else {self.me.rank: self._account}
        for rank in call.beats.keys() - {self.me.rank}:
            for board in self.boards:
                content = unpacked(board.read(answer(rank)))
                if content.get("number") == call.number and "account" in content:
                    found[rank] = Account.from_json(content["account"])
        return found

    def _place(self, member: Member, answers: dict[int, Account], call: _Call, now: float) -> Place:
        rank = member.rank
        sign, account = self.sightings.signs[rank], answers.get(rank)
        silent = None
        if account is None and sign.ended is None and rank != self.me.rank:
            silent = max(self.sightings.silence(rank, now), now - call.until + self.limits.patience)
        states = (other.states.get(rank) for other in answers.values())
        state = next((state for state in states if state is not None), None)
        idle = self.sightings.idle(rank, now)
        aged = replace(sign, in_phase=sign.in_phase + self.sightings.silence(rank, now))
        return Place(member, aged, idle, silent, state, account)

    def _pronounce(self, places: list[Place], now: float) -> None:
        """Judges, writes the report, tells everyone."""
        verdict = judge(places)
        seconds = now - self._changed
        text = render(
            verdict, places, seconds=seconds, limit=self.limits.timeout, by=self.me.rank, faults=self._faults(now)
        )
        path = publish(text, self.folder, since=self.began, rank=self.me.rank)
        report = str(path or "standard error") + (f" on {self.me.host}" if len(places) > 1 else "")
        error = hang_error(verdict, places, seconds, report)
        silent = [place.rank for place in places if place.silent is not None]
        live = [place for place in places if place.silent is None and place.sign.ended is None]
        speakers = {place.member.machine: place.rank for place in reversed(live)}
        told = {"where": error.where, "found": error.found, "allowed": error.allowed, "remedy": error.remedy}
        end = {"error": told, "silent": silent, "speakers": list(speakers.values())}
        self._posts[CALL] = packed({"number": self._number, "end": end})
        self._end(end, delay=0.0, others=frozenset(place.rank for place in live) - {self.me.rank})

    def _faults(self, now: float) -> str:
        texts = [f"{board.name}: {board.fault}" for board in self.boards if board.fault]
        for board in self.boards:
            if not board.fault and now - board.answered_at > self.limits.silence:
                texts.append(f"{board.name} has not answered for {now - board.answered_at:.0f} s")
        return "; ".join(texts)

    def _obey(self, end: dict[str, Any]) -> None:
        """Another rank has judged."""
        self._posts[answer(self.me.rank)] = packed({"farewell": True})
        # The first to go may take others of its machine along, or a table: all are to have heard of it by then.
        self._end(end, delay=1 + self.limits.interval / 2, others=frozenset())

    def _end(self, end: dict[str, Any], *, delay: float, others: frozenset[int]) -> None:
        def leave() -> _Leave:
            now = self._clock()
            return _Leave(now + delay, now + self.limits.patience, others, end["silent"])

        self.leaving = leave()
        if self.me.rank in end["speakers"]:
            told = dict(end["error"])
            self._tell(HangError(told.pop("where"), told.pop("found"), **told))
            self.leaving = leave()  # telling may have taken a while

    def _farewell(self, now: float) -> None:
        """Leaves when what had to be said is said: the store may live in this process."""
        assert self.leaving is not None
        talking = [board for board in self.boards if not board.fault]
        heard = {
            rank
            for rank in self.leaving.others
            if any(unpacked(board.read(answer(rank))).get("farewell") for board in talking)
        }
        said = heard == self.leaving.others and all(board.sent for board in talking)
        if now >= self.leaving.at_last or (said and now >= self.leaving.at_first):
            neighbours = [self.members[rank] for rank in self.leaving.silent]
            self._leave([member for member in neighbours if member.machine == self.me.machine])

    def _newest_call(self) -> dict[str, Any]:
        calls = [unpacked(board.read(CALL)) for board in self.boards]
        return max(calls, key=lambda call: (call.get("number", 0), "end" in call), default={})

    def _exchange(self) -> None:
        posts = self._posts | {cell(self.me.rank): packed(asdict(self.sign(self._clock())))}
        wanted = [cell(rank) for rank in self.sightings.looked_at]
        ranks = self._call.beats if self._call else self.leaving.others if self.leaving else ()
        wanted += [answer(rank) for rank in ranks]
        for board in self.boards:
            board.exchange(posts, wanted)
        self._posts = {}

    def say_farewell(self, ended: str) -> None:
        """This rank leaves the steps, in good order or with an error: the others need not wait for its signs."""
        self.ended = ended
        self._tick += 1
        self._exchange()
