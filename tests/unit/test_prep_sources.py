"""Files of every kind give the same records; broken rows and files are named with file and line."""

from __future__ import annotations

import csv
import gzip
import json
import os
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from configs.schema.dataset import RecordFormat
from data_prep import json_array, readers
from data_prep.records import Record, Reject, TextRecord
from data_prep.sources import FilesDataset
from tests.unit.prep_kit import files, write_jsonl

_ROWS = [{"prompt": f"q{i}", "completion": f"a{i}\nß 授权"} for i in range(700)]


def _write(path: Path) -> None:
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    table = pa.Table.from_pylist(_ROWS)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=300)
    elif kind == "arrow":
        opened = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with opened(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8-sig", newline="") as file:  # type: ignore[operator]
            if kind in ("csv", "tsv"):
                out = csv.DictWriter(file, list(_ROWS[0]), delimiter="," if kind == "csv" else "\t")
                out.writeheader()
                out.writerows(_ROWS)
            elif kind == "json":
                json.dump(_ROWS, file, indent=2, ensure_ascii=False)
            else:
                file.write("\r\n".join(json.dumps(row) for row in _ROWS))


def _rows(path: Path | str, **settings: object) -> list[tuple[str, object]]:
    return list(FilesDataset(files(path, **settings)).rows())


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.json",
        "a.json.gz",
        "a.csv",
        "a.csv.gz",
        "a.tsv",
        "a.parquet",
        "file.arrow",
        "stream.arrow",
    ],
)
def test_every_kind_gives_the_same_records(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", 37)  # borders of chunks everywhere
    _write(tmp_path / name)
    records = [record for _, record in _rows(tmp_path / name)]
    assert all(isinstance(r, Record) for r in records)
    assert [(r.messages[0].content, r.messages[1].content) for r in records] == [tuple(row.values()) for row in _ROWS]  # type: ignore[attr-defined]
    assert len({r.id for r in records}) == len(_ROWS)  # type: ignore[attr-defined]


def test_lines_are_those_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n  {"text":\n "a"},\n\n  {"text": "b"}, {"text": "c"}\n]')
    (tmp_path / "b.csv").write_text('text\n"one\ntwo"\n\nthree\n')
    (tmp_path / "c.txt").write_text("\n\none\ntwo\n\n\nthree\n")
    ids = {f"{r.origin.line}.{r.origin.part}": r.text for _, r in _rows(tmp_path / "a.json")}  # type: ignore[attr-defined]
    assert ids == {"2.1": "a", "5.1": "b", "5.2": "c"}
    assert [(r.origin.line, r.text) for _, r in _rows(tmp_path / "b.csv")] == [(2, "one\ntwo"), (5, "three")]  # type: ignore[attr-defined]
    assert [(r.origin.line, r.text) for _, r in _rows(tmp_path / "c.txt")] == [(3, "one\ntwo"), (7, "three")]  # type: ignore[attr-defined]


def test_broken_rows_are_rejected_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 200)
    good = {"prompt": "q", "completion": "a"}
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            b'{"prompt": "q", ',
            b'{"prompt": "q\xff", "completion": "a"}',
            [1],
            good,
            b"",
            b"x" * 500,
            {"prompt": "q"},
            good,
        ],
    )
    rejects = [r for _, r in _rows(path) if isinstance(r, Reject)]
    assert [(r.origin.line, r.reason) for r in rejects] == [
        (1, "malformed JSON"),
        (2, "invalid UTF-8"),
        (3, "a row is not an object"),
        (6, "line too long"),
        (7, "missing column"),
    ]
    assert [r.origin.line for _, r in _rows(path) if isinstance(r, Record)] == [4, 8]


def test_broken_rows_of_tables_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", 1)
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\nq,a\nq\nq,\xff\nq,a\n")
    assert [str(r.reason) for _, r in _rows(tmp_path / "a.csv") if isinstance(r, Reject)] == [
        "wrong number of fields",
        "invalid UTF-8",
    ]
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"}, 12, {"text": "\xff"}, null, {"text": "b"}]')
    rows = [r for _, r in _rows(tmp_path / "a.json")]
    assert [type(r) for r in rows] == [TextRecord, Reject, Reject, Reject, TextRecord]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {"text": "b"},\n {"text": nope}]', r"a\.json:3: malformed JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": "b', r"a\.json:2: malformed JSON"),
        ("a.json", b'[{"text": "a"}\n', r"a\.json:2: expected ',' or '\]', found the end"),
        ("a.json", b'{\n "data": []\n}', "neither a list of objects"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-20], "gzip file is damaged"),
        ("a.jsonl.gz", b"no gzip", "gzip file is damaged"),
        ("a.csv", b'text\n"never closed\n', r"a\.csv:2: the table is broken here"),
        ("a.parquet", b"PAR1 torn", "cannot be read"),
        ("a.arrow", b"ARROW1 torn", "cannot be read"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.docx", b"?", r"unknown kind '\.docx'[\s\S]*\.jsonl"),
    ],
)
def test_broken_files_stop(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        _rows(tmp_path / name)


def test_folders_globs_and_their_splits(tmp_path: Path) -> None:
    for place in (
        "train/b.jsonl",
        "train/a.jsonl",
        "val-00001.jsonl",
        "testimonies.jsonl",
        "test.jsonl",
        ".hidden/x.jsonl",
    ):
        write_jsonl(tmp_path / place, [{"text": place}])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("no records")
    dataset = FilesDataset(files(tmp_path))
    assert [(split, r.text) for split, r in dataset.rows()] == [  # type: ignore[union-attr]
        ("test", "test.jsonl"),
        ("train", "testimonies.jsonl"),
        ("train", "train/a.jsonl"),
        ("train", "train/b.jsonl"),
        ("validation", "val-00001.jsonl"),
    ]
    assert sum("passed over" in note for note in dataset.notes) == 2
    assert len(_rows(f"{tmp_path}/**/*.jsonl")) == 5  # a glob does not see hidden folders
    with pytest.raises(DataError, match="test.jsonl: the same file is read twice, for test and train"):
        _rows(tmp_path / "test.jsonl", test_path=str(tmp_path / "train/../test.jsonl"))
    elsewhere = write_jsonl(tmp_path.parent / f"{tmp_path.name}-held.jsonl", [{"text": "held out"}])
    replaced = [r.text for split, r in _rows(tmp_path, test_path=str(elsewhere)) if split == "test"]  # type: ignore[attr-defined]
    assert replaced == ["held out"]


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "tickets.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"dataset.path=.*no such file.*did you mean '.*tickets.jsonl'"):
        _rows(tmp_path / "ticket.jsonl")
    with pytest.raises(DataError, match="no file that can be read matches"):
        _rows(f"{tmp_path}/*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        _rows(tmp_path / "empty")
    with pytest.raises(DataError, match="plain text, not alpaca"):
        (tmp_path / "a.txt").write_text("a")
        _rows(tmp_path / "a.txt", format=RecordFormat.alpaca)


def test_fractions_follow_the_content_not_the_order(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 400}"} for i in range(500)]
    first = write_jsonl(tmp_path / "a.jsonl", rows)
    second = write_jsonl(tmp_path / "b.jsonl", rows[::-1] + [{"text": "one more"}])

    def splits(path: Path) -> dict[str, str]:
        found: dict[str, str] = {}
        for split, record in _rows(path, validation_fraction=0.1, test_fraction=0.2):
            assert isinstance(record, TextRecord)
            assert found.setdefault(record.text, split) == split  # equal records stay together
        return found

    here, there = splits(first), splits(second)
    there.pop("one more")
    assert here == there
    shares = {name: sum(s == name for s in here.values()) / len(here) for name in ("validation", "test")}
    assert abs(shares["validation"] - 0.1) < 0.05
    assert abs(shares["test"] - 0.2) < 0.06


def test_a_fraction_is_taken_of_a_file_called_train_too_and_not_where_a_split_has_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {i}"} for i in range(200)])
    held = [record for split, record in _rows(tmp_path, test_fraction=0.2) if split == "test"]
    assert 20 < len(held) < 60
    write_jsonl(tmp_path / "test.jsonl", [{"text": "held out"}])
    dataset = FilesDataset(files(tmp_path, test_fraction=0.2))
    assert [r.text for split, r in dataset.rows() if split == "test"] == ["held out"]  # type: ignore[union-attr]
    assert any("dataset.test_fraction is not used" in note for note in dataset.notes)


def test_a_table_with_one_column_name_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,prompt\na,b,c\n")
    with pytest.raises(DataError, match="two columns are called 'prompt'"):
        _rows(tmp_path / "a.csv")


def test_names_and_tables_that_are_not_utf8_are_explained(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl"))
    write_jsonl(odd, [{"text": "a"}])
    with pytest.raises(DataError, match="name is not UTF-8"):
        _rows(odd)
    buffers = [None, pa.py_buffer(struct.pack("<2i", 0, 1)), pa.py_buffer(b"\xff")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 1, buffers)}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet: holds text that is not UTF-8"):
        _rows(tmp_path / "a.parquet")


def test_a_hub_id_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "org/name/train.jsonl", [{"prompt": "q", "completion": f"a{i}"} for i in range(300)])
    write_jsonl(tmp_path / "org/name/test.jsonl", [{"prompt": "q", "completion": "t"}])
    dataset = FilesDataset(files("hf://org/name", test_path="hf://org/name:test"))
    rows = list(dataset.rows())
    assert [s for s, _ in rows] == ["train"] * 300 + ["test"]
    assert rows[299][1].id == "hf://org/name:300"  # type: ignore[union-attr]
    assert len({s.sha256 for s in dataset.sources()}) == 2
    with pytest.raises(DataError, match="hf://org/name:nope: cannot be loaded"):
        _rows("hf://org/name:nope")
    with pytest.raises(DataError, match=r"allowed: hf://org/name\[@revision\]"):
        _rows("hf://name")
