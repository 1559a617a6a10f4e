"""report.html of prepared data: says what the manifest says, escapes it, asks nothing of a network."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.report import write_report
from data_prep.samples import ShownSample, ShownText
from data_prep.summary import summary_lines

_EVIL = "<script>alert('x')</script>"


def _counts(rows: int, tokens: int, supervised: int) -> dict[str, int]:
    return {"rows": rows, "tokens": tokens, "supervised_tokens": supervised}


def _manifest(name: str = "support") -> dict[str, Any]:
    train = {
        **_counts(8000, 2_480_000, 992_000),
        "max_length": 1024,
        "length_histogram": {"32": 10, "64": 0, "96": 7990},
        "truncated": {"rows": 16, "tokens": 1440},
        "by_source": {"tickets": _counts(7000, 1_860_000, 900_000), "faq": _counts(1000, 620_000, 92_000)},
        "packing_fill": {"1024": 0.954, "2048": 0.9871},
        "shards": [],
    }
    test = {**_counts(100, 31_000, 9_300), "max_length": 900, "length_histogram": {"96": 100}, "shards": []}
    return {
        "fingerprint": "ab" * 32,
        "kind": "samples",
        "dataset": {"name": name, "license": None},
        "max_length": 1024,
        "too_long": "truncate_left",
        "sources": [{"name": "tickets", "path": "tickets.jsonl", "sha256": "cd" * 32, "bytes": 1234567, "rows": 7003}],
        "splits": {"train": train, "test": test},
        "mix": {"tickets": {"epochs": 1.0, "tokens": 1_860_000}, "faq": {"epochs": 3.5, "tokens": 2_170_000}},
        "duplicates": {"exact": 120, "near": 44, "across_splits": 13, "removed": 164},
        "cleaned": {"email masked": 5, "phone masked": 0},
        "rejects": {"total": 3, "by_reason": {"malformed JSON": 2, "no end token": 1}, "by_source": {"tickets": 3}},
        "notes": ["tickets.jsonl: read as alpaca"],
    }


def _rejects(folder: Path) -> None:
    rows = [
        {"file": "tickets.jsonl", "line": 7, "reason": "malformed JSON", "detail": "at column 81"},
        {"file": "tickets.jsonl", "line": 9, "reason": "malformed JSON"},
        {"file": "tickets.jsonl", "line": 11, "reason": "no end token", "detail": _EVIL},
    ]
    (folder / "rejects.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _page(folder: Path, manifest: dict[str, Any], samples: list[ShownSample] | None = None) -> str:
    write_report(folder / "report.html", manifest, samples or [])
    return (folder / "report.html").read_text(encoding="utf-8")


def _text(page: str) -> str:
    """What a reader sees, a line per table row."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"[ \t]+", " ", re.sub(r"<[^>]+>", " ", body))


def test_every_figure_is_there(tmp_path: Path) -> None:
    _rejects(tmp_path)
    text = _text(_page(tmp_path, _manifest()))
    for line in (
        "train 8,000 2,480,000 992,000 40.0% 310 1,024 16 1,440",
        "test 100 31,000 9,300 30.0% 310 900 0 0",
        "faq train 1,000 620,000 92,000 25.0%",
        "faq 3.50 2,170,000 53.8%",
        "train 95.4% 98.7%",
        "up to 96 tokens: 7,990 sequences",
        "malformed JSON 2 tickets.jsonl:7 at column 81",
        "exact duplicates 120",
        "email masked 5",
        "duplicates across splits 13",
        "tickets.jsonl tickets 7,003 1,234,567",
        "tickets.jsonl: read as alpaca",
    ):
        assert line in text, line


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    _rejects(tmp_path)
    manifest = _manifest(name=_EVIL)
    manifest["dataset"]["license"] = manifest["notes"][0] = manifest["sources"][0]["path"] = _EVIL
    manifest["splits"]["train"]["by_source"] = {_EVIL: _counts(1, 1, 1), "b": _counts(1, 1, 1)}
    manifest["mix"] = {_EVIL: {"epochs": 1.0, "tokens": 1}}
    shown = ShownText([(_EVIL, False), (f"{_EVIL}\x1b[31m", True)], 5, 2)
    page = _page(tmp_path, manifest, [ShownSample(_EVIL, "train", shown)])
    assert "<script" not in page and page.count("&lt;script&gt;") >= 9
    assert "<mark>&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;\\x1b[31m</mark>" in page
    assert not re.search(r"""https?:|\ssrc=|<link|@import|url\(|\son\w+=""", page)


def test_pairs_and_votes_show_their_labels(tmp_path: Path) -> None:
    good, bad = (ShownText([("q", False), (text, True)], 3, 2) for text in ("good", "bad"))
    pair, vote = ShownSample("p:1", "train", good, rejected=bad), ShownSample("v:1", "train", bad, liked=False)
    page = _page(tmp_path, _manifest() | {"rejects": {"total": 0, "by_reason": {}}}, [pair, vote])
    assert page.index(">chosen<") < page.index("<mark>good</mark>") < page.index(">rejected<")
    assert page.index("<mark>bad</mark>") < page.index(">not liked<")


@pytest.mark.parametrize("lacking", ["kind", "too_long", "mix", "duplicates", "rejects", "notes"])
def test_a_manifest_that_lacks_a_key_has_no_such_section(tmp_path: Path, lacking: str) -> None:
    _rejects(tmp_path)
    manifest = _manifest()
    del manifest[lacking]
    for key in ("truncated", "by_source", "packing_fill", "length_histogram"):
        manifest["splits"]["train"].pop(key)
    page = _page(tmp_path, manifest)
    assert "train" in page and "Packing fill" not in page and "Rows cut" not in page
    assert ("Mixture" in page) == (lacking != "mix") and ("<h2>Notes" in page) == (lacking != "notes")


def test_the_same_inputs_give_the_same_bytes_and_however_much_there_is_it_stays_a_page(tmp_path: Path) -> None:
    _rejects(tmp_path)
    manifest = _manifest()
    manifest["sources"] *= 1000
    document = ShownSample("book:1", "train", ShownText([("word " * 200_000, True)], 200_000, 199_999))
    assert _page(tmp_path, manifest) == _page(tmp_path, json.loads(json.dumps(manifest)))
    page = _page(tmp_path, manifest, [document])
    assert len(page) < 60_000 and "and 950 more" in page and "[… 994,000 characters …]" in page


def test_the_summary_is_a_dozen_lines_with_every_kind_of_figure(tmp_path: Path) -> None:
    manifest = _manifest()
    manifest["notes"] *= 20
    found = {"exact": 7, "near": 0, "across_splits": 2, "removed": 0}
    kept = "\n".join(summary_lines(manifest | {"duplicates": found}, tmp_path))
    assert "7 rows repeat another, 2 across splits; dedup=exact takes them out" in kept
    lines = summary_lines(manifest, tmp_path)
    text = "\n".join(lines)
    assert len(lines) <= 15
    for part in (
        "train       8,000 rows, 2,480,000 tokens, 40% supervised, longest 1,024",
        "faq: 1,000 rows, 620,000 tokens, 15% supervised",
        "mixture     an epoch shows tickets 1 times, faq 3.5 times: 4,030,000 tokens",
        f"3 rows: 2 malformed JSON, 1 no end token; see {tmp_path / 'rejects.jsonl'}",
        "cleaned     5 email masked",
        "164 removed (120 exact, 44 near; 13 across splits)",
        "16 rows to max_length, 1,440 tokens away",
        "fill 95.4% at 1024, 98.7% at 2048",
        f"{tmp_path / 'report.html'}; 17 more notes there",
    ):
        assert part in text, part
