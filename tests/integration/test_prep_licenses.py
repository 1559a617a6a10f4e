"""The demo's data as it really is: the rule files of the installed package `licensedcode-data`."""

from __future__ import annotations

import re
import time
from collections import Counter

from configs.compose import compose
from configs.schema.roots import RunConfig
from data_prep.licenses import LicensesDataset
from data_prep.records import Record


def _runs(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def test_the_demo_has_enough_to_learn_and_nothing_alike_on_both_sides() -> None:
    cfg = compose("run", ["experiment=licenses"])
    assert isinstance(cfg, RunConfig)
    started = time.monotonic()
    rows = [(split, r) for split, r in LicensesDataset(cfg.dataset, seed=cfg.seed).rows() if isinstance(r, Record)]  # type: ignore[arg-type]
    assert time.monotonic() - started < 60  # a few seconds; the bound only catches a quadratic mistake
    by_split = {s: [r for split, r in rows if split == s] for s in ("train", "validation", "test")}
    assert len(by_split["test"]) >= 300
    assert len(by_split["train"]) > 2000
    labels = Counter(r.messages[-1].content for r in by_split["test"])
    assert 40 <= len(labels) <= 60
    assert min(labels.values()) >= 3
    assert not [label for label in labels if label.startswith(("unknown", "other-", "free-unknown", "proprietary"))]
    assert set(labels) == {r.messages[-1].content for r in by_split["train"]}
    # Every pair, without the index that took the near-duplicates out.
    test = [_runs(r.messages[-2].content) for r in by_split["test"]]
    for record in by_split["train"] + by_split["validation"]:
        one = _runs(record.messages[-2].content)
        assert not any(len(one & other) >= 0.8 * len(one | other) for other in test), record.id
