"""The engine: the same bytes for any workers, chunks and interruptions; mixtures, splits, duplicates, kinds."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from configs.compose import compose
from configs.errors import ConfigError, CrosstuneError, DataError, RunFailedError, StoppedError
from configs.schema.clean import DedupConfig, DedupScope
from configs.schema.dataset import MixDatasetConfig, Mixing, SplitBy
from configs.schema.roots import PrepConfig
from data_prep import hashes, journal, pool, raw, shards
from data_prep.prepare import Prepared, prepare
from data_prep.progress import PrepProgress
from tests.unit.prep_kit import files, model_folder, prep_config, write_jsonl

_WORDS = "licence notice permission granted copyright holder warranty software source binary".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def _rows(count: int, what: str = "") -> list[object]:
    """Rows of which some repeat, some are broken, some belong to one customer."""
    rows: list[object] = []
    for i in range(count):
        words = " ".join(_WORDS[(i * k) % 10] for k in range(1, 9))
        text = f"{what}{i % (count - 5)} {words}"
        rows.append({"prompt": f"question {text}?", "completion": text, "customer": i % 9})
        if i % 20 == 7:
            rows.append(b'{"prompt": "torn')
    return rows


def _bytes(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def _samples(prepared: Prepared, split: str) -> list[dict[str, Any]]:
    found = []
    for shard in prepared.manifest["splits"].get(split, {"shards": []})["shards"]:
        with pa.memory_map(str(prepared.path / shard["file"])) as source:
            found += [row | {"source": shard["source"]} for row in pa.ipc.open_file(source).read_all().to_pylist()]
    return found


def _batch_sizes(prepared: Prepared) -> Iterator[tuple[int, int]]:
    """(rows, token ids and ends of spans) of each record batch of the training shards."""
    for shard in prepared.manifest["splits"]["train"]["shards"]:
        with pa.ipc.open_file(str(prepared.path / shard["file"])) as reader:
            for batch in map(reader.get_batch, range(reader.num_record_batches)):
                yield batch.num_rows, sum(len(row["input_ids"]) + len(row["spans"]) for row in batch.to_pylist())


def _rejects(prepared: Prepared) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.path / "rejects.jsonl").read_text().splitlines()]


@pytest.fixture(params=["plain", "survey"])
def cfg(request: pytest.FixtureRequest, tmp_path: Path) -> PrepConfig:
    """Two sources in several files, shuffled in the config; with a survey everything that needs one is asked for."""
    for name in ("b/2.jsonl", "b/1.jsonl", "a/x.jsonl.gz", "a/y.jsonl"):
        path = write_jsonl(tmp_path / name.removesuffix(".gz"), _rows(90, name[0]))
        if name.endswith(".gz"):
            import gzip

            (tmp_path / name).write_bytes(gzip.compress(path.read_bytes(), mtime=0))
            path.unlink()
    sources: dict[str, Any] = {"b": {"path": str(tmp_path / "b")}, "a": {"path": str(tmp_path / "a"), "weight": 2}}
    surveyed = request.param == "survey"
    for source in sources.values():
        source |= {"split_by": "group", "split_key": "customer"} if surveyed else {}
        source |= {"validation_fraction": 0.2, "test_fraction": 0.1}
    cfg = prep_config(tmp_path, MixDatasetConfig(sources=sources, mixing=Mixing.weight), workers=1)
    cfg.dedup = DedupConfig(exact=surveyed, near=surveyed, threshold=0.9)
    return cfg


def test_the_same_bytes_whatever_the_workers_chunks_and_orders(
    cfg: PrepConfig, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 50)
    monkeypatch.setattr(shards, "_ROWS_PER_BATCH", 8)
    monkeypatch.setattr(shards, "_NUMBERS_PER_BATCH", 1330)
    first = prepare(cfg, model, out=tmp_path / "first")
    assert len(first.manifest["splits"]["train"]["shards"]) >= 4
    sizes = list(_batch_sizes(first))
    assert all(rows <= 8 and (numbers <= 1330 or rows == 1) for rows, numbers in sizes)
    assert {7, 8} <= {rows for rows, _ in sizes}  # either is a bound of its own
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
    assert isinstance(cfg.dataset, MixDatasetConfig)
    cfg.dataset.sources = dict(reversed(cfg.dataset.sources.items()))
    monkeypatch.setattr(raw, "CHUNK_BYTES", 700)
    cfg.workers = 3
    second = prepare(cfg, model, out=tmp_path / "second")
    assert not second.reused
    assert _bytes(first.path) == _bytes(second.path)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    cfg: PrepConfig, workers: int, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "ROWS_PER_SHARD", 50)
    whole = prepare(cfg, model, out=tmp_path / "whole")
    monkeypatch.setattr(raw, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr("data_prep.passes._PROGRESS_SECONDS", 0.0)
    cfg.workers = workers
    resumed: list[int] = []
    attempts = 0
    while True:
        attempts += 1
        calls = itertools.count()

        def stop(figures: PrepProgress, calls: Iterator[int] = calls) -> None:
            resumed.append(figures.resumed_bytes)
            if next(calls) == 3:
                raise KeyboardInterrupt

        try:
            pieced = prepare(cfg, model, out=tmp_path / "pieced", on_progress=stop)
        except StoppedError as error:
            assert "run the same command again" in str(error)
            assert not (tmp_path / "pieced").exists()
        else:
            break
    assert attempts > 4 and max(resumed) > 0
    assert pieced.notes == ["went on with a preparation that had been interrupted"]
    assert _bytes(pieced.path) == _bytes(whole.path)
    assert [p.name for p in tmp_path.glob(".*.making")] == []


@pytest.mark.parametrize("harm", ["journal", "shard", "rows"])
def test_what_is_left_of_another_preparation_is_not_used(
    harm: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(journal, "SECONDS", 0.0)
    monkeypatch.setattr("data_prep.passes._PROGRESS_SECONDS", 0.0)
    path = write_jsonl(tmp_path / "rows.jsonl", _rows(100))
    cfg = prep_config(tmp_path, files(path), workers=1)
    calls = itertools.count()

    def stop(figures: PrepProgress) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(StoppedError):
        prepare(cfg, model, out=tmp_path / "out", on_progress=stop)
    (work,) = tmp_path.glob(".out.making")
    if harm == "journal":
        (work / "journal.json").write_text("{")
    elif harm == "shard":
        (work / "train/shard-00000.partial").write_bytes(b"short")
    else:
        write_jsonl(path, _rows(101))
    prepared = prepare(cfg, model, out=tmp_path / "out")
    assert prepared.notes[0].startswith("an interrupted preparation was found, but not used")
    assert _bytes(prepared.path) == _bytes(prepare(cfg, model, out=tmp_path / "other").path)


def test_a_mixture_keeps_its_sources_apart(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"b{i}", "completion": "yes"} for i in range(30)])
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"a{i}", "completion": "no"} for i in range(10)])
    sources = {"b": {"path": str(tmp_path / "b.jsonl")}, "a": {"path": str(tmp_path / "a.jsonl"), "epochs": 3}}
    cfg = prep_config(tmp_path, MixDatasetConfig(sources=sources, system="Be kind."))
    prepared = prepare(cfg, model)
    entry = prepared.manifest["splits"]["train"]
    assert [(s["source"], s["rows"]) for s in entry["shards"]] == [("a", 10), ("b", 30)]
    assert {row["source"] for row in _samples(prepared, "train") if "/a.jsonl:" in row["id"]} == {"a"}
    tokens = {name: counts["tokens"] for name, counts in entry["by_source"].items()}
    assert prepared.manifest["mix"] == {
        "a": {"epochs": 3.0, "tokens": 3 * tokens["a"]},
        "b": {"epochs": 1.0, "tokens": tokens["b"]},
    }
    assert [(s["name"], s["rows"]) for s in prepared.manifest["sources"]] == [("a", 10), ("b", 30)]
    sources["c"] = {"path": str(tmp_path / "a.jsonl")}
    with pytest.raises(DataError, match=r"a\.jsonl: is read by two sources, a and c"):
        prepare(prep_config(tmp_path, MixDatasetConfig(sources=sources)), model)


def test_two_sources_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dataset.sources: 'a' stands twice"):
        compose("prep", ["model.path=m", "dataset=mix", "dataset.sources={a: {path: x}, b: {path: z}, a: {path: y}}"])
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/twice.yaml").write_text("dataset:\n  sources:\n    a: {path: x}\n    a: {path: y}\n")
    with pytest.raises(CrosstuneError, match=r"twice\.yaml:4: .*duplicate key a"):
        compose("prep", ["model.path=m", "dataset=mix", "experiment=twice"], config_dir=tmp_path)


def test_splits_by_key_by_group_and_at_random(tmp_path: Path, model: Path) -> None:
    written = (int, str, float)  # as exports write one column
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "customer": written[i % 3](i % 40)} for i in range(400)]
    without = [{"prompt": "q", "completion": "a", **key} for key in ({}, {"customer": " "}, {"customer": float("nan")})]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, *without])
    for by in (SplitBy.key, SplitBy.group):
        settings = files(path, split_by=by, split_key="customer", test_fraction=0.25)
        prepared = prepare(prep_config(tmp_path, settings), model)
        assert prepared.manifest["rejects"]["by_reason"] == {"no split key": 3}
        lines = {s: [int(r["id"].rsplit(":", 1)[1]) for r in _samples(prepared, s)] for s in ("train", "test")}
        customers = {s: {int(rows[line - 1]["customer"]) for line in found} for s, found in lines.items()}
        assert not customers["train"] & customers["test"]
        assert by is SplitBy.key or len(lines["test"]) == 100
    settings = files(path, split_by=SplitBy.random, validation_fraction=0.1, test_fraction=0.25)
    counts = prepare(prep_config(tmp_path, settings), model).manifest["splits"]
    assert {split: entry["rows"] for split, entry in counts.items()} == {"train": 262, "validation": 40, "test": 101}


def test_a_split_key_that_is_no_column_stops_at_once(tmp_path: Path, model: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a", "customer": 1}])
    cfg = prep_config(
        tmp_path, files(tmp_path / "a.jsonl", split_by=SplitBy.key, split_key="custmer", test_fraction=0.5)
    )
    with pytest.raises(ConfigError, match=r"split_key: no column 'custmer'[\s\S]*did you mean customer"):
        prepare(cfg, model)


def test_duplicates_are_counted_or_removed(tmp_path: Path, model: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(20)]
    path = write_jsonl(tmp_path / "train.jsonl", [*rows, rows[3], {"prompt": "what is 4", "completion": "IT IS 4"}])
    write_jsonl(tmp_path / "test.jsonl", [rows[7], rows[7]])
    # What is prepared lies below the records' folder, where nobody takes it for records.
    counted = prepare(prep_config(tmp_path, files(path.parent)), model)
    assert counted.manifest["duplicates"] == {"exact": 4, "across_splits": 1, "removed": 0}
    assert counted.manifest["splits"]["train"]["rows"] == 22
    cfg = prep_config(tmp_path, files(path.parent, max_rejects=0))
    cfg.dedup = DedupConfig(exact=True)
    removed = prepare(cfg, model)
    assert removed.manifest["duplicates"] == {"exact": 4, "across_splits": 1, "removed": 4}
    train, test = str(path), str(path.parent / "test.jsonl")
    assert [(r["file"], r["line"], r["reason"], r["detail"]) for r in _rejects(removed)] == [
        (test, 2, "duplicate", f"of {test}:1"),
        (train, 8, "duplicate", f"of {test}:1"),
        (train, 21, "duplicate", f"of {train}:4"),
        (train, 22, "duplicate", f"of {train}:5"),
    ]
    cfg.dedup = DedupConfig(exact=True, scope=DedupScope.across)
    assert [r["line"] for r in _rejects(prepare(cfg, model))] == [8]


def test_one_folder_holds_one_kind(tmp_path: Path, model: Path) -> None:
    pairs = write_jsonl(
        tmp_path / "d/pairs.jsonl", [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(9)]
    )
    votes = write_jsonl(
        tmp_path / "votes.jsonl", [{"prompt": f"q{i}", "completion": "a", "label": True} for i in range(9)]
    )
    prepared = prepare(prep_config(tmp_path, files(pairs)), model)
    assert prepared.manifest["kind"] == "pairs"
    row = _samples(prepared, "train")[0]
    assert list(row)[:5] == ["input_ids", "spans", "rejected_input_ids", "rejected_spans", "id"]
    entry = prepared.manifest["splits"]["train"]
    assert (entry["rows"], sum(entry["length_histogram"].values())) == (9, 18)
    liked = _samples(prepare(prep_config(tmp_path, files(votes)), model), "train")[0]["liked"]
    assert liked is True
    write_jsonl(tmp_path / "d/samples.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"samples\.jsonl: holds samples, but .*pairs\.jsonl holds pairs"):
        prepare(prep_config(tmp_path, files(tmp_path / "d")), model)


def test_sources_are_hashed_while_rows_are_prepared(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes, "AT_ONCE_BYTES", -1)
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -1.0)
    path = write_jsonl(tmp_path / "rows.jsonl", _rows(50))
    cfg = prep_config(tmp_path, files(path))
    first = prepare(cfg, model)
    assert first.manifest["sources"][0]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("data_prep.sources.file_sha256", lambda *_: pytest.fail("the hash was remembered"))
    assert prepare(cfg, model).reused
    monkeypatch.undo()
    monkeypatch.setattr(hashes, "AT_ONCE_BYTES", -1)
    os.utime(path, (1, 1))  # the same content under another time: found by its hash, though prepared again for it
    assert prepare(cfg, model).reused
    with pytest.raises(DataError, match="has changed while it was read"):
        prepare(cfg, model, out=tmp_path / "out", on_progress=lambda _: path.write_bytes(path.read_bytes() + b"\n"))
    assert not (tmp_path / "out").exists()


def _square(number: int) -> int:
    if number < 0:
        raise DataError("here", "negative", remedy="none")
    time.sleep(0.001 * (number % 7))
    return number * number


def test_the_pool_keeps_the_order_and_its_bounds() -> None:
    drawn: list[int] = []

    def tasks() -> Iterator[tuple[int, int]]:
        for number in range(100):
            drawn.append(number)
            yield number, number

    for tag, result in pool.map_ordered(lambda: _square, tasks(), 3):
        assert result == tag * tag
        assert len(drawn) - tag <= 3 * pool._WINDOW + 1  # the next one is drawn already
    with pytest.raises(DataError, match="here: negative") as caught:
        list(pool.map_ordered(lambda: _square, enumerate([1, 2, -1, 3]), 2))
    assert caught.value.remedy == "none"
    assert not multiprocessing.active_children()


def test_large_tasks_are_done_one_after_the_other() -> None:
    def times(number: int) -> tuple[float, float]:
        began = time.monotonic()
        time.sleep(0.02)
        return began, time.monotonic()

    for size, alone in ((10**9, True), (1000, False)):
        found = [both for _, both in pool.map_ordered(lambda: times, enumerate(range(12)), 3, lambda _, s=size: s)]
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(found)) is alone


def test_a_worker_that_dies_ends_the_work_and_leaves_nobody() -> None:
    def end(number: int) -> int:
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(RunFailedError, match="was ended by SIGKILL: there was not enough memory"):
        list(pool.map_ordered(lambda: end, enumerate(range(100)), 2))
    assert not multiprocessing.active_children()
