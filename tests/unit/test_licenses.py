"""The licence notices: what is taken, what is held out, and that nothing alike stands on both sides."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.schema.dataset import LicensesDatasetConfig
from data_prep import licenses
from data_prep.licenses import LicensesDataset
from data_prep.near_duplicates import near_duplicates, shingles
from data_prep.records import Record, Reject

_WORDS = [f"word{i}" for i in range(400)]


def _rule(folder: Path, name: str, text: str, label: str, flags: str = "is_license_notice: yes") -> None:
    front = f"license_expression: {label}\n{flags}\nignorable_urls:\n    - http://x\n"
    (folder / f"{name}.RULE").write_bytes(f"---\n{front}---\n\n{text}\n".encode())


def _folder(tmp_path: Path) -> Path:
    rng = random.Random(0)
    folder = tmp_path / "rules"
    folder.mkdir()
    for label, count in {"mit": 60, "gpl-2.0": 30, "rare": 5, "unknown-x": 40}.items():
        for i in range(count):
            _rule(folder, f"{label}_{i}", " ".join(rng.sample(_WORDS, 30)), label)
    for i in range(30):  # a near-duplicate of each, one word longer
        content = (folder / f"gpl-2.0_{i}.RULE").read_bytes()
        (folder / f"gpl-2.0_{i}-near.RULE").write_bytes(content.rstrip() + b" more\n")
    (folder / "mit_again.RULE").write_bytes((folder / "mit_1.RULE").read_bytes())
    _rule(folder, "mit_short", "too short", "mit")
    _rule(folder, "mit_false", " ".join(_WORDS[:20]), "mit", "is_license_notice: yes\nis_false_positive: yes")
    _rule(folder, "mit_tag", " ".join(_WORDS[20:40]), "mit", "is_license_tag: yes")
    (folder / "broken.RULE").write_bytes(b"is_license_notice: yes\n" + b"x " * 60)
    (folder / "crlf.RULE").write_bytes(
        (folder / "mit_4.RULE").read_bytes().replace(b"\n", b"\r\n").replace(b"word", b"crlf")
    )
    return folder


def _dataset(folder: Path, seed: int = 0, **settings: object) -> LicensesDataset:
    settings = {"exclude_labels": ["unknown*"], "max_per_label": 40, "system": "Name it."} | settings
    return LicensesDataset(LicensesDatasetConfig(path=str(folder), **settings), seed=seed)  # type: ignore[arg-type]


def test_what_is_taken_and_held_out(tmp_path: Path) -> None:
    dataset = _dataset(_folder(tmp_path), test_fraction=0.2, validation_fraction=0.1)
    rows = list(dataset.rows())
    assert json.loads(json.dumps(dataset.settings()))["max_per_label"] == 40, "settings are hashed as JSON"
    rejects = [r for _, r in rows if isinstance(r, Reject)]
    assert [(r.origin.file, r.reason) for r in rejects] == [("broken.RULE", "no front matter")]
    records = [(split, r) for split, r in rows if isinstance(r, Record)]
    assert {(r.messages[0].content, r.messages[2].content) for _, r in records} == {
        ("Name it.", "mit"),
        ("Name it.", "gpl-2.0"),
    }
    taken = {r.origin.file for _, r in records}
    assert not taken & {"mit_short.RULE", "mit_false.RULE", "mit_tag.RULE"}
    assert len(taken & {"mit_1.RULE", "mit_again.RULE"}) < 2
    for label, test, validation in (("mit", 8, 4), ("gpl-2.0", 8, 4)):
        count = {
            s: sum(split == s and r.messages[2].content == label for split, r in records)
            for s in ("test", "validation")
        }
        assert count["test"] == test
        assert count["validation"] <= validation  # fewer where a near-duplicate of a test notice was taken out
    _assert_nothing_alike(records)


def _assert_nothing_alike(records: list[tuple[str, Record]]) -> None:
    """By brute force over word runs, independently of the index."""

    def runs(record: Record) -> set[str]:
        words = record.messages[-2].content.lower().split()
        return {" ".join(words[i : i + 5]) for i in range(len(words) - 4)}

    order = {"train": 0, "validation": 1, "test": 2}
    sets = [(order[split], runs(r)) for split, r in records]
    for side, one in sets:
        for other_side, other in sets:
            assert side >= other_side or len(one & other) / len(one | other) < 0.8


def test_the_choice_depends_on_the_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _folder(tmp_path)
    first = list(_dataset(folder).rows())
    listdir = licenses.os.listdir
    monkeypatch.setattr(licenses.os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    again = _dataset(folder)
    assert list(again.rows()) == first
    assert again.source() == _dataset(folder, seed=1).source()
    assert list(_dataset(folder, seed=1).rows()) != first


def test_near_duplicates_are_exact() -> None:
    rng = random.Random(1)
    words = _WORDS[:40]
    base = [rng.choices(words, k=rng.randint(1, 40)) for _ in range(60)]
    edited = [[w if rng.random() > 0.03 else "edited" for w in words] for words in base]
    held = [shingles(" ".join(w), 5) for w in base]
    texts = [shingles(" ".join(w), 5) for w in edited]
    brute = {i for i, a in enumerate(texts) if any(len(a & b) / len(a | b) >= 0.8 for b in held)}
    assert near_duplicates(texts, held, 0.8) == brute
    assert 5 < len(brute) < 55
    assert shingles("One, TWO!", 5) == shingles("one two", 5) != shingles("one three", 5)


def test_faults_name_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no such folder"):
        _dataset(tmp_path / "none").source()
    with pytest.raises(DataError, match=r"no \*\.RULE file"):
        _dataset(tmp_path).source()
    with pytest.raises(DataError, match="no notice fits"):
        list(_dataset(_folder(tmp_path), min_per_label=900).rows())
    monkeypatch.setattr(licenses, "_PACKAGE", "no-such-package")
    with pytest.raises(DataError, match=r"not installed[\s\S]*pip install crosstune\[demo\]"):
        LicensesDataset(LicensesDatasetConfig()).source()
