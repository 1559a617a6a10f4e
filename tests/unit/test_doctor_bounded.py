"""Processes that load drivers: what they print, that they fail or hang, holds up neither each other nor the doctor."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from configs.compose import compose
from launchers.doctor import bounded, device
from launchers.doctor.nodes import allreduce
from launchers.doctor.nodes.command import requests_of

NAMES = ("n0", "n1")
LOUD = """#!/bin/sh
# In place of `python -P -m MODULE CONFIG BYTES SECONDS OUT`; rank 0 waits for rank 1, as in an all-reduce.
out=$(dirname "$7")
test $LOCAL_RANK = 0 || head -c 300000 /dev/zero | tr '\\0' '\\n' >&2
echo '{"gb_per_s": 1.5, "silent": [], "error": null}' >"$out/$LOCAL_RANK.json"
while ! test -e "$out/1.json"; do sleep 0.05; done
"""
FAILS = """#!/bin/sh
test $LOCAL_RANK = 0 || { echo Traceback; echo 'OSError: no driver'; echo; } >&2
exit 3
"""
STUCK = """#!/bin/sh
test $LOCAL_RANK = 0 || exec sleep 60
echo '{"gb_per_s": 1.5, "silent": [], "error": null}' >"$7"
"""


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    """What two ranks of a probe, the second ones of a node, came to, each of them a script in place of Python."""

    def run(script: str, seconds: float = 30.0) -> dict[str, Any]:
        (tmp_path / "python").write_text(script)
        (tmp_path / "python").chmod(0o755)
        cfg = compose("doctor_nodes", ["nodes=2", "nproc=2", "device=cpu"])
        asked = replace(requests_of(cfg, NAMES, NAMES)[1], allreduce_seconds=seconds)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(allreduce, "KILL_SECONDS", 0.0)
        return allreduce.probe(asked, "lo")

    return run


def test_a_rank_that_prints_more_than_a_pipe_holds_holds_up_no_other(ranks):
    assert ranks(LOUD) == {"gb_per_s": 1.5, "silent": [], "error": None}


def test_a_rank_that_fails_says_why_or_with_which_code(ranks):
    assert ranks(FAILS) == {"gb_per_s": None, "silent": [], "error": "exit code 3"}
    assert ranks(FAILS.replace("= 0", "= 1"))["error"] == "OSError: no driver"


@pytest.fixture
def immortal(monkeypatch):
    """No process can be killed, as one that sits in a driver; those that were to be are ended after the test."""
    left: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(bounded, "REAP_SECONDS", 1.0)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: left.append(process))
    began = time.monotonic()
    yield left
    seconds = time.monotonic() - began
    for process in left:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert seconds < 20, "nobody waits for it"


def test_a_rank_that_cannot_be_killed_is_left_behind_and_named(ranks, immortal):
    assert ranks(STUCK, 2.0) == {"gb_per_s": None, "silent": [3], "error": "it did not end in time"}
    assert len(immortal) == 1


def test_a_device_whose_driver_never_answers_is_told(tmp_path, immortal, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    cfg = compose("doctor", ["device=ascend"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(device, "PATIENCE_SECONDS", 1)
    (record,) = device.look(cfg, os.environ)
    assert record["name"] == "ascend" and record["reason"].startswith("it did not answer within 1 s")
    assert len(immortal) == 1
