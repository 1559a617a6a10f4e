"""Records that occur more than once: found in bounded memory, one of each kept.

A record is taken out only if it equals, or is near to, a record that is kept: of a chain A ~ B ~ C whose ends are
unlike, C stays if B went for A's sake. Test comes before validation before train, then what was read first: a held-out
record is never lost to a training record, and the result depends on the order of rows alone.

Memory, besides what the caller passes: about 100 bytes a record, and as many for each band (`minhash.Banding`)
in which a record agrees with another that is not its equal.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from configs.schema.clean import DedupConfig, DedupScope
from data_prep.minhash import Banding, Signer
from data_prep.records import AnyRecord, Vote, acts_of, texts_of
from data_prep.shingles import letters, mixed

__all__ = ["Duplicates", "Meetings", "Signer", "exact_digest", "find_duplicates", "in_one_band"]

_CHUNK = 2**16
"""Signatures read at a time."""


class Signatures(Protocol):
    """An array of them, [records, width], or what can be read like one."""

    def __getitem__(self, key: Any, /) -> NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Meetings:
    """Records that agree with others in a band."""

    rows: NDArray[np.int64]
    """[meetings]: ordinals of records."""
    groups: NDArray[np.int64]
    """[meetings]: number of the group in which the record agrees with others."""


@dataclass(frozen=True)
class Duplicates:
    """Which records go, and for whose sake."""

    of: NDArray[np.int64]
    """[records]: ordinal of the kept record; -1: this one is kept."""
    near: NDArray[np.bool_]
    """[records]: it goes because it is nearly, not exactly, the other."""


def exact_digest(record: AnyRecord) -> bytes:
    """16 bytes, equal for records whose texts are equal but for case, white space, punctuation and full-width forms.

    A text that is nothing but punctuation counts as it is. A vote's liking, calls and images are part of what is said.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(record, Vote):
        digest.update(b"liked" if record.liked else b"disliked")
    for text in texts_of(record):
        said = letters(text) or "".join(text.split()).encode()
        digest.update(len(said).to_bytes(8, "little") + said)
    digest.update("\n".join(acts_of(record)).encode())
    return digest.digest()


def find_duplicates(
    cfg: DedupConfig,
    digests: NDArray[np.uint64],
    signatures: Signatures | None,
    splits: NDArray[np.int8],
    meetings: Iterable[Meetings] | None = None,
) -> Duplicates:
    """Decides which records go.

    Args:
        cfg: what counts as a duplicate, and where.
        digests: [records, 2], of `exact_digest`; looked at if ``cfg.exact``.
        signatures: [records, width], of `Signer`; looked at if ``cfg.near``. They may be memory-mapped.
        splits: [records]: 0 train, 1 validation, 2 test, -1 no record.
        meetings: of all bands, where they were found elsewhere; None: they are found here.
    """
    of = np.full(len(splits), -1, np.int64)
    near = np.zeros(len(splits), np.bool_)
    order = np.argsort(-splits, kind="stable")[: np.count_nonzero(splits >= 0)]
    if cfg.exact:
        first = _firsts(order, digests)
        gone = first != order
        if cfg.scope is DedupScope.across:
            gone = splits[first] > splits[order]
        of[order[gone]] = first[gone]
    if cfg.near:
        assert signatures is not None
        if meetings is None:
            meetings = _all_meetings(cfg, signatures, splits, np.flatnonzero((splits >= 0) & (of < 0)))
        of_near = _nearest(cfg, signatures, splits, *_joined(meetings, of))
        rows = np.fromiter(of_near.keys(), np.int64, len(of_near))
        of[rows] = np.fromiter(of_near.values(), np.int64, len(of_near))
        near[rows] = True
    # What equals a record that is near to a third goes for the sake of the third.
    gone = of >= 0
    gone[gone] = of[of[gone]] >= 0
    near[gone] |= near[of[gone]]
    of[gone] = of[of[gone]]
    return Duplicates(of, near)


def in_one_band(
    cfg: DedupConfig,
    signatures: Signatures,
    splits: NDArray[np.int8],
    rows: NDArray[np.int64],
    band: int,
    part: int = 0,
    parts: int = 1,
) -> Meetings:
    """Which of `rows` (ascending) agree in a band, and might therefore be near.

    Args:
        cfg: decides how wide a band is; in the scope `across`, those that only meet their own split are passed over.
        signatures: as for `find_duplicates`.
        splits: as for `find_duplicates`.
        rows: ordinals.
        band: its number.
        part: only values of this part are looked at ...
        parts: ... of as many, so that memory can be bounded. All parts together find the same.
    """
    keys = _band_keys(signatures, rows, band, Banding.of(cfg.threshold).rows)
    here = np.flatnonzero((keys != 0) & (keys % np.uint64(parts) == part))
    here = here[np.argsort(keys[here], kind="stable")]
    keys, rows = keys[here], rows[here]
    new = np.ones(len(keys), np.bool_)
    new[1:] = keys[1:] != keys[:-1]
    starts, group = np.flatnonzero(new), np.cumsum(new) - 1
    if not len(starts):
        return Meetings(rows, group)
    wanted = np.diff(starts, append=len(keys)) > 1
    if cfg.scope is DedupScope.across:
        mine = splits[rows]
        wanted &= np.minimum.reduceat(mine, starts) != np.maximum.reduceat(mine, starts)
    return Meetings(rows[wanted[group]], group[wanted[group]])


def _all_meetings(
    cfg: DedupConfig, signatures: Signatures, splits: NDArray[np.int8], rows: NDArray[np.int64]
) -> Iterator[Meetings]:
    for band in range(Banding.of(cfg.threshold).bands):
        yield in_one_band(cfg, signatures, splits, rows, band)


def _firsts(order: NDArray[np.int64], digests: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each of the records in `order`, the first of them with an equal digest, which may be itself."""
    mine = digests[order]
    sort = np.lexsort((mine[:, 1], mine[:, 0]))  # stable, so that equals stay in their order
    mine = mine[sort]
    new = np.ones(len(sort), np.bool_)
    new[1:] = (mine[1:] != mine[:-1]).any(axis=1)
    first = np.empty_like(order)
    first[sort] = order[sort[np.flatnonzero(new)[np.cumsum(new) - 1]]]
    return first


def _band_keys(signatures: Signatures, rows: NDArray[np.int64], band: int, width: int) -> NDArray[np.uint64]:
    """One number for the values in a band, [rows]; 0 where the record has no words."""
    keys = np.empty(len(rows), np.uint64)
    for begin in range(0, len(rows), _CHUNK):
        chunk = rows[begin : begin + _CHUNK]
        padded = np.zeros((len(chunk), 16), np.uint8)
        padded[:, :width] = signatures[chunk][:, band * width : (band + 1) * width]
        keys[begin : begin + _CHUNK] = _hashed(padded)
    return keys


def _hashed(values: NDArray[np.uint8], seed: int = 0) -> NDArray[np.uint64]:
    """A hash of each row of bytes, whose number is a multiple of 8; 0 for zeros."""
    made = np.zeros(len(values), np.uint64)
    for column in np.ascontiguousarray(values).view("<u8").T:
        made = mixed(made * np.uint64(0xD1342543DE82EF95 + 2 * seed) + column)
    return made


def _joined(meetings: Iterable[Meetings], of: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Records that are still there and the groups, numbered through, in which they meet others."""
    rows, groups, number = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for each in meetings:
        still = of[each.rows] < 0
        rows.append(each.rows[still])
        groups.append(each.groups[still] + number)
        number += int(each.groups.max(initial=-1)) + 1
    return np.concatenate(rows), np.concatenate(groups)


def _nearest(
    cfg: DedupConfig,
    signatures: Signatures,
    splits: NDArray[np.int8],
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
) -> dict[int, int]:
    """Record that goes -> the kept record it is most like.

    Records are taken by priority and compared with those kept so far which they meet in a group. Records with equal
    signatures have the same fate, so that only the first of them is looked at.
    """
    by_split = cfg.scope is DedupScope.across
    met = np.unique(rows)
    met = met[np.argsort(-splits[met], kind="stable")]
    stand_in = dict(zip(met.tolist(), _firsts_by_signature(met, signatures, splits, by_split).tolist(), strict=True))
    needed = Banding.of(cfg.threshold).needed
    groups_of: dict[int, list[int]] = defaultdict(list)
    for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
        if stand_in[row] == row:
            groups_of[row].append(group)
    kept: dict[int, list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for row in met.tolist():
        if stand_in[row] != row:
            nearest = found.get(stand_in[row], -1 if by_split else stand_in[row])
        else:
            seen = {other for group in groups_of[row] for other in kept.get(group, ())}
            nearest = _most_alike(row, sorted(seen), signatures, splits, by_split, needed)
            if nearest < 0 and not (by_split and splits[row] == 0):
                for group in groups_of[row]:
                    kept[group].append(row)
        if nearest >= 0:
            found[row] = nearest
    return found


def _firsts_by_signature(
    rows: NDArray[np.int64], signatures: Signatures, splits: NDArray[np.int8], by_split: bool
) -> NDArray[np.int64]:
    """For each of `rows` the first with an equal signature, in its own split if `by_split`."""
    digests = np.empty((len(rows), 2), np.uint64)
    for begin in range(0, len(rows), _CHUNK):
        chunk = slice(begin, begin + _CHUNK)
        values = signatures[rows[chunk]]
        digests[chunk, 0], digests[chunk, 1] = _hashed(values), _hashed(values, seed=1)
    if by_split:
        digests[:, 0] += splits[rows].astype(np.uint64)
    places = _firsts(np.arange(len(rows)), digests)
    return rows[places]


def _most_alike(
    row: int,
    others: list[int],
    signatures: Signatures,
    splits: NDArray[np.int8],
    by_split: bool,
    needed: float,
) -> int:
    """Which of `others` `row` is nearest to; -1: near to none."""
    if by_split:
        others = [other for other in others if splits[other] > splits[row]]
    if not others:
        return -1
    equal = (signatures[np.asarray(others)] == signatures[row]).sum(axis=1)
    best = int(equal.argmax())
    return others[best] if equal[best] >= needed else -1
