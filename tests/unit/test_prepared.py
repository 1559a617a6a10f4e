"""Reading prepared data: what was written comes back, over shards and record batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from configs.errors import DataError
from tests.tiny import samples_of, write_prepared
from train.data.prepared import PreparedData, PreparedSplit

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
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DataError, match="format 99"):
        PreparedData.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        PreparedData.open(folder)
