"""Which rows are held out. Pure: digests, group keys and a seed in; codes out, the same for any order of the rows.

A code is the position of the split's name in `data_prep.dataset.SPLITS`. Keys and digests given as uint64 are hashes
already. A share that does not come out even is rounded to the nearest row, a half to the even one.
"""

from __future__ import annotations

import numpy as np

from data_prep.shingles import mixed

TRAIN, VALIDATION, TEST = 0, 1, 2


def by_digest(digest: bytes, validation: float, test: float) -> int:
    """A row by its own digest alone: it stays where it is whatever other rows come; shares are met on average.

    Args:
        digest: of the row, of which the first 8 bytes count, big-endian.
        validation: share of rows.
        test: share of rows.

    Returns:
        The row's code.
    """
    point = int.from_bytes(digest[:8], "big") / 2**64
    return TEST if point < test else VALIDATION if point < test + validation else TRAIN


def by_group(keys: np.ndarray, seed: int, validation: float, test: float) -> np.ndarray:
    """Whole groups, in an order drawn by the seed, until the shares of rows are reached as nearly as groups allow.

    A group that would overshoot is passed over for smaller ones that come later; at the end the smallest that was left
    is taken too if that comes nearer. So no split misses its share by more than half of the smallest group that was
    left for it. One group always stays in training.

    Args:
        keys: ``[n]`` uint64, a hash of each row's group.
        seed: another one draws other groups.
        validation: share of rows.
        test: share of rows; drawn first.

    Returns:
        ``[n]`` int8. Costs at most 65 bytes a row while it is made.
    """
    groups = _Groups(keys, seed)
    for code, share in ((TEST, test), (VALIDATION, validation)):
        missing = groups.draw(code, round(share * len(keys)))
        if missing and groups.left > 1:
            smallest = groups.smallest_left()
            if groups.sizes[smallest] - missing < missing:
                groups.take(smallest, code)
    return groups.codes[groups.of_row]


def at_random(digests: np.ndarray, seed: int, validation: float, test: float) -> np.ndarray:
    """Rows drawn by the seed: exactly ``round(share * n)`` of them for each split.

    Rows with equal digests are drawn together. They are divided only where what is still missing is less than any set
    of equals that is left, or only one set is.

    Args:
        digests: ``[n]`` uint64, a hash of each row's content.
        seed: another one draws other rows.
        validation: share of rows.
        test: share of rows; drawn first.

    Returns:
        ``[n]`` int8. Costs at most 65 bytes a row while it is made.
    """
    groups = _Groups(digests, seed)
    divided: list[tuple[int, int, int]] = []
    for code, share in ((TEST, test), (VALIDATION, validation)):
        missing = groups.draw(code, round(share * len(digests)))
        if missing:
            smallest = groups.smallest_left()
            groups.sizes[smallest] -= missing
            divided.append((smallest, missing, code))
    codes = groups.codes[groups.of_row]
    for group, rows, code in divided:
        alike = np.flatnonzero((groups.of_row == group) & (codes == groups.codes[group]))
        codes[alike[:rows]] = code
    return codes


class _Groups:
    """Rows with equal keys, and where they have been drawn to."""

    def __init__(self, keys: np.ndarray, seed: int) -> None:
        found, self.of_row, self.sizes = np.unique(keys, return_inverse=True, return_counts=True)
        self.codes = np.full(len(found), TRAIN, np.int8)
        self.left = len(found)
        """Groups that still train."""
        self._order = np.argsort(_mix(found, seed))

    def draw(self, code: int, rows: int) -> int:
        """Takes groups for `code` as they come and fit, but for the last one; how many of the rows are missing then."""
        codes, sizes = self.codes.data, self.sizes.data
        for group in self._order.data:
            if rows == 0 or self.left == 1:
                break
            if codes[group] == TRAIN and sizes[group] <= rows:
                self.take(group, code)
                rows -= sizes[group]
        return rows

    def take(self, group: int, code: int) -> None:
        """A group for `code`."""
        self.codes[group] = code
        self.left -= 1

    def smallest_left(self) -> int:
        """The smallest group that still trains, of equals the first in the order drawn."""
        left = self._order[self.codes[self._order] == TRAIN]
        return int(left[np.argmin(self.sizes[left])])


def _mix(keys: np.ndarray, seed: int) -> np.ndarray:
    """Other numbers for other seeds, one to one, without a pattern."""
    return mixed(keys + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & 2**64 - 1))
