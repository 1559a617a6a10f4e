"""What this rank has seen of the others: their newest signs, and for how long each has been without a newer one.

Times are this process's own: clocks of other machines are not compared. Between two looks nothing is known of a rank,
so that its silence counts only from when this rank began to look.
"""

from __future__ import annotations

from collections.abc import Iterable

from train.guard.verdict import Sign


class Sightings:
    """Newest signs by rank.

    Args:
        first: a sign of each rank, by rank.
        now: seconds, of the clock that all other calls use.
    """

    def __init__(self, first: Iterable[Sign], now: float) -> None:
        self.signs = list(first)
        self._since = [now] * len(self.signs)
        self.looked_at: frozenset[int] = frozenset()

    def look_at(self, ranks: frozenset[int], now: float) -> None:
        """From now on, until told otherwise, these ranks are looked at."""
        for rank in ranks - self.looked_at:
            self._since[rank] = now
        self.looked_at = ranks

    def see(self, rank: int, sign: Sign, now: float) -> None:
        """A sign was read, maybe not for the first time."""
        if sign.tick > self.signs[rank].tick:
            self.signs[rank] = sign
            self._since[rank] = now

    def start_anew(self, now: float) -> None:
        """This process was not running for a while, so that nothing follows from what it did not see."""
        self._since = [now] * len(self.signs)

    def silence(self, rank: int, now: float) -> float:
        """Seconds for which a rank that is looked at has given no new sign."""
        return now - self._since[rank]

    def idle(self, rank: int, now: float) -> float:
        """Seconds for which it has not advanced, at the least."""
        return self.signs[rank].idle + self.silence(rank, now)

    def under_way(self) -> list[int]:
        """Ranks that have not left the steps."""
        return [rank for rank, sign in enumerate(self.signs) if sign.ended is None]
