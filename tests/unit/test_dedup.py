"""Duplicates: what counts as one, which record stays, and how many are found."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from configs.schema.clean import DedupConfig, DedupScope
from data_prep.dedup import Duplicates, exact_digest, find_duplicates, in_one_band
from data_prep.minhash import MARGIN, Banding, Signer
from data_prep.records import AnyRecord, Message, Origin, Pair, Record, TextRecord, ToolCall, Vote
from data_prep.shingles import shingles

ORIGIN = Origin("a.jsonl", 1)
TRAIN, VALIDATION, TEST = 0, 1, 2
GOLDEN = [131, 213, 87, 131, 173, 176, 146, 162]
EXACT, NEAR = DedupConfig(exact=True), DedupConfig(near=True)


def chat(question: str, answer: str) -> Record:
    return Record(ORIGIN, (Message("user", question), Message("assistant", answer, train=True)))


def find(cfg: DedupConfig, records: Sequence[AnyRecord], splits: Sequence[int]) -> Duplicates:
    digests = np.frombuffer(b"".join(map(exact_digest, records)), np.uint64).reshape(-1, 2)
    return find_duplicates(cfg, digests, Signer(cfg)(records) if cfg.near else None, np.array(splits, np.int8))


def jaccard(a: str, b: str, size: int = 5) -> float:
    """Independently of the code under test: words by white space."""
    one, two = ({tuple(w[i : i + size]) for i in range(len(w) - size + 1)} for w in (a.split(), b.split()))
    return len(one & two) / len(one | two)


def sentence(rng: random.Random, words: int) -> list[str]:
    return [f"w{rng.randrange(3000)}" for _ in range(words)]


def edited(rng: random.Random, words: list[str], edits: int) -> list[str]:
    """A copy with words replaced, left out or put in."""
    made = list(words)
    for _ in range(edits):
        place = rng.randrange(len(made))
        made[place : place + rng.choice([1, 1, 0])] = [f"x{rng.randrange(3000)}"] * rng.choice([1, 1, 0])
    return made


def test_exact_equality_passes_over_case_space_punctuation_and_full_width_forms() -> None:
    same = [
        chat("Is this MIT?", "Yes, it is."),
        chat("is this  mit", "YES it\nis!"),
        chat("Ｉｓ ｔｈｉｓ ＭＩＴ？", "Yes，it is。"),
    ]
    assert len({exact_digest(r) for r in same}) == 1
    others = [
        chat("Is this MIT?", "No, it is not."),
        chat("Is this MIT? Yes, it", "is."),
        TextRecord(ORIGIN, "Is this MIT? Yes, it is."),
        chat("这是什么许可证？", "MIT。"),
        chat("这是什么许可证", "BSD"),
        chat("?", "!"),
        chat("!", "?"),  # nothing but punctuation counts as it is
        chat("कि", "का"),
        chat("का", "का"),  # vowel signs are letters
    ]
    assert len({exact_digest(r) for r in (same[0], *others)}) == len(others) + 1


def test_a_vote_and_a_pair_say_more_than_their_texts() -> None:
    up, down = Vote(ORIGIN, chat("q", "a"), True), Vote(ORIGIN, chat("q", "a"), False)
    assert exact_digest(up) != exact_digest(down)
    pairs = [Pair(ORIGIN, chat("q", "a"), chat("q", "b")), Pair(ORIGIN, chat("q", "b"), chat("q", "a"))]
    assert exact_digest(pairs[0]) != exact_digest(pairs[1])
    text = " ".join(f"w{i}" for i in range(50))
    votes = [Vote(ORIGIN, chat(text, "a"), liked) for liked in (True, False, True)]
    assert find(NEAR, votes, [0, 0, 0]).of.tolist() == [-1, -1, 0]


def test_other_calls_and_other_images_make_another_record() -> None:
    def acting(calls: Sequence[ToolCall] = (), images: Sequence[str] = ()) -> Record:
        asked = Message("user", "<image> Do it.", images=tuple(images))
        return Record(ORIGIN, (asked, Message("assistant", "", True, calls=tuple(calls))))

    others = [
        acting([ToolCall("light_off", {})]),
        acting([ToolCall("oven_off", {})]),
        acting([ToolCall("heat", {"degrees": 20})]),
        acting([ToolCall("heat", {"degrees": 25})]),
        acting(images=["a.png"]),
        acting(images=["b.png"]),
    ]
    assert (find(NEAR, others, [TRAIN] * len(others)).of == -1).all()
    assert (find(EXACT, others, [TRAIN] * len(others)).of == -1).all()
    same = [acting([ToolCall("say", {"text": text})]) for text in ("Good day!", "good day")]
    assert find(EXACT, same, [TRAIN, TRAIN]).of.tolist() == [-1, 0]


@pytest.mark.parametrize("cfg", [EXACT, NEAR])
def test_one_is_kept_test_before_validation_before_train_then_the_first(cfg: DedupConfig) -> None:
    a, b = "the quick brown fox jumps over", "quite another text of some words"
    records = [chat(a, b), chat(a, b), chat(a, b), chat(b, a), chat(b, a), chat("alone", "here")]
    assert find(cfg, records, [0, 1, 2, 0, 0, 0]).of.tolist() == [2, 2, -1, -1, 3, -1]
    assert find(cfg, records, [0, -1, 1, -1, 0, 0]).of.tolist() == [2, -1, -1, -1, -1, -1]  # -1: no record


@pytest.mark.parametrize("cfg", [EXACT, NEAR])
def test_across_splits_repetition_within_a_split_stays(cfg: DedupConfig) -> None:
    cfg = DedupConfig(exact=cfg.exact, near=cfg.near, scope=DedupScope.across)
    records = [chat("the quick brown fox", "jumps over the lazy dog")] * 7
    assert find(cfg, records, [0, 0, 0, 0, 0, 0, 0]).of.tolist() == [-1] * 7
    assert find(cfg, records, [0, 1, 2, 2, 0, 1, 0]).of.tolist() == [2, 2, -1, -1, 2, 2, 2]
    assert find(cfg, records, [0, 0, 1, 1, 0, 1, 0]).of.tolist() == [2, 2, -1, -1, 2, -1, 2]


def test_what_is_near_to_no_kept_record_stays() -> None:
    """A chain A ~ B ~ C with unlike ends: B goes, C stays, though both are of one cluster."""
    rng = random.Random(0)
    words, begin, end = (sentence(rng, k) for k in (120, 9, 9))
    chain = [" ".join(w) for w in (words, [*begin, *words[9:]], [*begin, *words[9:-9], *end])]
    assert jaccard(chain[0], chain[1]) > 0.83 < jaccard(chain[1], chain[2]) and jaccard(chain[0], chain[2]) < 0.75
    found = find(NEAR, [TextRecord(ORIGIN, text) for text in chain], [0, 0, 0])
    assert found.of.tolist() == [-1, 0, -1] and found.near.tolist() == [False, True, False]


def test_an_equal_of_a_near_duplicate_goes_for_the_kept_record() -> None:
    rng = random.Random(1)
    words = sentence(rng, 100)
    records = [TextRecord(ORIGIN, " ".join(w)) for w in (edited(rng, words, 1), edited(rng, words, 1), words)]
    both = DedupConfig(exact=True, near=True)
    found = find(both, [records[0], records[0], records[2]], [0, 0, 2])
    assert found.of.tolist() == [2, 2, -1]


def test_chinese_near_duplicates_are_found() -> None:
    text = (
        "甲方应当在合同签订后三十日内支付全部款项，乙方应当在收到款项后十个工作日内交付货物并开具增值税专用发票，"
        "逾期须付违约金。"
    )
    changed = text.replace("三十日", "二十日")
    other = "员工每年享有十五天带薪年假，未休完的年假可以顺延至次年三月底，离职时按照国家规定折算工资，特殊情况除外。"
    found = find(NEAR, [chat("总结", t) for t in (text, changed, other)], [2, 0, 0])
    assert found.of.tolist() == [-1, 0, -1]


def test_records_without_words_are_near_to_none() -> None:
    assert find(NEAR, [chat("?!", "..."), chat("!!", "---")], [0, 0]).of.tolist() == [-1, -1]


def test_shingles_are_those_of_each_text_alone_whatever_stands_beside_it() -> None:
    texts = ["One, TWO three", "", "four", "中文 字x", "a b c d e f g", "...", "e\u0301te\u0301"]
    hashes, starts = shingles(texts, 3)
    assert np.diff(starts).tolist() == [1, 0, 1, 2, 5, 0, 1]
    alone = [shingles([text], 3)[0].tolist() for text in texts]
    assert [hashes[a:b].tolist() for a, b in zip(starts[:-1], starts[1:], strict=True)] == alone
    assert shingles(["one two THREE!"], 3)[0].tolist() == alone[0]
    assert shingles(["éTÉ"], 3)[0].tolist() == alone[-1]
    assert len(set(hashes.tolist())) == len(hashes)


def test_signatures_do_not_depend_on_the_batch_and_are_the_same_everywhere() -> None:
    signer, rng = Signer(NEAR), random.Random(2)
    records = [TextRecord(ORIGIN, " ".join(sentence(rng, 60))) for _ in range(40)]
    together = signer(records)
    assert together.shape == (40, signer.width) and together.dtype == np.uint8
    assert (together == np.concatenate([signer([r]) for r in records])).all()
    assert signer([]).shape == (0, signer.width)
    assert signer([TextRecord(ORIGIN, "the same on every machine and in every release")])[0, :8].tolist() == GOLDEN


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_the_banding_keeps_its_promise(threshold: float) -> None:
    banding = Banding.of(threshold)
    likely = 1 - (1 - min(1, threshold + MARGIN) ** banding.rows) ** banding.bands
    assert likely > 0.99 and banding.width % 8 == 0
    assert banding.needed <= banding.width and banding.rows * banding.bands <= banding.width


@pytest.mark.parametrize("threshold", [0.6, 0.8])
def test_recall_and_precision_on_planted_near_duplicates(threshold: float) -> None:
    """Edited copies of training records are planted in the held-out splits; what is near is judged exactly."""
    rng = random.Random(3)
    base = [sentence(rng, rng.randint(40, 200)) for _ in range(1500)]
    planted = [(i, edited(rng, base[i], rng.randint(1, 1 + len(base[i]) // 12))) for i in rng.sample(range(1500), 600)]
    texts = [" ".join(words) for words in (*base, *(words for _, words in planted))]
    splits = [TRAIN] * len(base) + [rng.choice([VALIDATION, TEST]) for _ in planted]
    cfg = DedupConfig(near=True, threshold=threshold)
    found = find(cfg, [TextRecord(ORIGIN, text) for text in texts], splits)

    alike = {i: jaccard(texts[i], " ".join(words)) for i, words in planted}
    surely = [i for i, index in alike.items() if index >= threshold + MARGIN]
    recall = np.mean([found.of[i] >= 0 for i in surely])
    gone = np.flatnonzero(found.of >= 0)
    indices = np.array([jaccard(texts[i], texts[found.of[i]]) for i in gone])
    assert len(surely) > 100 and recall > 0.95
    assert (indices >= threshold - MARGIN).mean() > 0.99 and (indices >= threshold).mean() > 0.85
    assert not (found.of[len(base) :] >= 0).any()  # never a held-out record for a training record
    assert (found.of[found.of[gone]] == -1).all()  # every one goes for a record that stays


def test_bands_can_be_looked_through_in_parts() -> None:
    rng = random.Random(4)
    words = sentence(rng, 80)
    records = [TextRecord(ORIGIN, " ".join(edited(rng, words, 1))) for _ in range(50)]
    signatures, splits = Signer(NEAR)(records), np.zeros(50, np.int8)
    rows = np.arange(50)

    def groups(*part: int) -> set[frozenset[int]]:
        met = in_one_band(NEAR, signatures, splits, rows, 3, *part)
        return {frozenset(met.rows[met.groups == g].tolist()) for g in set(met.groups.tolist())}

    assert groups() == groups(0, 3) | groups(1, 3) | groups(2, 3) and groups()
