"""The watch over hangs without processes: a clock that the test turns, a table in memory, and places as they may be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import HangError
from train.guard import hang_report
from train.guard.heartbeat import Heartbeat, Phase
from train.guard.limits import Limits, collective_seconds
from train.guard.lookout import Lookout
from train.guard.sightings import Sightings
from train.guard.verdict import Place, Sign, Verdict, judge, spoken
from train.guard.witness import Account, Member, Waits, give_account

TIMEOUT = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Table:
    """A board that answers at once, or never."""

    name, fault = "table", None

    def __init__(self, clock: Clock, values: dict[str, str]) -> None:
        self.clock, self.values, self.reachable = clock, values, True
        self.answered_at = clock()
        self.sent = True
        self.seen: dict[str, bytes] = {}
        self.reads = 0

    def exchange(self, posts: dict[str, str], wanted: Iterable[str]) -> None:
        if not self.reachable:
            return
        self.values.update(posts)
        wanted = list(wanted)
        self.reads += len(wanted)
        self.seen.update({key: self.values.get(key, "").encode() for key in [*wanted, "call"]})
        self.answered_at = self.clock()

    def read(self, key: str) -> bytes:
        return self.seen.get(key, b"")


class Team:
    """Ranks of one machine that share two tables."""

    def __init__(self, size: int, folder: Path) -> None:
        self.clock, self.folder = Clock(), folder
        values: list[dict[str, str]] = [{}, {}]
        self.members = [Member(rank, "host", "host 1", 100 + rank, 0.0) for rank in range(size)]
        self.hearts = [Heartbeat(self.clock) for _ in self.members]
        self.tables = [[Table(self.clock, each) for each in values] if size > 1 else [] for _ in self.members]
        self.told: dict[int, HangError] = {}
        self.left: dict[int, list[int]] = {}
        """Ranks that ended themselves, and the silent ones that each of them killed."""
        self.stopped: set[int] = set()
        self.waits = [Waits.yes] * size
        self.on_account: Callable[[int], None] = lambda rank: None
        self.lookouts = [self._lookout(member) for member in self.members]

    def _lookout(self, me: Member) -> Lookout:
        rank = me.rank

        def account() -> Account:
            beats = self.hearts[rank].beats
            self.on_account(rank)
            states = {other: "stopped" if other in self.stopped else "sleeping" for other in range(len(self.members))}
            return Account(beats, self.waits[rank], "here", [self.hearts[rank].step], states, "stack")

        return Lookout(
            me,
            self.members,
            self.hearts[rank],
            self.tables[rank],  # type: ignore[arg-type]
            Limits.of(TIMEOUT),
            first_step=0,
            give_account=account,
            tell=lambda error: self.told.update({rank: error}),
            leave=lambda silent: self.left.update({rank: [member.rank for member in silent]}),
            folder=self.folder,
            clock=self.clock,
        )

    def step(self, number: int, phase: Phase = Phase.collective) -> None:
        """All ranks come to a step."""
        for heart in self.hearts:
            heart.enter(phase, number)

    def let_pass(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> float:
        """Time goes by; returns how much of it until the first verdict."""
        begun = self.clock.now
        while self.clock.now < begun + seconds:
            self.clock.now += 0.5
            meanwhile()
            for lookout in self.lookouts:
                rank = lookout.me.rank
                if rank not in self.stopped and rank not in self.left:
                    lookout.tick()
            if self.told:
                break
        until = self.clock.now - begun
        for _ in range(40 if self.told else 0):  # all hear of it
            self.clock.now += 0.5
            for lookout in self.lookouts:
                if lookout.me.rank not in self.stopped | self.left.keys():
                    lookout.tick()
        return until


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_stopped_rank_is_named_and_ended_by_the_others(late: int, tmp_path: Path) -> None:
    team = Team(4, tmp_path)
    team.step(5)
    team.stopped = {late}
    after = team.let_pass(3 * TIMEOUT)
    live = {0, 1, 2, 3} - {late}
    assert TIMEOUT <= after <= 1.2 * TIMEOUT
    assert list(team.told) == [min(live)], "one rank speaks for the machine"
    assert f"rank {late} (host): late" in team.told[min(live)].render()
    assert team.left == {rank: [late] for rank in live}
    assert (tmp_path / "hang_report.txt").read_text().startswith(f"LATE: rank {late}\n")


def test_the_rank_at_work_is_named(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    team.step(5)
    team.hearts[2].enter(Phase.data, 5)
    team.waits[2] = Waits.no
    assert TIMEOUT <= team.let_pass(2 * TIMEOUT) <= 1.1 * TIMEOUT
    assert team.told[0].where == "rank 2 (host)"
    assert team.left == {0: [], 1: [], 2: []}


def test_no_verdict_while_anything_advances(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    team.step(5)
    team.let_pass(5 * TIMEOUT, meanwhile=team.hearts[1].beat)  # a writer, or a long validation
    assert not team.told
    team.on_account = lambda rank: team.hearts[2].beat()  # just when the question was asked
    team.let_pass(1.5 * TIMEOUT)
    assert not team.told


def test_a_rank_that_advanced_until_it_fell_silent_is_given_time(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    team.step(5)
    team.let_pass(2 * TIMEOUT, meanwhile=team.hearts[2].beat)
    team.stopped = {2}
    assert TIMEOUT / 2 <= team.let_pass(3 * TIMEOUT) <= TIMEOUT
    assert team.told[0].where == "rank 2 (host)"


def test_the_first_step_may_take_longer(tmp_path: Path) -> None:
    team = Team(2, tmp_path)
    team.step(1)
    assert team.let_pass(5 * TIMEOUT) >= 3 * TIMEOUT


def test_time_in_which_nothing_ran_does_not_count(tmp_path: Path) -> None:
    team = Team(2, tmp_path)
    team.step(5)
    team.let_pass(0.8 * TIMEOUT)
    team.clock.now += 10 * TIMEOUT  # the machine slept
    assert team.let_pass(3 * TIMEOUT) >= 0.9 * TIMEOUT


def test_a_rank_without_a_table_ends_by_itself_and_blames_nobody(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    team.step(5)
    for table in team.tables[2]:
        table.reachable = False
    team.stopped = {0, 1}  # as it seems from there
    team.lookouts[2]._give_account = lambda: Account(1, Waits.yes, "here", None, {2: "sleeping"}, "stack")
    assert TIMEOUT <= team.let_pass(3 * TIMEOUT) <= 1.3 * TIMEOUT
    message = team.told[2].render()
    assert "ranks 0, 1 (host): late, cannot tell between them: not heard of" in message
    assert "the network" in message
    assert "table has not answered" in (tmp_path / "hang_report.txt").read_text()


def test_one_table_is_enough(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    team.step(5)
    for tables in team.tables:
        tables[0].reachable = False
    team.stopped = {0}
    team.let_pass(3 * TIMEOUT)
    assert team.told[1].where == "rank 0 (host)"
    assert team.left == {1: [0], 2: [0]}


def test_a_rank_that_left_in_order_is_not_waited_for(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    team.step(5)
    team.lookouts[0].say_farewell("done")
    team.stopped = {0}
    team.waits[2] = Waits.no
    team.let_pass(3 * TIMEOUT)
    assert team.told[1].where == "rank 2 (host)"


def test_alone(tmp_path: Path) -> None:
    team = Team(1, tmp_path)
    team.step(5, Phase.data)
    team.waits[0] = Waits.no
    assert TIMEOUT <= team.let_pass(3 * TIMEOUT) <= 1.1 * TIMEOUT
    assert "in phase data of step 5" in team.told[0].found
    assert team.left == {0: []}


def test_a_run_that_goes_well_reads_nothing_of_the_others(tmp_path: Path) -> None:
    team = Team(3, tmp_path)
    for number in range(2, 20):
        team.step(number)
        team.let_pass(TIMEOUT / 12)
    assert not any(table.reads for tables in team.tables for table in tables)


def test_silence_counts_from_when_one_began_to_look() -> None:
    sign = Sign(1, 5, 3, 2, "data", 4.0, 4.0)
    sightings = Sightings([sign, sign], now=0)
    sightings.look_at(frozenset({1}), now=100)
    assert (sightings.silence(1, 105), sightings.idle(1, 105)) == (5, 9)
    sightings.see(1, sign, now=106)  # no newer one
    assert sightings.silence(1, 110) == 10
    sightings.see(1, replace(sign, tick=2), now=111)
    assert sightings.silence(1, 112) == 1
    sightings.look_at(frozenset(), now=120)
    sightings.look_at(frozenset({1}), now=200)
    assert sightings.silence(1, 203) == 3


def place(
    rank: int,
    waits: Waits = Waits.yes,
    *,
    step: int = 7,
    entered: int = 4,
    counts: list[int] | None = None,
    silent: float | None = None,
    state: str | None = "sleeping",
    ended: str | None = None,
    doing: str = "all_reduce",
) -> Place:
    sign = Sign(9, 50, step, entered, "backward", 60.0, 61.0, ended)
    heard = None if silent is not None or ended else Account(50, waits, doing, counts or [30], {}, "")
    return Place(Member(rank, f"host{rank // 2}", "m", rank, 0.0), sign, 60.0, silent, state, heard)


NO, MAYBE, YES = Waits.no, Waits.maybe, Waits.yes
VERDICTS: dict[str, tuple[list[Place], tuple[int, ...], bool, str]] = {
    "at work": ([place(0), place(1, NO, entered=1), place(2)], (1,), True, "ranks 0, 2 wait in"),
    "two at work": ([place(0), place(1, NO), place(2, NO)], (1, 2), False, "rank 0 waits in"),
    "stopped before at work": ([place(0), place(1, NO), place(2, silent=9, state="stopped")], (2,), True, "stopped"),
    "gone, another mute": (
        [place(0), place(1, silent=9, state="gone"), place(2, silent=9)],
        (1,),
        True,
        "rank 2 are not heard of either",
    ),
    "machine lost": ([place(0), place(1), place(2, silent=70, state=None)], (2,), True, "host1"),
    "cut off": ([place(0), place(1, silent=70, state=None), place(2, silent=70, state=None)], (1, 2), False, "network"),
    "keeps the lock": ([place(0), place(1, silent=70, state="running")], (1,), True, "Python's lock"),
    "left with an error": ([place(0), place(1, ended="ValueError: no")], (1,), True, "ValueError: no"),
    "left, another at work": ([place(0, NO), place(1, ended="ValueError: no")], (0, 1), False, "at work: rank 0"),
    "earlier collective": ([place(0, counts=[31]), place(1), place(2, counts=[31])], (1,), True, "earlier collective"),
    "earlier step": ([place(0, step=8), place(1), place(2, step=8)], (1,), True, "earlier collective"),
    "same collective": ([place(0), place(1), place(2)], (), False, "all ranks wait in the same collective"),
    "other collective": (
        [place(0), place(1, counts=[29, 1], doing="broadcast"), place(2)],
        (),
        False,
        "different collectives",
    ),
    "behind, device hides": ([place(0, MAYBE), place(1, MAYBE, entered=3), place(2, MAYBE)], (1,), True, "rank"),
    "level, device hides": ([place(0, MAYBE), place(1, MAYBE), place(2, MAYBE)], (), False, "at the same place"),
    "data, device hides": ([place(0, MAYBE), place(1, NO, entered=1), place(2, MAYBE)], (1,), True, "rank"),
    "ahead, device hides": ([place(0, MAYBE), place(1, NO, entered=6)], (0, 1), False, "phase backward"),
    "waits in an earlier step": ([place(0, NO, step=8), place(1), place(2, step=8)], (0, 1), False, "rank 2 waits"),
    "done is no rank": ([place(0, ended="done"), place(1), place(2, NO)], (2,), True, "rank 1 waits"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdict(name: str) -> None:
    places, late, certain, says = VERDICTS[name]
    verdict = judge(places)
    assert (verdict.late, verdict.certain) == (late, certain), verdict.text
    assert says in verdict.text
    message = hang_report.hang_error(verdict, places, 60, "REPORT").render()
    assert ("cannot tell" in message or "nothing shows" in message) == (not certain), message


def test_ranks_in_words() -> None:
    assert spoken([3]) == "rank 3"
    assert spoken([5, 0, 2, 3, 4, 7, 8]) == "ranks 0, 2-5, 7, 8"


def seen_from_outside(act: Callable[[threading.Event], None], phase: Phase, *, asynchronous: bool) -> Account:
    """What a watch says of this thread while it is in `act`, which returns when the event is set."""
    over, found = threading.Event(), []

    def look() -> None:
        time.sleep(0.2)
        found.append(give_account(3, phase, [], asynchronous=asynchronous, background=None))
        over.set()

    thread = threading.Thread(target=look)
    thread.start()
    act(over)
    thread.join()
    return found[0]


def a_collective(name: str) -> Callable[[threading.Event], None]:
    """Python code that lies where torch's collectives do."""
    names: dict[str, Callable[[threading.Event], None]] = {}
    code = f"def {name}(event):\n    while not event.is_set():\n        sum(range(1000))\n"
    exec(compile(code, "/x/torch/distributed/distributed_c10d.py", "exec"), names)
    return names[name]


def in_a_writer(act: Callable[[threading.Event], None]) -> Callable[[threading.Event], None]:
    def waits_for_it(event: threading.Event) -> None:
        writer = threading.Thread(target=act, args=(event,))
        writer.start()
        writer.join()

    return waits_for_it


def test_what_a_rank_waits_for_is_read_from_its_frames() -> None:
    def busy(event: threading.Event) -> None:
        while not event.is_set():
            sum(range(1000))

    def awaits_work(event: threading.Event) -> None:
        time.sleep(0)
        all_reduce_under_way = type("Work", (), {"wait": staticmethod(a_wait_in_c(event))})
        all_reduce_under_way.wait()

    waiting = seen_from_outside(a_collective("all_reduce"), Phase.collective, asynchronous=False)
    assert (waiting.waits, waiting.doing.split()[0]) == (Waits.yes, "all_reduce")
    assert seen_from_outside(busy, Phase.data, asynchronous=False).waits is Waits.no
    assert seen_from_outside(busy, Phase.optimizer, asynchronous=True).waits is Waits.maybe
    assert seen_from_outside(busy, Phase.data, asynchronous=True).waits is Waits.no
    assert seen_from_outside(awaits_work, Phase.backward, asynchronous=False).waits is Waits.yes
    writer = seen_from_outside(in_a_writer(a_collective("barrier")), Phase.save, asynchronous=False)
    assert (writer.waits, writer.doing) == (Waits.yes, "barrier")
    writer = seen_from_outside(in_a_writer(busy), Phase.save, asynchronous=False)
    assert writer.waits is Waits.no
    assert "(busy)" in writer.doing
    assert "in_a_writer" in writer.stacks and "thread MainThread" in writer.stacks


def a_wait_in_c(event: threading.Event) -> Callable[[], object]:
    """A call that has no Python frame while it waits, and returns when the event is set."""
    lock = threading.Lock()
    lock.acquire()

    def release() -> None:
        event.wait()
        lock.release()

    threading.Thread(target=release).start()
    return lock.acquire


def test_a_report_on_a_disk_that_hangs_goes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang_report, "WRITE_SECONDS", 0.2)
    monkeypatch.setattr(hang_report, "_write", lambda *arguments: time.sleep(5))
    monkeypatch.setattr(hang_report.tempfile, "tempdir", str(tmp_path))
    path = hang_report.publish("text", tmp_path / "run", since=0, rank=0)
    assert path is not None and path.parent == tmp_path
    assert path.read_text() == "text"


def test_a_report_of_the_same_attempt_stays(tmp_path: Path) -> None:
    old = hang_report.publish("an earlier attempt", tmp_path, since=0, rank=0)
    first = hang_report.publish("first", tmp_path, since=time.time() + 60, rank=1)
    second = hang_report.publish("second", tmp_path, since=time.time() - 60, rank=2)
    assert old == first == tmp_path / "hang_report.txt"
    assert (first.read_text(), second and second.read_text()) == ("first", "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hang_report-rank2.txt", "hang_report.txt"]


@pytest.mark.parametrize("timeout", [1, 600, 7200])
def test_collectives_outlast_any_verdict(timeout: float) -> None:
    limits = Limits.of(timeout)
    assert limits.interval < limits.silence
    assert collective_seconds(timeout) > 3 * timeout + limits.patience + 2 * limits.silence


def test_a_step_begins_its_count_of_phases_anew() -> None:
    heart = Heartbeat()
    heart.enter(Phase.data, 3)
    heart.enter(Phase.forward)
    assert (heart.step, heart.entered, heart.beats) == (3, 2, 2)
    heart.enter(Phase.data, 4)
    assert (heart.step, heart.entered, heart.beats) == (4, 1, 3)


def test_a_verdict_over_one_rank_says_what_it_does() -> None:
    verdict = judge([place(0, NO, doing="sleep")])
    assert verdict == Verdict((0,), True, "in phase backward of step 7 for 61 s, at sleep")
