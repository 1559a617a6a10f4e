"""Files of every kind give the same records; broken rows and files are named with file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from configs.schema.dataset import RecordFormat, SplitBy
from data_prep import json_array, raw
from data_prep.dataset import Dataset, Holdout
from data_prep.readers import read_chunks
from data_prep.records import Record, Reject, TextRecord
from data_prep.sources import FilesDataset
from tests.unit.prep_kit import files, write_jsonl

_ROWS = [{"prompt": f"q{i}", "completion": f"a{i}\nß 授权"} for i in range(700)]


def _pack(path: Path) -> Any:
    if path.suffix == ".zst":
        return pa.output_stream(path, compression="zstd")
    packs: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return packs.get(path.suffix, open)(path, "wb")


def _write(path: Path) -> None:
    kind = path.name.split(".")[1]
    table = pa.Table.from_pylist(_ROWS)
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=300)
    elif kind == "arrow":
        opened = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with opened(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        with _pack(path) as packed, io.TextIOWrapper(packed, "utf-8-sig", newline="") as file:
            if kind in ("csv", "tsv"):
                out = csv.DictWriter(file, list(_ROWS[0]), delimiter="," if kind == "csv" else "\t")
                out.writeheader()
                out.writerows(_ROWS)
            elif kind == "json":
                json.dump(_ROWS, file, indent=2, ensure_ascii=False)
            else:
                file.write("\r\n".join(json.dumps(row) for row in _ROWS))


def _rows_of(dataset: Dataset) -> list[tuple[str | None, object]]:
    """(fixed split, record or reject), as workers see them: payloads travel, parts do not."""
    dataset.open()
    return [
        (part.split, row.item)
        for part in dataset.parts()
        for chunk in part.chunks()
        for row in part.rows(pickle.loads(pickle.dumps(chunk.payload)))
    ]


def _rows(path: Path | str, **settings: object) -> list[tuple[str | None, object]]:
    return _rows_of(FilesDataset(files(path, **settings)))


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.jsonl.zst",
        "a.ndjson.bz2",
        "a.json",
        "a.json.xz",
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
    monkeypatch.setattr(raw, "CHUNK_BYTES", 999)
    _write(tmp_path / name)
    records = [record for _, record in _rows(tmp_path / name)]
    part = FilesDataset(files(tmp_path / name)).parts()[0]
    chunks = list(part.chunks())
    assert len(chunks) >= 9 and chunks[-1].stored == part.source.bytes
    for k in (0, 3, len(chunks) - 1):  # reading begins again after any chunk
        assert [c.payload for c in part.chunks(chunks[k].end)] == [c.payload for c in chunks[k + 1 :]]
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
    monkeypatch.setattr(raw, "MAX_ROW_BYTES", 200)
    monkeypatch.setattr(raw, "CHUNK_BYTES", 64)
    good = {"prompt": "q", "completion": "a"}
    path = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            b'{"prompt": "q", ',
            b'{"prompt": "q\xff", "completion": "a"}',
            [1],
            good,
            b"",
            b"x" * 5000,
            {"prompt": "q"},
            good,
            b'{"prompt": "q", "prompt": "r", "completion": "a"}',
            b'{"prompt": "q", "compl',
        ],
    )
    path.write_bytes(path.read_bytes()[:-1])
    rejects = [r for _, r in _rows(path) if isinstance(r, Reject)]
    assert [(r.origin.line, r.reason) for r in rejects] == [
        (1, "malformed JSON"),
        (2, "invalid UTF-8"),
        (3, "a row is not an object"),
        (6, "row too long"),
        (7, "missing column"),
        (9, "a key stands twice"),
        (10, "malformed JSON"),
    ]
    assert rejects[-1].detail.endswith("the file ends here, without a line break")
    assert [r.origin.line for _, r in _rows(path) if isinstance(r, Record)] == [4, 8]


def test_broken_rows_of_tables_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", 1)
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\nq,a\nq\nq,\xff\nq,a\n")
    assert [str(r.reason) for _, r in _rows(tmp_path / "a.csv") if isinstance(r, Reject)] == [
        "wrong number of fields",
        "invalid UTF-8",
    ]
    (tmp_path / "a.json").write_bytes(
        b'[{"text": "a"}, 12, {"text": "\xff"}, null, {"text": "b", "text": "c"}, {"text": "d"}]'
    )
    rows = [r for _, r in _rows(tmp_path / "a.json")]
    assert [type(r) for r in rows] == [TextRecord, Reject, Reject, Reject, Reject, TextRecord]


_NOISE = b"".join(b'{"text": "%d"}\n' % (i * 2654435761 % 2**32) for i in range(99_999))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "a"},\n {"text": "b"},\n {"text": nope}]', r"a\.json:3: malformed JSON"),
        ("a.json", b'[{"text": "a"},\n {"text": "b', r"a\.json:2: malformed JSON"),
        ("a.json", b'[{"text": "a"}\n', r"a\.json:2: expected ',' or '\]', found the end"),
        ("a.json", b'{\n "data": []\n}', "neither a list of objects"),
        (
            "a.jsonl.gz",
            gzip.compress(_NOISE)[:-20],
            r"a\.jsonl\.gz:\d{5}: the gz file is damaged somewhere behind line",
        ),
        ("a.jsonl.bz2", bz2.compress(_NOISE)[:-20], r"the bz2 file is damaged"),
        ("a.jsonl.xz", lzma.compress(_NOISE)[:-20], r"the xz file is damaged"),
        ("a.jsonl.zst", pa.Codec("zstd").compress(_NOISE).to_pybytes()[:-20], r"the zst file is damaged"),
        ("a.jsonl.gz", b"no gzip", "gz file is damaged"),
        ("a.csv", b'text\n"never closed\n', r"a\.csv:2: the table is broken here"),
        ("a.parquet", b"PAR1 torn", "cannot be read"),
        ("a.arrow", b"ARROW1 torn", "cannot be read"),
        ("a.arrow", b"", "the file is empty"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "UTF-16"),
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
    write_jsonl(tmp_path / ".hidden/linked/y.jsonl", [{"text": "linked"}])
    (tmp_path / "link").symlink_to(tmp_path / ".hidden/linked")
    dataset = FilesDataset(files(tmp_path))
    assert [(split, r.text) for split, r in _rows_of(dataset)] == [  # type: ignore[attr-defined]
        ("test", "test.jsonl"),
        (None, "testimonies.jsonl"),
        (None, "train/a.jsonl"),
        (None, "train/b.jsonl"),
        ("validation", "val-00001.jsonl"),
    ]
    assert sum("passed over" in note for note in dataset.notes) == 3
    assert any("link: passed over, a link to a folder" in note for note in dataset.notes)
    assert len(_rows(f"{tmp_path}/**/*.jsonl")) == 6  # a glob sees no hidden folders, and follows links
    with pytest.raises(DataError, match="test.jsonl: the same file is read twice, for test and train"):
        _rows(tmp_path / "test.jsonl", test_path=str(tmp_path / "train/../test.jsonl"))
    elsewhere = write_jsonl(tmp_path.parent / f"{tmp_path.name}-held.jsonl", [{"text": "held out"}])
    replaced = [r.text for split, r in _rows(tmp_path, test_path=str(elsewhere)) if split == "test"]  # type: ignore[attr-defined]
    assert replaced == ["held out"]


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "tickets.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"dataset.path=.*no such file.*did you mean '.*tickets.jsonl'"):
        _rows(tmp_path / "ticket.jsonl")
    with pytest.raises(DataError, match=r"did you mean '.*tickets.jsonl'"):
        _rows(tmp_path / "tickets.json")
    with pytest.raises(DataError) as caught:
        _rows(tmp_path / "brackets.jsonl")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(DataError, match="no file that can be read matches"):
        _rows(f"{tmp_path}/*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file"):
        _rows(tmp_path / "empty")
    with pytest.raises(DataError, match="plain text, not alpaca"):
        (tmp_path / "a.txt").write_text("a")
        _rows(tmp_path / "a.txt", format=RecordFormat.alpaca)


def test_a_fraction_is_taken_of_a_file_called_train_too_and_not_where_a_split_has_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"text {i}"} for i in range(200)])
    (part,) = FilesDataset(files(tmp_path, test_fraction=0.2)).parts()
    assert part.split is None and part.holdout == Holdout(SplitBy.content, 0.0, 0.2)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "held out"}])
    dataset = FilesDataset(files(tmp_path, test_fraction=0.2))
    assert [(part.split, part.holdout) for part in dataset.parts()] == [("test", None), (None, None)]
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
    buffers = [None, pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3)), pa.py_buffer(b"a\xffb")]
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)}), tmp_path / "a.parquet")
    rows = [row for _, row in _rows(tmp_path / "a.parquet")]
    assert [str(row.origin)[-2:] for row in rows if isinstance(row, Reject)] == [":2"]
    assert [row.text for row in rows if isinstance(row, TextRecord)] == ["a", "b"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_share_their_values_are_read_like_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice of a dictionary or a view takes all values of the column with it: 40 kB here, and no row is so long."""
    monkeypatch.setattr(raw, "MAX_ROW_BYTES", 20_000)
    monkeypatch.setattr(raw, "CHUNK_BYTES", 10_000)
    texts = [f"{i:03} " * 20 for i in range(500)]
    turns = pa.ListArray.from_arrays(pa.array(range(501), pa.int32()), pa.array(texts).dictionary_encode())
    table = pa.table(
        {"text": pa.array(texts).dictionary_encode(), "turns": turns, "view": pa.array(texts, pa.string_view())}
    )
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table.unify_dictionaries())
    chunks = list(read_chunks(tmp_path / f"a.{kind}", "a"))
    rows = [row.value for chunk in chunks for row in chunk.payload.rows()]
    assert rows == [{"text": text, "turns": [text], "view": text} for text in texts]
    assert len(chunks) < 60


def test_a_hub_id_goes_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "org/name/train.jsonl", [{"prompt": "q", "completion": f"a{i}"} for i in range(300)])
    write_jsonl(tmp_path / "org/name/test.jsonl", [{"prompt": "q", "completion": "t"}])
    dataset = FilesDataset(files("hf://org/name", test_path="hf://org/name:test"))
    rows = _rows_of(dataset)
    assert [s for s, _ in rows] == [None] * 300 + ["test"]
    assert rows[299][1].id == "hf://org/name:300"  # type: ignore[union-attr]
    assert len({part.sha256() for part in dataset.parts()}) == 2
    with pytest.raises(DataError, match="hf://org/name:nope: cannot be loaded"):
        _rows("hf://org/name:nope")
    with pytest.raises(DataError, match=r"allowed: hf://org/name\[@revision\]"):
        _rows("hf://name")


def test_what_only_some_files_have(tmp_path: Path) -> None:
    rows = [{"frage": "q", "antwort": "a", "sys": "s"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", [{"frage": "q", "antwort": "a"}])
    columns = {"prompt": "frage", "completion": "antwort", "system": "sys"}
    dataset = FilesDataset(files(tmp_path, columns=columns))
    assert [len(r.messages) for _, r in _rows_of(dataset)] == [3, 2]  # type: ignore[attr-defined]
    assert any("b.jsonl" in note and "without sys, which other files have" in note for note in dataset.notes)
    write_jsonl(tmp_path / "c.jsonl", [{"frage": "q"}])
    with pytest.raises(DataError, match=r"c\.jsonl: the format cannot be told .* from the columns frage"):
        _rows(tmp_path, columns=columns)


def test_the_kinds_of_one_file_changed_in_its_middle(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}] * 30 + [{"text": "t"}] * 2)
    rows = [row for _, row in _rows(path)]
    assert [(r.origin.line, r.reason) for r in rows if isinstance(r, Reject)] == [
        (31, "missing column"),
        (32, "missing column"),
    ]


def test_a_preview_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*({"text": f"text {i:06d}"} for i in range(90_000)), b"{"])
    (preview,) = FilesDataset(files(path, test_fraction=0.5)).preview(100)
    assert (preview.split, len(preview.items), preview.source.path) == (None, 100, str(path))
    assert preview.recognised.startswith("text (")
    assert abs(preview.source.bytes / preview.bytes_read * 100 / 90_000 - 1) < 0.01
    (whole,) = FilesDataset(files(path)).preview(10**6)
    assert whole.bytes_read == whole.source.bytes and isinstance(whole.items[-1], Reject)
