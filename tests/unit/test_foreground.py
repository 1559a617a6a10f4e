"""Jobs of the foreground: who is asked after them, from where, and what may hold them up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from configs.compose import compose, save_resolved
from configs.errors import RunFailedError
from configs.schema.launch import LaunchConfig
from launchers import run_dir, status, watch
from launchers.job import Job, JobFolder, Mark, Word
from launchers.local import LocalLauncher
from launchers.spec import make_spec
from launchers.supervise import deferred_stops

TOUCHED_SECONDS = 10


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    """A job of two attempts that this process supervises."""
    cfg = compose("train", ["model.path=m", "dataset.path=d", f"run_dir={tmp_path / 'r'}"])
    options: LaunchConfig = compose("launch", ["launcher=local"])
    folder = JobFolder.of_run(tmp_path / "r")
    job = Job(make_spec("train", cfg, options, folder.request, "20260101"), 1.5, launcher(options).handle(), attempt=1)
    folder.write(job)
    save_resolved(options, folder.options)
    for attempt, code in enumerate((3, 75)):
        folder.mark(Mark(0, attempt, "n0", 1, 1.0, "e", 2.0, code))
    return folder


def launcher(options: LaunchConfig | None = None) -> LocalLauncher:
    options = options or compose("launch", ["launcher=local"])
    return LocalLauncher(options.launcher, options.cluster)


def word(folder: JobFolder) -> Word:
    return launcher().report(folder.read(), folder).word


def test_a_job_between_two_attempts_runs_wherever_one_asks(folder: JobFolder, monkeypatch) -> None:
    """All its machines have ended; its supervisor has not."""
    with watch.watched(folder.read(), folder):
        assert word(folder) is Word.running
        monkeypatch.setattr(socket, "gethostname", lambda: "login2")
        assert word(folder) is Word.running
        an_hour_ago = time.time() - 3600
        os.utime(watch.file_of(folder), (an_hour_ago, an_hour_ago))
        assert word(folder) is Word.ended, "its host is gone, and the run may be resumed"
        assert "60 minutes" in launcher().report(folder.read(), folder).detail
    assert word(folder) is Word.ended
    folder.write(replace(folder.read(), submitted=99.0))
    assert word(folder) is Word.running, "the end was that of the job before"


def test_a_supervisor_gives_signs_of_life_and_notes_the_end_of_each_of_its_jobs(folder, monkeypatch, capsys) -> None:
    """Of a sweep one process supervises all, one after the other; who ends a finished one ends no other."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    with pytest.raises(RuntimeError), watch.watched(folder.read(), folder):
        os.utime(watch.file_of(folder), (1, 1))
        deadline = time.monotonic() + TOUCHED_SECONDS
        while watch.file_of(folder).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise RuntimeError
    monkeypatch.setattr("psutil.Process.kill", lambda process: pytest.fail("it is at work on another job"))
    assert status.cancel(folder.run_dir, hard=True) == {"cancelled": False} and not folder.cancelled
    assert status.status(folder.run_dir)["state"] == "preempted"
    assert "has ended it" in capsys.readouterr().out


def test_a_job_that_was_started_again_is_not_told_as_the_one_before(folder: JobFolder) -> None:
    assert [mark.exit_code for mark in folder.marks()] == [75]
    folder.write(replace(folder.read(), attempt=2))
    found = status.status(folder.run_dir)
    assert (found["state"], found["attempt"], found["nodes"]) == ("running", 2, [])


def test_an_attempt_waits_for_the_lock_of_a_machine_that_was_lost(tmp_path: Path, monkeypatch, capfd) -> None:
    lost = FileLock(tmp_path / run_dir.LOCK, thread_local=False)
    lost.acquire()
    threading.Timer(0.3, lost.release).start()
    with run_dir.alone_in(tmp_path, patient=True):
        assert "waits up to 240 s" in capfd.readouterr().out
    monkeypatch.setattr(run_dir, "LOCK_SECONDS", 0.1)
    with (
        lost,
        pytest.raises(RunFailedError, match=r"after 0 s still") as caught,
        run_dir.alone_in(tmp_path, patient=True),
    ):
        pytest.fail("not alone")
    assert caught.value.exit_code == 3, "which starts it again, unlike a fault of the user's"


def test_what_was_started_to_ignore_a_signal_goes_on_ignoring_it(capfd) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_stops():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert capfd.readouterr().err == ""


def test_ranks_do_not_wait_for_a_terminal_that_takes_nothing(tmp_path: Path) -> None:
    """As after Ctrl-S, or in a pager that is not read on."""
    script = (
        "import os, sys; from pathlib import Path; from launchers import node, terminal\n"
        "node.PIECES, terminal.LAST_SECONDS = 4, 0.1\n"
        "with node.copied_to(Path(sys.argv[1])):\n"
        "    [os.write(1, b'x' * 65535 + b'\\n') for _ in range(100)]\n"
        "os._exit(0)"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "log")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.wait(timeout=30) == 0  # nobody has read a byte
    assert (tmp_path / "log").stat().st_size == 100 * 65536
