"""report.html: self-contained, escaped, and there from the first minute of a run on."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs.errors import CheckpointError, StorageError
from tests.unit.fake_run import fake_run
from train.observe.charts import MAX_POINTS, smoothed, thinned
from train.observe.report import write_report
from train.run_folder import RunFolder

VOID = {"meta", "br", "img", "link", "path", "use", "rect"}


class Balanced(HTMLParser):
    """Collects headings and checks that every element is closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def page_of(run: RunFolder) -> tuple[str, Balanced]:
    text = write_report(run).read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    return text, parser


def test_a_finished_run_shows_everything_and_loads_nothing(tmp_path: Path) -> None:
    text, parser = page_of(fake_run(tmp_path))
    assert parser.tags.count("svg") == 6
    for title in ("Loss per supervised token", "Learning rate", "Tokens per second", "Peak memory", "Samples by"):
        assert title in text
    summary = json.loads((tmp_path / "licenses-demo" / "summary.json").read_text())
    assert f"{summary['tuned']['exact_match']:.1%}" in text and f"{summary['tuned']['perplexity']:,.3f}" in text
    assert text.count('class="example"') == 10
    assert "Where the tuned model errs most" in text and "32 of 32 answers" in text
    assert "batch_tokens: 600" in text and "CC-BY-4.0" in text
    assert len(text) < 2_000_000
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    loaded = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", text) + re.findall(r"url\((?!#)([^)]+)\)", text)
    assert loaded == []


def test_what_came_from_data_is_escaped(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    lines = [json.loads(line) for line in (run.eval / "tuned.jsonl").read_text().splitlines()]
    for line in lines:
        line["answer"] = line["prompt"] = line["id"] = "<script>alert(1)</script>\u2028&amp;"
    (run.eval / "tuned.jsonl").write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines))
    text, parser = page_of(run)
    assert "script" not in parser.tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\u2028&amp;amp;" in text


def test_prompts_are_shown_without_what_they_share(tmp_path: Path) -> None:
    text, _ = page_of(fake_run(tmp_path))
    assert "This program is free software &lt;you&gt; can redistribute" in text
    examples = text.partition("Answers before and after")[2].partition("How it was")[0]
    assert "Give the licence expression." not in examples


@pytest.mark.parametrize("steps", [0, 1, 57])
def test_a_run_that_only_trained_has_a_page(tmp_path: Path, steps: int) -> None:
    run = fake_run(tmp_path, steps=steps, measured=False)
    text, parser = page_of(run)
    assert parser.tags.count("svg") == (6 if steps else 1)
    assert "Not measured on held-out data" in text and "Answers before" not in text


def test_prepared_data_that_has_gone_leaves_the_rest(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    (tmp_path / "data" / "manifest.json").unlink()
    text, parser = page_of(run)
    assert parser.tags.count("svg") == 5 and "Samples by length" not in text


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert page_of(run)[0] == page_of(run)[0]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the folder of a run"):
        write_report(RunFolder(tmp_path))


def test_a_page_that_cannot_be_written_is_the_users_fault_to_mend(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.report.mkdir()
    with pytest.raises(StorageError, match=r"report\.html.*cannot be written: Is a directory"):
        write_report(run)
    assert not list(run.path.glob(".report.html*"))


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    points = [(float(i), float(i % 7)) for i in range(100_003)]
    thin = thinned(points)
    assert len(thin) <= MAX_POINTS and thin[0] == points[0] and thin[-1] == points[-1]
    assert smoothed([(i, 5.0) for i in range(50)]) == [(i, pytest.approx(5.0)) for i in range(50)]
    flat = smoothed([(i, float(i % 2)) for i in range(1000)])
    assert all(0.4 < y < 0.6 for _, y in flat)
