"""Reading prepared data: what was written comes back, over shards and record batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from tests.tiny import samples_of, write_prepared
from tests.unit import tiny_run
from train.data.mix import Share
from train.data.prepared import PreparedData, PreparedSplit
from train.evaluate.samples import read_samples

LENGTHS = (5, 9, 2, 31, 7, 8, 3)
SPANS = [[[1, 2], [4, 5]], [[3, 9]], [[1, 2]], [[1, 4], [9, 12], [30, 31]], [[6, 7]], [[1, 8]], [[2, 3]]]


def test_samples_lengths_and_supervised_counts_come_back(tmp_path):
    samples = samples_of(LENGTHS, vocab_size=97, spans=SPANS)
    folder = write_prepared(tmp_path / "data", {"train": samples, "test": samples[:2]})
    write_prepared(tmp_path / "more", {"train": samples[::-1]})
    data = PreparedData.open(folder)
    assert data.split_names() == ["test", "train"]
    assert len(data.split("test")) == 2
    shard = "train/shard-00000.arrow"
    split = PreparedSplit(tmp_path, [f"data/{shard}", f"more/{shard}"])
    both = samples + samples[::-1]
    assert split.lengths.tolist() == [len(s.input_ids) for s in both]
    assert split.supervised.tolist() == [sum(b - a for a, b in s.spans) for s in both]
    for i, sample in enumerate(both):
        assert split[i].id == sample.id
        assert np.array_equal(split[i].input_ids, sample.input_ids)
        assert np.array_equal(split[i].spans, sample.spans)


def test_what_is_not_prepared_data_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="no manifest.json"):
        PreparedData.open(tmp_path)
    folder = write_prepared(tmp_path / "data", {"train": samples_of(LENGTHS, vocab_size=97)})
    with pytest.raises(DataError, match="no split 'test'[\\s\\S]*allowed: train"):
        PreparedData.open(folder).split("test")
    (folder / "train" / "shard-00000.arrow").write_bytes(b"torn")
    with pytest.raises(DataError, match="shard-00000.arrow: does not open"):
        PreparedData.open(folder).split("train")
    change(folder, format_version=1)
    with pytest.raises(DataError, match="format 1\n  allowed: 2\n  remedy:  prepare the data again"):
        PreparedData.open(folder)
    change(folder, format_version=2, kind="poems")
    with pytest.raises(DataError, match="damaged: .*poems"):
        PreparedData.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        PreparedData.open(folder)


def change(folder: Path, **keys: object) -> None:
    """Other values in a manifest."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_shard_of_another_preparation_is_noticed(tmp_path):
    folder = write_prepared(tmp_path / "data", {"train": samples_of(LENGTHS, vocab_size=97)})
    other = write_prepared(tmp_path / "other", {"train": samples_of(LENGTHS[:3], vocab_size=97)})
    shard = "train/shard-00000.arrow"
    (folder / shard).write_bytes((other / shard).read_bytes())
    with pytest.raises(DataError, match="'train' hold 3 rows, the manifest says 7"):
        PreparedData.open(folder).split("train")


def test_the_mixture_is_read_by_shard(tmp_path):
    folder = write_prepared(tmp_path / "data", {"train": samples_of(LENGTHS, vocab_size=97)})
    assert PreparedData.open(folder).mix() == ()
    shards = [("faq", 2), ("law", 4), ("faq", 1)]
    splits = {"train": {"shards": [{"file": "", "source": source, "rows": rows} for source, rows in shards]}}
    change(folder, splits=splits, mix={"faq": {"epochs": 0.3, "tokens": 1}, "law": {"epochs": 2, "tokens": 1}})
    assert PreparedData.open(folder).mix() == (Share("faq", 0.3, ((0, 2), (6, 7))), Share("law", 2.0, ((2, 6),)))
    for broken in ({"faq": {"epochs": 1.0}}, {"faq": {"epochs": 1.0}, "law": {"epochs": 0}}, {"faq": 1, "law": 2}):
        change(folder, mix=broken)
        with pytest.raises(DataError, match="damaged mix"):
            PreparedData.open(folder).mix()


@pytest.mark.parametrize(("kind", "remedy"), [("pairs", "dataset.preference=chosen"), ("votes", "dataset.format")])
def test_data_of_another_kind_is_refused_by_name(tmp_path, monkeypatch, kind, remedy):
    monkeypatch.setattr(tiny_run, "write_prepared", lambda *args: write_of_kind(kind, *args))
    with pytest.raises(DataError, match=f"holds {kind}, and objective causal_lm needs samples\n  remedy: .*{remedy}"):
        tiny_run.tiny_run(tmp_path)
    with pytest.raises(DataError, match=f"holds {kind}, and evaluation needs samples\n  remedy: .*{remedy}"):
        read_samples(tmp_path / "data", "test")


def write_of_kind(kind, folder, splits):
    change(write_prepared(folder, splits), kind=kind)
    return folder


def test_a_run_sees_the_mixture(tmp_path, monkeypatch):
    """Half of the tokens an epoch: the second shows the other half, and a step a sample makes it all of them once."""

    def mixed(folder, splits):
        write_prepared(folder, splits)
        change(folder, mix={"tiny": {"epochs": 0.5, "tokens": 113}})
        return folder

    monkeypatch.setattr(tiny_run, "write_prepared", mixed)
    run = tiny_run.tiny_run(tmp_path, "max_steps=0", "epochs=2", "batch_tokens=1")
    assert len(run.metrics.read_text().splitlines()) == len(tiny_run.LENGTHS)
