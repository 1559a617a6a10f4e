"""What holds for every test."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterator

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # Before torch is there. Threads of several processes on one core wait for each other, and spin while they do.
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

OUTCOMES = "CROSSTUNE_CELLS"
"""Environment variable of `make families`: file that takes a line per test of a cell."""

pytest_plugins = ["tests.slurm_cluster", "tests.standin"]


@pytest.fixture(scope="session", autouse=True)
def signals_are_heard() -> None:
    """A shell makes what runs in the background deaf to Ctrl-C, nohup to a hangup; our commands would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """The command, called in this process, sends the log to the standard output of its test: it goes with the test."""
    loggers = [logging.getLogger(name) for name in ("train", "data_prep")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The command, called in this process, sets what libraries read on import: no process of another test has that."""
    before = dict(os.environ)
    yield
    if dict(os.environ) != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """A test of cells of the table of families leaves its outcome where `make families` looks for it."""
    report = yield
    file, marks = os.environ.get(OUTCOMES), list(item.iter_markers("cell"))
    if file and marks and (report.when == "call" or not report.passed):
        name = item.callspec.params["name"]
        with open(file, "a") as out:
            for column in {column for mark in marks for column in mark.args}:
                out.write(json.dumps({"name": name, "column": column, "outcome": report.outcome}) + "\n")
    return report
