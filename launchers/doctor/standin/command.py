"""`crosstune doctor ascend-standin`: builds the stand-in, and runs a command on it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from configs.errors import ConfigError, StorageError
from configs.schema.doctor import StandinConfig
from launchers.doctor.standin.build import Standin, build, summary

PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
EXAMPLE = 'crosstune doctor ascend-standin{build} -- python -c "import torch; print(torch.npu.device_count())"'


def standin(cfg: StandinConfig, program: Sequence[str]) -> dict[str, Any]:
    """Builds where needed, runs `program` where there is one.

    Returns:
        Folder and versions; with a program its ``exit_code``, 128 and the signal's number where a signal ended it.

    Raises:
        CrosstuneError: it cannot be built here, the report's folder cannot be made, or there is no such program.
    """
    built = build(cfg, _say)
    result = summary(built)
    if program:
        _make_report_folder(cfg)
        return {**result, "exit_code": run(program, built.environment(cfg, os.environ))}
    _show(cfg, built)
    return result


def _make_report_folder(cfg: StandinConfig) -> None:
    """Before the program runs: its processes write there at their end, when it is too late to say so."""
    if cfg.report:
        try:
            Path(cfg.report).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError("report", f"'{cfg.report}' cannot be made: {error.strerror}") from error


def run(program: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a program in our terminal and passes signals on to it.

    Returns:
        Its exit code as a shell tells it.

    Raises:
        ConfigError: there is no such program.
    """
    child: subprocess.Popen[bytes] | None = None
    waiting: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if child is None:
            waiting.append(number)
        elif child.poll() is None:
            child.send_signal(number)

    # Ctrl-C reaches the program from the terminal as it reaches us; the program decides what becomes of it.
    handlers = {signal.SIGINT: lambda number, frame: None, **dict.fromkeys(PASSED_ON, pass_on)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        child = subprocess.Popen(_resolved(program), env=dict(environment))
        for number in waiting:
            child.send_signal(number)
        code = child.wait()
    except OSError as error:
        raise ConfigError("--", f"'{program[0]}' cannot be run: {error.strerror}", allowed="a command") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _resolved(program: Sequence[str]) -> list[str]:
    """`crosstune` and `python` are those that run now, also where no script of that name is installed."""
    known = {"crosstune": [sys.executable, "-P", "-m", "launchers.cli"], "python": [sys.executable]}
    return [*known.get(program[0], [program[0]]), *program[1:]]


def _say(line: str) -> None:
    """To standard error: standard output is the program's."""
    print(line, file=sys.stderr, flush=True)


def _show(cfg: StandinConfig, built: Standin) -> None:
    took = f"built in {built.build_seconds:.0f} s" if built.build_seconds else "built already"
    print(f"{took}: {built.folder}")
    for name, found in built.versions.items():
        print(f"  {name:9}  {found}")
    print("\nthe real torch_npu API on a pretended device; run a command on it:")
    print("  " + EXAMPLE.format(build=f" --build {shlex.quote(cfg.build)}" if cfg.build else ""))
