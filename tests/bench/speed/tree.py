"""What a command costs from its start to its end: seconds, processor time, and memory of all its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

from tests.bench.speed.machine import BUILD, LIMIT_SECONDS, Failed, Figures, Others
from train.devices.cpu import largest_resident_set

EVERY_SECONDS = 0.2
"""Between two looks at the memory. One look takes some milliseconds of a core."""


def measured(words: list[str], environment: dict[str, str], cwd: Path = BUILD) -> Figures:
    """Runs a command and waits for its end.

    Returns:
        ``seconds`` from start to end; ``cpu_seconds`` of it and of all processes that it waited for; ``largest_gib``,
        the largest resident set of the command's own process; ``tree_gib``, the most that all had at a time, pages that
        they share counted once; both as far as it was looked; ``others_cores``.

    Raises:
        Failed: it ended with another code than 0, or took too long.
    """
    log, peak, own, done = BUILD / "speed.log", [0], [0], threading.Event()
    others, started = Others(), time.perf_counter()
    with log.open("w") as said:
        process = subprocess.Popen(
            words, env=environment, cwd=cwd, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )

    def watch() -> None:
        while not done.wait(EVERY_SECONDS):
            peak.append(_bytes_of_tree(process.pid))
            own.append(largest_resident_set(process.pid) or own[-1])
            if time.perf_counter() - started > LIMIT_SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)  # and no `process.wait`, which would not give the usage
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if seconds > LIMIT_SECONDS:
        raise Failed(f"took more than {LIMIT_SECONDS} s")
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        raise Failed(f"exit code {process.returncode}: {lines[-1]}")
    largest = own[-1] or usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "largest_gib": largest / 2**30,
        "tree_gib": max(largest, *peak) / 2**30,
        "others_cores": others.cores(),
    }


def _bytes_of_tree(pid: int) -> int:
    """Resident memory of a process and its descendants: PSS, or what each has for itself where there is no PSS."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for each in processes:
        try:
            memory = each.memory_full_info()
        except psutil.Error:  # it has ended meanwhile
            continue
        total += getattr(memory, "pss", 0) or memory.uss
    return total
