"""The folder of prepared data: whole or not there, the same bytes for the same inputs, reused when nothing changed."""

from __future__ import annotations

import errno
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from configs.errors import ConfigError, DataError, ModelError, StorageError
from data_prep import prepare as prepare_module
from data_prep import shards
from data_prep.prepare import Prepared, prepare
from data_prep.progress import PrepProgress
from data_prep.samples import show_samples
from data_prep.tokenizer import load_tokenizer, tokenizer_sha256
from tests.unit.prep_kit import CHATML, MARKED, files, model_folder, prep_config, write_jsonl

_GOOD = [{"prompt": f"question {i}", "completion": f"answer <b>{i}</b> & more"} for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def _bytes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _table(prepared: Prepared, split: str = "train") -> list[dict[str, Any]]:
    rows = []
    for shard in prepared.manifest["splits"][split]["shards"]:
        with pa.memory_map(str(prepared.path / shard["file"])) as source:
            rows += pa.ipc.open_file(source).read_all().to_pylist()
    return rows


def test_what_is_written_is_what_training_needs(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 16)
    path = write_jsonl(tmp_path / "rows.jsonl", [*_GOOD, b"{", {"prompt": "q", "completion": "long " * 400}])
    seen: list[PrepProgress] = []
    cfg = prep_config(tmp_path, files(path, test_fraction=0.2), max_length=200)
    prepared = prepare(cfg, model, on_progress=seen.append)
    size = path.stat().st_size
    assert seen[-1] == PrepProgress(
        "prepare", 42, sum(s["tokens"] for s in prepared.manifest["splits"].values()), size, size
    )
    rows = _table(prepared)
    entry = prepared.manifest["splits"]["train"]
    assert [s["rows"] for s in entry["shards"]] == [min(16, len(rows) - begin) for begin in range(0, len(rows), 16)]
    assert entry["rows"] == len(rows) == 40 - prepared.manifest["splits"]["test"]["rows"]
    assert entry["tokens"] == sum(len(r["input_ids"]) for r in rows)
    assert entry["max_length"] == max(len(r["input_ids"]) for r in rows)
    assert sum(entry["length_histogram"].values()) == len(rows)
    tokenizer = load_tokenizer(model)
    supervised = 0
    for row in rows:
        (start, end), line = row["spans"], int(row["id"].rsplit(":", 1)[1])
        supervised += end - start
        assert tokenizer.decode(row["input_ids"][start:end]) == _GOOD[line - 1]["completion"] + "<|end|>"
    assert entry["supervised_tokens"] == supervised
    assert prepared.manifest["sources"] == [
        {
            "name": "data",
            "path": str(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": size,
            "rows": 42,
        }
    ]
    assert entry["by_source"] == {"data": {k: entry[k] for k in ("rows", "tokens", "supervised_tokens")}}
    assert entry["packing_fill"].keys() == {"200", "1024", "2048", "4096", "8192"}
    assert prepared.manifest["rejects"] == {
        "total": 2,
        "faults": 1,
        "by_reason": {"longer than max_length": 1, "malformed JSON": 1},
        "by_source": {"data": 2},
    }
    rejects = [json.loads(line) for line in (prepared.path / "rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"]) for r in rejects] == [
        (str(path), 41, "malformed JSON"),
        (str(path), 42, "longer than max_length"),
    ]


def test_the_report_marks_what_is_learned_and_escapes_it(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", _GOOD)
    prepared = prepare(prep_config(tmp_path, files(path)), model)
    page = (prepared.path / "report.html").read_text()
    assert "<mark>answer &lt;b&gt;0&lt;/b&gt; &amp; more&lt;|end|&gt;</mark>" in page
    assert "<b>" not in page
    assert "http" not in page
    shown = show_samples(prepared.path, load_tokenizer(model).decode, 2)
    assert [s.supervised_text for s in shown] == [[_GOOD[i]["completion"] + "<|end|>"] for i in (0, 20)]


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "dbca":
        write_jsonl(
            tmp_path / f"data/{name}.jsonl", [{"prompt": name, "completion": row["completion"]} for row in _GOOD]
        )
    cfg = prep_config(tmp_path, files(tmp_path / "data", validation_fraction=0.2))
    first = prepare(cfg, model, out=tmp_path / "first")
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    second = prepare(cfg, model, out=tmp_path / "second")
    assert not second.reused
    assert _bytes(first.path) == _bytes(second.path)
    assert first.path.joinpath("manifest.json").read_text().count(str(tmp_path / "first")) == 0


def test_it_is_reused_until_something_that_matters_changes(tmp_path: Path, model: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", _GOOD)
    cfg = prep_config(tmp_path, files(path))
    first = prepare(cfg, model)
    again = prepare(prep_config(tmp_path, files(path, max_rejects=7), seed=5), model)
    assert (first.reused, again.reused, again.path, again.manifest) == (False, True, first.path, first.manifest)
    template = tmp_path / "other.jinja"
    template.write_text(MARKED)
    changed = prep_config(tmp_path, files(path))
    changed.template.path = str(template)
    folders = {
        first.path,
        prepare(changed, model).path,
        prepare(prep_config(tmp_path, files(path), max_length=300), model).path,
        prepare(prep_config(tmp_path, files(path, system="s")), model).path,
    }
    with path.open("a") as file:
        file.write('{"prompt": "one", "completion": "more"}\n')
    folders.add(prepare(cfg, model).path)
    assert len(folders) == 5


def test_a_damaged_cache_entry_is_made_again(tmp_path: Path, model: Path) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD)))
    first = prepare(cfg, model)
    before = _bytes(first.path)
    (first.path / "train/shard-00000.arrow").write_bytes(b"torn")
    assert not prepare(cfg, model).reused
    assert _bytes(first.path) == before


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD)))

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "write_report", fail)
        with pytest.raises(KeyboardInterrupt):
            prepare(cfg, model, out=tmp_path / "made/out")
    assert [p.name for p in (tmp_path / "made").iterdir() if not p.name.endswith(".lock")] == []
    killed = tmp_path / "made/.out.making/train"  # as kill -9 leaves it
    killed.mkdir(parents=True)
    (killed / "shard-00000.arrow").write_bytes(b"half")
    assert not prepare(cfg, model, out=tmp_path / "made/out").reused


def test_out_is_never_taken_from_something_else(tmp_path: Path, model: Path) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD)))
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years")
    cfg.overwrite = True
    with pytest.raises(DataError, match="no prepared data; it is left alone"):
        prepare(cfg, model, out=precious)
    assert (precious / "thesis.tex").read_text() == "years"
    out = tmp_path / "out"
    prepare(cfg, model, out=out)
    assert prepare(cfg, model, out=out).reused
    other = prep_config(tmp_path, files(write_jsonl(tmp_path / "other.jsonl", _GOOD[:5])))
    with pytest.raises(DataError, match="holds other prepared data[\\s\\S]*overwrite=true"):
        prepare(other, model, out=out)
    other.overwrite = True
    assert prepare(other, model, out=out).manifest["splits"]["train"]["rows"] == 5
    (out / "train/shard-00000.arrow").unlink()
    other.overwrite = False
    with pytest.raises(DataError, match="shard-00000.arrow: the shard is missing"):
        prepare(other, model, out=out)


def test_two_at_once_make_it_once(tmp_path: Path, model: Path) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD * 20)))
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: prepare(cfg, model), range(2)))
    assert sorted(p.reused for p in both) == [False, True]
    assert both[0].manifest == both[1].manifest


def test_prepared_data_as_the_data_set(tmp_path: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD)))
    made = prepare(cfg, model, out=tmp_path / "out")
    used = prepare(prep_config(tmp_path, files(tmp_path / "out")), model)
    assert (used.path, used.reused, used.manifest) == (made.path, True, made.manifest)
    with pytest.raises(DataError, match="above max_length=10"):
        prepare(prep_config(tmp_path, files(tmp_path / "out"), max_length=10), model)
    with pytest.raises(ConfigError, match="is prepared data already, so there is nothing to write"):
        prepare(prep_config(tmp_path, files(tmp_path / "out")), model, out=tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    other = model_folder(tmp_path_factory.mktemp("other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="with another tokenizer"):
        prepare(prep_config(tmp_path, files(tmp_path / "out")), other)


def test_too_many_bad_rows_stop_with_the_first_of_them(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": "q", "completion": "long " * 500}, *_GOOD, b"{", b"[", {"prompt": "q"}, b"{"]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert prepare(prep_config(tmp_path, files(path, max_rejects=4)), model).manifest["rejects"]["total"] == 5
    with pytest.raises(DataError) as caught:
        prepare(prep_config(tmp_path, files(path, max_rejects=2), name="again", max_length=900), model)
    message = str(caught.value)
    assert "more than dataset.max_rejects=2" in message
    assert "    2 malformed JSON\n    1 missing column\n" in message
    assert f"{path}:42: malformed JSON" in message
    assert f"{path}:44: missing column (completion)" in message
    assert ":1:" not in message  # too long is counted, but no fault of the row
    with pytest.raises(DataError, match=r"holds this data, but 4 rows .* more than dataset.max_rejects=3"):
        prepare(prep_config(tmp_path, files(path, max_rejects=3)), model)


def test_nothing_to_train_on(tmp_path: Path, model: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(DataError, match="holds no records at all"):
        prepare(prep_config(tmp_path, files(empty)), model)
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "q", "completion": ""}] * 3)
    with pytest.raises(DataError, match=r"all 3 rows were left out[\s\S]*bad.jsonl:1: empty assistant turn"):
        prepare(prep_config(tmp_path, files(bad)), model)
    table = tmp_path / "old.csv"
    table.write_bytes("prompt,completion\n问题,答案\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"all 1 rows were left out[\s\S]*remedy: .* iconv -f GB18030 -t UTF-8"):
        prepare(prep_config(tmp_path, files(table)), model)
    held = write_jsonl(tmp_path / "d/test.jsonl", _GOOD)
    with pytest.raises(DataError, match="no record is left for training; there are test"):
        prepare(prep_config(tmp_path, files(held.parent)), model)
    prepare(prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD))), model, out=tmp_path / "all/mine")
    with pytest.raises(DataError, match=r"only prepared data[\s\S]*name the prepared data itself: .*all/mine"):
        prepare(prep_config(tmp_path, files(tmp_path / "all")), model)


def test_a_model_without_tokenizer_or_template(tmp_path: Path) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD)))
    with pytest.raises(ModelError, match="no such folder"):
        prepare(cfg, tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ModelError, match="holds no tokenizer"):
        prepare(cfg, tmp_path / "bare")
    base = model_folder(tmp_path / "base", template=None)
    with pytest.raises(ModelError, match=r"no chat template[\s\S]*template\.path"):
        prepare(cfg, base)
    template = tmp_path / "chat.jinja"
    template.write_text(CHATML)
    cfg.template.path = str(template)
    assert prepare(cfg, base).manifest["splits"]["train"]["rows"] == 40
    plain = prep_config(tmp_path, files(write_jsonl(tmp_path / "text.jsonl", [{"text": "the text"}])))
    assert prepare(plain, base).manifest["splits"]["train"]["rows"] == 1
    cfg.template.path = str(tmp_path / "none.jinja")
    with pytest.raises(ModelError, match=r"template\.path=.*none.jinja"):
        prepare(cfg, base)


def test_the_tokenizers_hash_outlives_saving_it_again(tmp_path: Path, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokenizer("the text", truncation=True, max_length=4)  # leaves its mark in tokenizer.json
    tokenizer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() != (model / "tokenizer.json").read_bytes()
    assert tokenizer_sha256(tmp_path / "again") == tokenizer_sha256(model)
    (tmp_path / "again/qwen.tiktoken").write_text("a vocabulary under a name of its own")
    assert tokenizer_sha256(tmp_path / "again") != tokenizer_sha256(model)


def test_a_place_that_cannot_be_written(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = prep_config(tmp_path, files(write_jsonl(tmp_path / "rows.jsonl", _GOOD)))
    with pytest.raises(StorageError, match="cannot be written"):
        prepare(cfg, model, out=tmp_path / "rows.jsonl/folder/out")
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args: object, **kwargs: object) -> None:
        raise full

    monkeypatch.setattr(prepare_module, "write_report", fail)
    with pytest.raises(StorageError, match=r"No space left on device\n  remedy:  make room; or choose another out"):
        prepare(cfg, model, out=tmp_path / "made/out")
    assert [p.name for p in (tmp_path / "made").iterdir() if not p.name.endswith(".lock")] == []
