"""Who is held out depends on what the rows are, never on where they stand."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_prep.dataset import SPLITS
from data_prep.split import TEST, TRAIN, VALIDATION, at_random, by_digest, by_group

shares = st.tuples(st.floats(0, 0.6), st.floats(0, 0.39))


def hashes(values) -> np.ndarray:
    """``[n]`` uint64 as a hash of each value would be."""
    digests = [hashlib.blake2b(str(v).encode(), digest_size=8).digest() for v in values]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def test_codes_are_positions_of_the_splits_names():
    assert [SPLITS[code] for code in (TRAIN, VALIDATION, TEST)] == ["train", "validation", "test"]


def test_a_digest_falls_where_it_always_fell():
    """The rule of the first prepared data, in its own words."""
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(3000)]
    digests += [b"\xff" * 32, b"\0" * 32, b"\x80" + b"\0" * 31]
    validation, test = 0.15, 0.3

    def split_of(digest: bytes) -> str:
        point = int.from_bytes(digest[:8], "big") / 2**64
        return "test" if point < test else "validation" if point < test + validation else "train"

    expected = [SPLITS.index(split_of(digest)) for digest in digests]
    assert [by_digest(digest, validation, test) for digest in digests] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("draw", [by_group, at_random])
def test_order_does_not_matter_and_the_seed_does(draw):
    keys = hashes(range(500))
    codes = draw(keys, 7, 0.1, 0.2)
    shuffled = np.random.default_rng(0).permutation(len(keys))
    assert np.array_equal(draw(keys[shuffled], 7, 0.1, 0.2), codes[shuffled])
    assert np.bincount(codes).tolist() == [350, 50, 100]
    other = draw(keys, 8, 0.1, 0.2)
    assert np.bincount(other).tolist() == [350, 50, 100]
    assert 10 <= ((codes == TEST) & (other == TEST)).sum() <= 35  # by chance 20


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 5), shares)
@settings(max_examples=150, deadline=None)
def test_groups_stay_whole_and_shares_are_met_so_that_no_further_group_comes_nearer(groups, seed, parts):
    validation, test = parts
    codes = by_group(hashes(groups), seed, validation, test)
    assert codes.dtype == np.int8 and len(codes) == len(groups)
    split_of = dict(zip(groups, codes.tolist(), strict=True))
    assert [split_of[group] for group in groups] == codes.tolist()
    assert not groups or TRAIN in split_of.values()
    training = [groups.count(group) for group, code in split_of.items() if code == TRAIN]
    for code, share in ((TEST, test), (VALIDATION, validation)):
        missing = round(share * len(groups)) - int((codes == code).sum())
        if len(training) > 1:  # what still trains could have been taken, and would not have come nearer
            assert all(abs(missing - size) >= abs(missing) for size in training)
        taken = [groups.count(group) for group, found in split_of.items() if found == code]
        assert missing >= 0 or any(size + missing > -missing for size in taken)  # the last one taken came nearer


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(0, 5), shares)
@settings(max_examples=150, deadline=None)
@example([0, 1, 2] * 4, 0, (0.34, 0.09))  # one of four is taken for test, then the other three for validation
def test_random_shares_are_met_to_the_row(rows, seed, parts):
    validation, test = parts
    codes = at_random(hashes(rows), seed, validation, test)
    assert (codes == TEST).sum() == round(test * len(rows))
    assert (codes == VALIDATION).sum() == round(validation * len(rows))
    backwards = at_random(hashes(rows[::-1]), seed, validation, test)
    count = [
        sorted(zip(given, found.tolist(), strict=True)) for given, found in ((rows, codes), (rows[::-1], backwards))
    ]
    assert count[0] == count[1]
    divided = {row for row in rows if len(set(codes[np.asarray(rows) == row].tolist())) > 1}
    assert len(divided) <= 2  # at most once for each share


def test_equal_rows_are_not_divided_while_others_can_make_up_the_share():
    rows = [i // 3 for i in range(300)] + list(range(1000, 1020))
    codes = at_random(hashes(rows), 0, 0.1, 0.2)
    assert np.bincount(codes).tolist() == [224, 32, 64]
    assert all(len(set(codes[3 * i : 3 * i + 3].tolist())) == 1 for i in range(100))


def test_a_group_too_big_for_its_share_does_not_empty_the_split():
    for seed in range(5):
        keys = hashes([0] * 900 + list(range(1, 101)))
        assert np.bincount(by_group(keys, seed, 0.02, 0.05)).tolist() == [930, 20, 50]
