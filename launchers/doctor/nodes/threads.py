"""Checks side by side, each with its time: a name server or a file system that hangs must not hang the doctor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any


def in_threads(jobs: Mapping[str, Callable[[], Any]], seconds: float) -> dict[str, Any]:
    """Runs each job in a thread of its own and gives what it returned.

    A job that raised, or that has not returned after `seconds`, gives ``{"failed": why}``. Its thread is left behind:
    it does not keep the process from ending by `os._exit`.
    """
    results: dict[str, Any] = {}

    def run(name: str, job: Callable[[], Any]) -> None:
        try:
            results[name] = job()
        except Exception as error:  # whatever it is, it is what the user wants to know, and the other checks go on
            results[name] = {"failed": f"{type(error).__name__}: {error}"}

    threads = {name: threading.Thread(target=run, args=(name, job), daemon=True) for name, job in jobs.items()}
    for thread in threads.values():
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    late = {"failed": f"no answer within {seconds:g} s"}
    return {name: results.get(name, late) for name in jobs}
