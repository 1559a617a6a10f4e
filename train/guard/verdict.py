"""Who is late when no rank advances? Pure: from what was seen of the ranks to one sentence.

In this order: a rank whose process is stopped, dead or gone; one that is not heard of; one that left with an error; one
that is at work while others wait for it; one that waits in an earlier collective than the others. Where that leaves
several ranks, all are named and the verdict says that it cannot tell between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from train.guard.witness import Account, Member, Waits

STOPPED = "stopped"
LOST = (STOPPED, "dead", "gone")
"""States of a process that will not advance again by itself."""
DONE = "done"


@dataclass(frozen=True)
class Sign:
    """What a rank says of itself, again and again."""

    tick: int
    """Counts the signs: a rank whose ticks stand still is not heard of. 0: none was seen."""
    beats: int
    step: int
    entered: int
    """Phases begun in the step."""
    phase: str
    idle: float
    """Seconds since the beats last changed."""
    in_phase: float
    """Seconds."""
    ended: str | None = None
    """``done``, or the error with which it left the steps."""


@dataclass(frozen=True)
class Place:
    """All that is known of a rank at the time of the verdict."""

    member: Member
    sign: Sign
    """Its last."""
    idle: float
    """Seconds for which it has not advanced, at the least."""
    silent: float | None
    """Seconds for which it has not been heard of; None where it answers."""
    state: str | None
    """Of its process; None where nobody on its machine answers."""
    account: Account | None

    @property
    def rank(self) -> int:
        """Its rank."""
        return self.member.rank


@dataclass(frozen=True)
class Verdict:
    """The late ranks, and why."""

    late: tuple[int, ...]
    """Empty where nothing tells one rank from another."""
    certain: bool
    """Each of `late` is; else one of them, or what lies between them."""
    text: str


def judge(places: Sequence[Place]) -> Verdict:
    """The verdict over ranks none of which advances.

    Args:
        places: of all ranks, by rank.
    """
    here = [place for place in places if place.sign.ended != DONE]
    if len(places) == 1:
        return _named(here, f"{_at(here[0])}, {_doing(here[0])}")
    if silent := [place for place in here if place.silent is not None]:
        return _of_silent(silent, here)
    left = [place for place in here if place.sign.ended is not None]
    at_work = [place for place in here if place.sign.ended is None and _waits(place) is not Waits.yes]
    if left:
        return _of_left(left, at_work)
    if at_work:
        return _of_working(at_work, here)
    return _of_waiting(here)


def spoken(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0, 2-5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [part for run in runs for part in (map(str, run) if len(run) < 3 else [f"{run[0]}-{run[-1]}"])]
    alone = len(runs) == 1 and len(runs[0]) == 1
    return f"rank {parts[0]}" if alone else f"ranks {', '.join(parts)}"


def _of_silent(silent: list[Place], here: list[Place]) -> Verdict:
    """Not heard of: what its machine says of the process decides, and where it says nothing, that."""
    if lost := [place for place in silent if place.state in LOST]:
        rest = [place for place in silent if place not in lost]
        text = "; ".join((f"rank {p.rank}: " if len(lost) > 1 else "") + _lost(p) for p in lost)
        return _named(lost, text + (f"; {_ranks(rest)} are not heard of either" if rest else ""))
    seconds = min(place.silent or 0 for place in silent)
    hosts = ", ".join(sorted({place.member.host for place in silent}))
    if all(place.state is None for place in silent):
        whose = "its process, its machine" if len(silent) == 1 else "their processes, their machines"
        text = f"not heard of for {seconds:.0f} s: {whose} ({hosts}) or the network to there{_before(silent[0])}"
        # Who hears nobody else may itself be the one that is cut off.
        return Verdict(_numbers(silent), len(silent) == 1 or len(silent) < len(here) - 1, text)
    state = ", ".join(sorted({place.state or "not known" for place in silent}))
    text = (
        f"not heard of for {seconds:.0f} s though the process is there ({state}): "
        f"code that keeps Python's lock{_before(silent[0])}"
    )
    return _named(silent, text)


def _of_left(left: list[Place], at_work: list[Place]) -> Verdict:
    text = "; ".join(f"left {_at(place)} with {place.sign.ended}" for place in left)
    if at_work:
        return _cannot_tell([*left, *at_work], f"{text}; at work: {_ranks(at_work)}, {_plain(at_work)}")
    return _named(left, text)


def _of_working(at_work: list[Place], here: list[Place]) -> Verdict:
    """Some do not wait for others, as far as can be seen."""
    surely = [place for place in at_work if _waits(place) is Waits.no]
    if surely:
        furthest = max(_position(place) for place in surely)
        doubtful = [place for place in at_work if place not in surely and _position(place) <= furthest]
        suspects = [*surely, *doubtful]
    else:
        suspects = [place for place in at_work if _position(place) == min(map(_position, at_work))]
    # Left behind though in a collective: it may be held by something else than the others' work.
    first = min(map(_position, suspects))
    behind = [p for p in here if p not in suspects and _position(p) < first]
    suspects += [p for p in behind if p.sign.step < first[0] or not surely]
    waiting = [place for place in here if place not in suspects]
    if not surely and not waiting:
        return _cannot_tell((), f"all ranks are at the same place, {_plain(here)}: nothing shows which is late")
    if len(suspects) > 1:
        return _cannot_tell(suspects, _plain(suspects) + (f"; {_waiting(waiting)}" if waiting else ""))
    [suspect] = suspects
    return _named(suspects, f"{_at(suspect)}, {_doing(suspect)}" + (f"; {_waiting(waiting)}" if waiting else ""))


def _of_waiting(here: list[Place]) -> Verdict:
    """All wait in collectives: who waits in an earlier one?"""
    counts = [place.account.collectives if place.account else None for place in here]
    counted = [sum(count) for count in counts if count is not None]
    by_count = len(counted) == len(here)
    turns = [(p.sign.step, counted[i] if by_count else p.sign.entered) for i, p in enumerate(here)]
    behind = [place for place, turn in zip(here, turns, strict=True) if turn == min(turns)]
    others = [place for place in here if place not in behind]
    if others:
        text = f"in an earlier collective than {_ranks(others)}: {_plain(behind)}; {_waiting(others)}"
        return _named(behind, text) if len(behind) == 1 else _cannot_tell(behind, text)
    if any(count != counts[0] for count in counts) or len({_doing(place) for place in here}) > 1:
        return _cannot_tell((), f"the ranks wait in different collectives: {_plain(here)}")
    text = f"all ranks wait in the same collective, {_plain(here)}: a link between them, or the collectives' library"
    return _cannot_tell((), text)


def _position(place: Place) -> tuple[int, int]:
    return place.sign.step, place.sign.entered


def _waits(place: Place) -> Waits:
    return place.account.waits if place.account else Waits.maybe


def _named(late: Sequence[Place], text: str) -> Verdict:
    return Verdict(_numbers(late), certain=True, text=text)


def _cannot_tell(among: Sequence[Place], text: str) -> Verdict:
    return Verdict(_numbers(among), certain=False, text=text)


def _numbers(places: Sequence[Place]) -> tuple[int, ...]:
    return tuple(sorted(place.rank for place in places))


def _ranks(places: Sequence[Place]) -> str:
    return spoken(place.rank for place in places)


def _at(place: Place) -> str:
    since = f" for {place.sign.in_phase:.0f} s" if place.silent is None else ""
    return f"in phase {place.sign.phase} of {_step(place)}{since}"


def _step(place: Place) -> str:
    return f"step {place.sign.step}" if place.sign.step else "the time before the first step"


def _doing(place: Place) -> str:
    if place.account is None:
        return "which does not answer"
    return ("in " if place.account.waits is Waits.yes else "at ") + place.account.doing


def _plain(places: Sequence[Place]) -> str:
    """Where a few of them are; said once where several are at the same."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        groups.setdefault(f"in phase {place.sign.phase} of {_step(place)}, {_doing(place)}", []).append(place)
    if len(groups) == 1:
        return f"{_at(places[0])}, {_doing(places[0])}"
    texts = [f"{_ranks(members)} {text}" for text, members in groups.items()]
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more places" if len(texts) > 4 else "")


def _lost(place: Place) -> str:
    what = {
        STOPPED: "its process is stopped (by SIGSTOP, a debugger or a frozen container)",
        "dead": "its process is dead",
        "gone": "its process is gone",
    }[place.state or ""]
    return f"{what} (pid {place.member.pid}), last heard of {place.silent or 0:.0f} s ago{_before(place)}"


def _before(place: Place) -> str:
    """Where it was when it was last heard of, if it ever was."""
    return f"; then {_at(place)}" if place.sign.tick else ""


def _waiting(places: Sequence[Place]) -> str:
    """Of ranks that are not late, by the first of them."""
    phase = f"phase {places[0].sign.phase} of {_step(places[0])}"
    return f"{_ranks(places)} {'waits' if len(places) == 1 else 'wait'} in {phase}, {_doing(places[0])}"
