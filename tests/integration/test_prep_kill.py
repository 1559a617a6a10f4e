r"""Preparation that is killed: nothing looks finished, nobody is left over, and the next one goes on to the same bytes.

The slow test does it at scale, under a watch of memory. Exports are often mostly columns that nobody reads, and
tokenizing takes nearly all of the time, so CROSSTUNE_SCALE_UNREAD characters of such a column make a large file quick:

    CROSSTUNE_SCALE_MB=5000 CROSSTUNE_SCALE_UNREAD=16000 CROSSTUNE_SCALE_MODEL=/models/x \
        python -m pytest -s -k scale tests/integration/test_prep_kill.py
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from configs.compose import compose
from data_prep.prepare import prepare
from tests.unit.prep_kit import model_folder

MEMORY_BYTES = 1.5 * 2**30
"""What a preparation of any size must do with, all its processes together; shared pages are counted once."""
_SCALE_BYTES = float(os.environ.get("CROSSTUNE_SCALE_MB", "300")) * 1e6
_UNREAD = int(os.environ.get("CROSSTUNE_SCALE_UNREAD", "0"))
_OFTEN = "import data_prep.journal as j, data_prep.raw as r; j.SECONDS = 0.05; r.CHUNK_BYTES = 50_000"
"""An entry in the journal after some rows already."""


def _write_records(path: Path, size: float, seed: int = 0, unread: int = 0) -> None:
    """Chats of up to some thousand characters, no two alike, a few of them broken, beside a column that is not read."""
    rng = random.Random(seed)
    words = (
        "the a licence of this grants notice; with any copy, but warranty IS software für 授权 许可证 to you in".split()
    )
    page = " ".join(rng.choices(words, k=unread)) + " "
    done, row = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while done < size:
            row += 1
            count = int(rng.lognormvariate(4.3, 0.9)) + 1
            words_of_row = rng.choices(words, k=count)
            text = " ".join(words_of_row)
            question = {"role": "user", "content": f"Question {row}: {text[: count * 2]}"}
            turns = [question, {"role": "assistant", "content": text}]
            begin = rng.randrange(len(page))
            line = json.dumps({"messages": turns, "page": (page[begin:] + page)[:unread]}, ensure_ascii=False)
            done += file.write((line if row % 50_000 else line[:-9]) + "\n")


def _words(folder: Path, model: Path) -> list[str]:
    words = [f"model.path={model}", f"dataset.path={folder / 'rows.jsonl'}", f"cache_dir={folder / 'cache'}"]
    return [*words, "workers=2", "max_length=4096", "dataset.test_fraction=0.01"]


def _start(folder: Path, model: Path, out: str, *, setup: str = "pass") -> subprocess.Popen[str]:
    """A preparation in a process group of its own."""
    program = (
        f"{setup}\nfrom pathlib import Path\nfrom configs.compose import compose\n"
        "from data_prep.prepare import prepare\nimport sys\n"
        "cfg = compose('prep', sys.argv[1:])\n"
        "made = prepare(cfg, Path(cfg.model.path), out=Path(cfg.out))\nprint(made.notes)"
    )
    command = [sys.executable, "-P", "-c", program, *_words(folder, model), f"out={folder / out}"]
    return subprocess.Popen(
        command,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that starts the tests in the background has Ctrl-C ignored, here too.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def _journal(folder: Path) -> dict[str, object]:
    try:
        found: dict[str, object] = json.loads((folder / ".out.making/journal.json").read_text())
    except OSError:
        return {}
    return found


def _until(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def _bytes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def test_killed_and_stopped_it_leaves_nobody_and_goes_on(tmp_path: Path) -> None:
    model = model_folder(tmp_path / "model")
    _write_records(tmp_path / "rows.jsonl", 4e6)  # enough that it is not done before it is stopped, on a busy machine
    process = _start(tmp_path, model, "out", setup=_OFTEN)
    _until(lambda: _journal(tmp_path), process)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.kill()  # the parent alone: its workers see that it is gone
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive and len(gone) == 2
    process.wait()
    assert not (tmp_path / "out").exists()

    before = _journal(tmp_path)
    process = _start(tmp_path, model, "out", setup=_OFTEN)
    _until(lambda: _journal(tmp_path) not in ({}, before), process)
    workers = psutil.Process(process.pid).children()
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
    assert process.wait(timeout=20) != 0 and time.monotonic() - began < 10
    assert not psutil.wait_procs(workers, timeout=5)[1] and not (tmp_path / "out").exists()

    cfg = compose("prep", _words(tmp_path, model))
    made = prepare(cfg, model, out=tmp_path / "out")
    assert made.notes == ["went on with a preparation that had been interrupted"]
    assert _bytes(tmp_path / "out") == _bytes(prepare(cfg, model, out=tmp_path / "whole").path)
    assert not [path for path in tmp_path.glob(".*") if path.suffix != ".lock"]


@pytest.mark.slow
def test_a_line_of_200_mb_takes_no_memory(tmp_path: Path) -> None:
    good = json.dumps({"text": "a sound row"})
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(f"{good}\n" * 3 + '{"text": "')
        for _ in range(200):
            file.write("x" * 1_000_000)
        file.write(f'"}}\n{good}\n')
    process = _start(tmp_path, model_folder(tmp_path / "model"), "out")
    peak = _watch(process)
    assert process.returncode == 0
    (reject,) = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert (reject["line"], reject["reason"]) == (4, "row too long")
    assert peak < MEMORY_BYTES / 2


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_scale_in_bounded_memory_killed_and_gone_on_with(tmp_path: Path) -> None:
    model = Path(os.environ.get("CROSSTUNE_SCALE_MODEL") or model_folder(tmp_path / "model"))
    rows = tmp_path / "rows.jsonl"
    _write_records(rows, _SCALE_BYTES, unread=_UNREAD)
    size = rows.stat().st_size
    began = time.monotonic()
    process = _start(tmp_path, model, "whole")
    peak = _watch(process)
    assert process.returncode == 0
    seconds = time.monotonic() - began
    print(f"\n{size / 1e6:,.0f} MB in {seconds:,.0f} s, peak memory {peak / 2**20:,.0f} MiB")
    assert peak < MEMORY_BYTES

    moment = random.uniform(0.2, 0.8)
    process = _start(tmp_path, model, "out")
    _until(lambda: _done(tmp_path) > moment * size, process, 10 * seconds + 60)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done, began = _done(tmp_path), time.monotonic()
    process = _start(tmp_path, model, "out")
    peak = _watch(process)
    said, _ = process.communicate()
    assert process.returncode == 0 and "went on" in said
    print(f"killed at {done / size:.0%}, went on for {time.monotonic() - began:,.0f} s, peak {peak / 2**20:,.0f} MiB")
    assert peak < MEMORY_BYTES
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def _done(folder: Path) -> int:
    """Bytes of the source that the journal says are done."""
    position = _journal(folder).get("position")
    return int(position["stored"]) if isinstance(position, dict) else 0


def _watch(process: subprocess.Popen[str]) -> int:
    """Waits for a process; the most memory (PSS) that it and its children had together, in bytes."""
    peak, parent = 0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for each in [parent, *parent.children(recursive=True)]:
                total += each.memory_full_info().pss
        except psutil.Error:
            pass
        peak = max(peak, total)
        time.sleep(0.3)
    return peak
