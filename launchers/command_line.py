"""The words of the `crosstune` command: its commands and options, and what was typed of them.

Imports no library: ``crosstune --help`` and a wrong command are answered at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, nearest

COMPOSED = {
    "prep": "raw records -> prepared data",
    "train": "prepared data -> checkpoints",
    "export": "checkpoint of a run -> adapter and merged model",
    "eval": "figures of a run, or of any model, on the held-out split",
    "run": "the whole road: prep, train, export, eval",
    "launch train": "starts `crosstune train` on one machine or many: launcher=... nodes=... and its own words",
    "launch run": "starts `crosstune run` likewise",
    "plan": "memory, disk, communication and time of a run, before it starts; --fit '64GiB x 8': what would fit",
    "doctor": "what a device can do here, and what is missing",
    "doctor nodes": "what would break a run over several machines: a line per node, and the remedies",
    "doctor portability": "what a model asks of a device that the device lacks",
    "doctor ascend-standin": "builds a pretended Ascend machine, and runs a command on it: ... -- COMMAND",
    "prove resume": "kills a run at random moments, resumes it, and compares every bit with a run in peace",
    "prove reshard": "a checkpoint of one engine and number of ranks, under others: from=zero3x4 to=zero1x2,plainx1",
    "prove layout": "the gradient of a step, packed or padded, on one rank or several, in one pass or many",
}
"""Commands with a config of their own."""
SUBCOMMANDS = {
    "prep": ("inspect",),
    "doctor": ("nodes", "portability", "ascend-standin"),
    "prove": ("resume", "reshard", "layout"),
    "launch": ("train", "run"),
}
WITH_PATH = {
    "prep inspect": "samples of prepared data, what is learned in colour: crosstune prep inspect PATH",
    "resume": "goes on with a run from its latest checkpoint, where it was launched: crosstune resume RUN",
    "status": "of a launched run: its machines, how far it is, why it failed: crosstune status RUN",
    "logs": "what a machine of a launched run prints: crosstune logs [-f] [--node K] RUN",
    "cancel": "ends a launched run with a save, or at once: crosstune cancel [--hard] RUN",
    "report": "where an export came from, a checkpoint's state, or a run's report.html anew: crosstune report PATH",
}
"""Commands that work on a folder."""
COMMANDS = {**COMPOSED, **WITH_PATH}


OPTIONS = {
    **{"--help": "", "--json": "", "--cfg": "job", "--config-dir": "DIR", "--resolved": "FILE", "--dry-run": ""},
    **{"--multirun": "", "--follow": "", "--node": "K", "--hard": "", "--fit": "'64GiB x 8'", "--build": "DIR"},
}
"""What may be typed anywhere, with what its value looks like."""
PART_OF_FIT = re.compile(r"[x*]?\d+|[x*]|[gm](i?b)?", re.IGNORECASE)
"""A further word of ``--fit 64 GiB x 8``, typed without quotes."""


@dataclass
class Request:
    """The command line, read."""

    command: str = ""
    words: list[str] = field(default_factory=list)
    """Overrides; for the commands `WITH_PATH` the path comes first."""
    help: bool = False
    json: bool = False
    cfg: bool = False
    dry_run: bool = False
    """Of `prep` and `launch`."""
    follow: bool = False
    """Of `logs`, as `node`."""
    node: int = 0
    hard: bool = False
    """Of `cancel`."""
    multirun: bool = False
    """Of `launch`: words with several values make several runs."""
    program: list[str] = field(default_factory=list)
    """Of `doctor ascend-standin`: the command to run on it, after ``--``."""
    resume: bool = False
    """Set for workers that go on from a checkpoint."""
    config_dir: Path | None = None
    resolved: Path | None = None


def parse(arguments: Sequence[str]) -> Request:
    """Reads the command line.

    Raises:
        ConfigError: an unknown command or option, or one without its value.
    """
    request = Request(help=not arguments)
    rest = iter(arguments)
    for word in rest:
        if word == "--":
            request.program = list(rest)
        elif word in ("--help", "-h"):
            request.help = True
        elif word == "--json":
            request.json = True
        elif word == "--dry-run":
            request.dry_run = True
        elif word == "--resume":
            request.resume = True
        elif word in ("-m", "--multirun"):
            request.multirun = True
        elif word in ("-f", "--follow"):
            request.follow = True
        elif word == "--hard":
            request.hard = True
        elif word.partition("=")[0] in ("--cfg", "--config-dir", "--resolved", "--build", "--node", "--fit"):
            _set_option(request, word, rest)
        elif word.startswith("-"):
            meant = nearest(word, OPTIONS)
            raise ConfigError(
                word, "unknown option", allowed=", ".join(OPTIONS), remedy=meant and f"did you mean {meant}?"
            )
        elif PART_OF_FIT.fullmatch(word) and request.words and request.words[-1].startswith("fit="):
            request.words[-1] += f" {word}"
        elif not request.command:
            request.command = _command(word)
        elif not request.words and word in SUBCOMMANDS.get(request.command, ()):
            request.command = f"{request.command} {word}"
        elif not request.words and (meant := nearest(word, SUBCOMMANDS.get(request.command, ()))):
            raise ConfigError(word, "unknown command", remedy=f"did you mean crosstune {request.command} {meant}?")
        else:
            request.words.append(word)
    _check_options(request)
    if request.program and request.command != "doctor ascend-standin":
        raise ConfigError("--", "a command to run", remedy="crosstune doctor ascend-standin ... -- COMMAND")
    if request.command not in COMMANDS and request.command and not request.help:
        parts = [f"crosstune {request.command} {part}" for part in SUBCOMMANDS[request.command]]
        raise ConfigError(f"crosstune {request.command}", "which one?", allowed=", ".join(parts))
    if not request.command and not request.help:
        raise ConfigError("crosstune", "no command", allowed=", ".join(COMMANDS))
    return request


def _check_options(request: Request) -> None:
    """Refuses an option of another command."""
    if request.cfg and request.multirun:
        raise ConfigError("--cfg", "of several runs", remedy="--dry-run with --multirun, or --cfg job for one of them")
    for option, given, commands in (
        ("--dry-run", request.dry_run, ("prep", "launch train", "launch run")),
        ("--multirun", request.multirun, ("launch train", "launch run")),
        ("--follow", request.follow, ("logs",)),
        ("--node", request.node != 0, ("logs",)),
        ("--hard", request.hard, ("cancel",)),
        ("--resume", request.resume, ("train", "run", "prove reshard")),
    ):
        if given and request.command not in commands and not request.help:
            raise ConfigError(
                option, "no option of this command", remedy=f"crosstune {' or '.join(commands)} {option} ..."
            )


def _set_option(request: Request, word: str, rest: Any) -> None:
    option, _, value = word.partition("=")
    value = value or next(rest, "")
    if option == "--cfg":
        if value != "job":
            raise ConfigError("--cfg", f"'{value}'", allowed="job")
        request.cfg = True
    elif not value:
        raise ConfigError(option, "needs a value", remedy=f"{option} {OPTIONS[option]}")
    elif option == "--node":
        if not value.isdecimal():
            raise ConfigError("--node", f"'{value}'", allowed="a machine's number, from 0")
        request.node = int(value)
    elif option in ("--build", "--fit"):
        request.words.append(f"{option.removeprefix('--')}={value}")
    elif option == "--config-dir":
        request.config_dir = Path(value).expanduser()
    else:
        request.resolved = Path(value).expanduser()


def _command(word: str) -> str:
    if word in COMMANDS or word in SUBCOMMANDS:
        return word
    meant = nearest(word, COMMANDS)
    remedy = f"did you mean crosstune {meant}?" if meant else "crosstune --help"
    raise ConfigError(word, "unknown command", allowed=", ".join(COMMANDS), remedy=remedy)
