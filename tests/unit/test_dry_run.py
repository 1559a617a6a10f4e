"""`crosstune prep --dry-run`: foretells what a preparation does, and writes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.errors import DataError
from configs.schema.roots import PrepConfig
from data_prep.dry_run import ROWS, DryRun, dry_run
from data_prep.prepare import prepare
from launchers import cli
from tests.tiny import save_tiny_model
from tests.unit.prep_kit import write_jsonl


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def _good(i: int) -> dict[str, str]:
    return {"prompt": f"question {i}", "completion": f"answer {i} to a@b.org"}


_EMPTY, _LONG = {"prompt": "q", "completion": ""}, {"prompt": "q", "completion": "long " * 2000}


def _config(tmp_path: Path, model: Path, *words: str) -> PrepConfig:
    cfg = compose("prep", [f"model.path={model}", f"cache_dir={tmp_path / 'cache'}", *words])
    assert isinstance(cfg, PrepConfig)
    return cfg


def _dry(tmp_path: Path, model: Path, *words: str) -> DryRun:
    return dry_run(_config(tmp_path, model, *words), model)


def _command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, *words: str) -> int:
    monkeypatch.setattr(cli, "_prepare_process", lambda cfg: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # the command sets it; here it is taken back
    return cli.main(["prep", "--dry-run", f"model.path={model}", f"cache_dir={tmp_path / 'cache'}", *words])


def _tree(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_of_a_small_file_it_foretells_exactly_what_a_preparation_does(tmp_path: Path, model: Path) -> None:
    rows = [*map(_good, range(60)), b"{", _EMPTY, _LONG, _EMPTY]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    words = [f"dataset.path={path}", "too_long=truncate_right", "clean.mask_pii=[email]", "max_length=300"]
    found = _dry(tmp_path, model, *words)
    made = prepare(_config(tmp_path, model, *words), model, out=tmp_path / "out").manifest
    train = made["splits"]["train"]
    (outlook,) = found.outlooks
    assert outlook.is_whole and found.rows == 64 and outlook.kept == train["rows"] == 61
    assert found.tokens == train["tokens"] and outlook.counts.supervised == train["supervised_tokens"]
    assert {"rows": outlook.counts.cut_rows, "tokens": outlook.counts.cut_tokens} == train["truncated"]
    assert {reason: len(rejects) for reason, rejects in outlook.by_reason.items()} == made["rejects"]["by_reason"]
    assert found.fills == train["packing_fill"] and outlook.changed["email masked"] == 60
    assert found.splits == {"train": 61} and found.faults == found.doubts == found.untold == []


def test_of_a_large_file_it_estimates_the_whole(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [_good(i) for i in range(5000)])
    found = _dry(tmp_path, model, f"dataset.path={path}", "dataset.test_fraction=0.2", "dedup=exact")
    (outlook,) = found.outlooks
    assert outlook.read == ROWS and not outlook.is_whole
    assert found.rows == pytest.approx(5000, rel=0.1) and found.tokens == pytest.approx(
        50 * outlook.counts.tokens, rel=0.1
    )
    assert found.splits == pytest.approx({"train": 0.8 * found.rows, "test": 0.2 * found.rows}, rel=0.01)
    assert found.rows_per_second > 0
    assert found.untold == [
        "faults and lengths of later rows",
        "how many rows are duplicates",
        "which rows are held out",
    ]
    text = "\n".join(found.lines())
    for part in ("rows        100 read: 100 kept", "prompt_completion (columns", "supervised", "full at 1024"):
        assert part in text, part


def test_nothing_is_written(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [_good(i) for i in range(300)])
    before = _tree(tmp_path)
    assert _command(monkeypatch, tmp_path, model, f"dataset.path={path}", f"out={tmp_path / 'out'}") == 0
    assert _tree(tmp_path) == before and {p.name for p in tmp_path.iterdir()} == {"rows.jsonl"}


def test_rejects_are_told_with_their_places(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [_good(0), _EMPTY, b"{", _EMPTY, _EMPTY])
    text = "\n".join(_dry(tmp_path, model, f"dataset.path={path}").lines())
    assert f"3 empty assistant turn: {path}:2 (turn 2), {path}:4 (turn 2) and 1 more" in text
    assert f"1 malformed JSON: {path}:3 (" in text


def test_a_mixture_says_how_often_each_source_is_shown(tmp_path: Path, model: Path) -> None:
    big = write_jsonl(tmp_path / "big.jsonl", [_good(i % 10) for i in range(3000)])
    small = write_jsonl(tmp_path / "small.jsonl", [_good(i % 10) for i in range(30)])
    sources = f"dataset.sources={{big: {{path: {big}, weight: 3}}, small: {{path: {small}}}}}"
    found = _dry(tmp_path, model, "dataset=mix", "dataset.mixing=weight", sources)
    # An epoch has the tokens of 3030 rows, three quarters of them of the big source.
    assert found.epochs == pytest.approx({"big": 0.7575, "small": 25.25}, rel=0.02)
    assert [sample.id.rpartition("/")[2] for sample in found.samples] == ["big.jsonl:1", "small.jsonl:1"]


@pytest.mark.parametrize(
    ("rows", "words", "told"),
    [
        ([_EMPTY] * 5, [], "none of the 5 rows read can be used"),
        ([], [], "holds no records at all"),
        ([_good(0), *[_EMPTY] * 5], ["dataset.max_rejects=4"], "more than dataset.max_rejects=4 rows are at fault"),
        ([{"foo": 1}] * 3, [], "the format cannot be told"),
        ([_good(0)], ["dataset.format=alpaca"], "no column 'instruction'"),
        ("two kinds", [], "holds pairs and samples; a folder of prepared data holds one kind"),
    ],
)
def test_where_a_preparation_would_stop_the_exit_code_is_2_and_so_does_the_real_one(
    rows: Any,
    words: list[str],
    told: str,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    pairs = [{"prompt": "q", "chosen": "yes", "rejected": "no"}]
    files = {"a": [_good(0)], "b": pairs} if rows == "two kinds" else {"rows": rows}
    for name, content in files.items():
        write_jsonl(tmp_path / f"data/{name}.jsonl", content)
    words = [f"dataset.path={tmp_path / 'data'}", *words]
    assert _command(monkeypatch, tmp_path, model, *words) == 2
    assert told in capsys.readouterr().err
    with pytest.raises(DataError):
        prepare(_config(tmp_path, model, *words), model)


def test_what_would_probably_go_wrong_is_said_and_is_no_fault(tmp_path: Path, model: Path) -> None:
    rows = [_EMPTY if i % 10 == 0 else _good(i) for i in range(3000)]
    write_jsonl(tmp_path / "data/a.jsonl", rows)
    write_jsonl(tmp_path / "data/b.jsonl", [_LONG] * 3)
    found = _dry(tmp_path, model, f"dataset.path={tmp_path / 'data'}", "dataset.max_rejects=30")
    assert found.faults == []
    assert found.doubts[0].endswith("b.jsonl: none of the 3 rows read can be used")
    assert "above dataset.max_rejects=30" in found.doubts[1]


def test_the_machine_form_has_findings_and_faults(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[dict[str, Any]] = []
    monkeypatch.setattr(cli, "_json_channel", lambda: None)
    monkeypatch.setattr(cli, "_print_json", lambda content, out: printed.append(json.loads(json.dumps(content))))
    path = write_jsonl(tmp_path / "rows.jsonl", [_good(0), _EMPTY, _EMPTY])
    words = [f"dataset.path={path}", "dataset.max_rejects=1", "--json"]
    assert _command(monkeypatch, tmp_path, model, *words) == 2
    (content,) = printed
    assert content["exit_code"] == 2 and "max_rejects=1" in content["errors"][0]["found"]
    assert content["sources"][0]["left_out"]["empty assistant turn"]["first"][0]["line"] == 2
    assert content["samples"][0]["parts"][0]["pieces"][-2] == {"text": "answer 0 to a@b.org<|im_end|>", "learned": True}


def test_prepared_data_is_pointed_out(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [_good(0), _good(1)])
    prepare(_config(tmp_path, model, f"dataset.path={path}"), model, out=tmp_path / "out")
    assert _command(monkeypatch, tmp_path, model, f"dataset.path={tmp_path / 'out'}") == 0
    assert "is prepared data and would be used as it is" in capsys.readouterr().out
