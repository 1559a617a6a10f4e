"""One machine: ssh with an agent at its other end, and what ssh's complaints mean."""

from __future__ import annotations

import inspect
import json
import queue
import re
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from configs.errors import ConfigError
from configs.schema.launcher_ssh import SshLauncherConfig
from launchers import agent
from launchers.torchrun import end_with_parent

BOOTSTRAP = (
    'import json;SOURCE=json.loads(open(0,"rb",0,closefd=False).readline());'
    'exec(compile(SOURCE,"crosstune-agent","exec"),{"__name__":"__main__","SOURCE":SOURCE})'
)
"""Reads the agent's text from standard input, not a byte more, and becomes it. One line and one kind of quotes: the
login shell that it passes through may be any, a csh too."""
FIND_PYTHON = 'for p in "$@"; do command -v "$p" >/dev/null 2>&1 && exec "$p" -I -X utf8 -c "$0"; done; exit 127'
NO_PYTHON = 127
SSH_FAILED = 255
"""Exit code of ssh for faults of its own."""

Event = tuple["Connection", dict[str, Any]]


class Unreachable(ConfigError):
    """A machine does not answer; it may later."""


def ssh_command(cfg: SshLauncherConfig, host: str, remote: str) -> list[str]:
    """The command line for one machine.

    What ssh takes from the command line wins over ~/.ssh/config, and what comes first over what follows.
    """
    ours = [
        "BatchMode=yes",  # nobody is there to answer
        *cfg.options,
        f"ConnectTimeout={cfg.connect_seconds}",
        f"ServerAliveInterval={cfg.heartbeat_seconds}",
        f"ServerAliveCountMax={max(1, cfg.silence_seconds // cfg.heartbeat_seconds)}",
        "ControlMaster=no",  # a connection of its own, whose end is the agent's
        "ControlPath=none",
        "ClearAllForwardings=yes",
        "RemoteCommand=none",
        "LogLevel=ERROR",
    ]
    words = ["ssh", "-T", "-a", "-x"]
    words += ["-F", cfg.config] if cfg.config else []
    words += ["-p", str(cfg.port)] if cfg.port else []
    words += ["-l", cfg.user] if cfg.user else []
    return [*words, *(word for option in ours for word in ("-o", option)), "--", host, remote]


def address_of(cfg: SshLauncherConfig, host: str) -> str:
    """What ssh makes of a machine's name: it may be an alias that other machines do not know."""
    asked = [word for word in ssh_command(cfg, host, "") if word]
    shown = subprocess.run([asked[0], "-G", *asked[1:]], capture_output=True, text=True)
    names = [line.partition(" ")[2] for line in shown.stdout.splitlines() if line.startswith("hostname ")]
    return names[0] if names else host.rpartition("@")[2]


def agent_command(pythons: Sequence[str]) -> str:
    """For the login shell of a machine, whichever it is: starts the agent with the first Python that is there."""
    return "exec " + shlex.join(["sh", "-c", FIND_PYTHON, BOOTSTRAP, *dict.fromkeys(pythons)])


def agent_source() -> str:
    """What the other machine runs."""
    return inspect.getsource(agent)


class Connection:
    """A running ssh. Must be opened by a thread that stays: Linux ends the child with the thread that forked it.

    Args:
        node: the machine's number.
        host: its name.
        command: of ssh, or of anything else that starts an agent.
        inbox: takes what comes: an agent's frames, ``noise`` of a login shell, and at last ``closed``.
    """

    def __init__(self, node: int, host: str, command: Sequence[str], inbox: queue.Queue[Event]) -> None:
        self.node, self.host = node, host
        self._inbox, self._lock = inbox, threading.Lock()
        self._complaints = tempfile.TemporaryFile()
        # A session of its own: Ctrl-C is for the supervisor alone.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        threading.Thread(target=self._read, name=f"ssh-{host}", daemon=True).start()
        self._write(json.dumps(agent_source()).encode() + b"\n")

    def send(self, kind: str, **content: object) -> None:
        """A frame for the agent; nothing where it has gone."""
        self._write(agent.RS + json.dumps({"kind": kind, **content}).encode() + b"\n")

    def close(self) -> None:
        """Ends ssh, and with it the agent."""
        self.process.kill()
        self.process.wait()

    def complaints(self) -> str:
        """What ssh, and the machine's shell, said on standard error."""
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace").strip()

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with self._lock, suppress(OSError):
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            frame: dict[str, Any] = {"kind": "noise", "text": line.decode(errors="replace").rstrip("\n")}
            if line.startswith(agent.RS):
                with suppress(ValueError):
                    frame = json.loads(line[1:])
            self._inbox.put((self, frame))
        self._inbox.put((self, {"kind": "closed", "code": self.process.wait()}))


class Beats:
    """Gives all agents a sign of life, from a thread of its own: a terminal or a file system may hold up the others.

    Args:
        seconds: between two.
    """

    def __init__(self, seconds: float) -> None:
        self.connections: list[Connection] = []
        self._seconds, self._over = seconds, threading.Event()

    def __enter__(self) -> Beats:
        self._thread = threading.Thread(target=self._run, name="beats", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            for connection in tuple(self.connections):
                connection.send("beat")


COMPLAINTS: tuple[tuple[str, str, str | None], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key.*has changed",
        "its host key is not the one that was known",
        "if the machine was set up anew: ssh-keygen -R {host}, then ssh {host} once",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "its host key is not known here",
        "ssh {host} once, or launcher.options=[StrictHostKeyChecking=accept-new]",
    ),
    (
        r"Permission denied",
        "refuses the user or the key",
        "launcher.user=NAME, launcher.options=[IdentityFile=FILE] or ~/.ssh/config: `ssh {host} true` must ask nothing",
    ),
    (r"Could not resolve hostname", "no machine of this name is known here", None),
    (r"Bad configuration option|no argument after keyword|Can't open user config", "{last}", None),
)
"""What ssh says, what it means, and what helps."""
OVERLOADED = re.compile(r"kex_exchange_identification|Connection (closed|reset) by")
"""A machine, or the jump host before it, has too many connections that are just beginning."""


def ssh_fault(host: str, code: int, complaints: str) -> ConfigError:
    """Why a connection ended before its agent spoke.

    Args:
        host: the machine's name.
        code: exit code of ssh.
        complaints: what it said.
    """
    said = complaints.splitlines()
    last = said[-1] if said else "no message"
    remedy = "install Python 3.8 or newer there, or python=PATH of one"
    if code == NO_PYTHON:
        return ConfigError(host, "has no Python: neither the job's nor a python3", remedy=remedy)
    if "SyntaxError" in last:
        return ConfigError(host, "does not have the job's Python, and its python3 is older than 3.8", remedy=remedy)
    if code != SSH_FAILED:
        return ConfigError(host, f"ended with code {code} before it could begin: {last}")
    for pattern, found, helps in COMPLAINTS:
        if re.search(pattern, complaints):
            return ConfigError(host, found.format(last=last), remedy=helps and helps.format(host=shlex.quote(host)))
    return Unreachable(host, f"cannot be reached: {re.sub(r'^ssh: ', '', last)}")
