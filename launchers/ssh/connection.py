"""One machine: ssh with an agent at its other end, and what ssh's complaints mean."""

from __future__ import annotations

import inspect
import json
import os
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


def ssh_environment() -> dict[str, str]:
    """For every ssh: no window asks for a passphrase, which ssh would open for a jump host in spite of BatchMode."""
    return {**os.environ, "SSH_ASKPASS_REQUIRE": "never"}


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
    asked.insert(1, "-G")
    shown = subprocess.run(asked, env=ssh_environment(), capture_output=True, text=True, errors="replace")
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
        inbox: takes an agent's frames, and at last ``closed``. What a login shell says is passed over.

    Raises:
        OSError: ssh cannot be started, or too many files are open.
    """

    def __init__(self, node: int, host: str, command: Sequence[str], inbox: queue.Queue[Event]) -> None:
        self.node, self.host = node, host
        self._inbox, self._lock = inbox, threading.Lock()
        self.closed = False
        self._complaints = tempfile.TemporaryFile()
        try:
            # A session of its own: Ctrl-C is for the supervisor alone.
            self.process = subprocess.Popen(
                command,
                env=ssh_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._complaints,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        except OSError:
            self._complaints.close()
            raise
        threading.Thread(target=self._read, name=f"ssh-{host}", daemon=True).start()
        self._write(json.dumps(agent_source()).encode() + b"\n")

    def send(self, kind: str, **content: object) -> None:
        """A frame for the agent; nothing where it has gone."""
        self._write(agent.RS + json.dumps({"kind": kind, **content}).encode() + b"\n")

    def close(self) -> None:
        """Ends ssh, and with it the agent, and gives back the files that it took; may be called again."""
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        with self._lock:
            self.closed = True
            with suppress(OSError):
                self.process.stdin.close()
        self._complaints.close()

    def complaints(self) -> str:
        """What ssh, and the machine's shell, said on standard error; only until it is closed."""
        self._complaints.seek(0)
        return self._complaints.read().decode(errors="replace").strip()

    def _write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with self._lock, suppress(OSError):
            if not self.closed:
                self.process.stdin.write(data)
                self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if frame := agent.parse(line):
                    self._inbox.put((self, frame))
        self._inbox.put((self, {"kind": "closed", "code": self.process.wait()}))


COMPLAINTS: tuple[tuple[str, str, str | None], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|Host key for .* has changed",
        "{key} is not the one that was known",
        "if that machine was set up anew: ssh-keygen -R {name}, then ssh {host} once",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "{key} is not known here",
        "ssh {host} once, or StrictHostKeyChecking accept-new in ~/.ssh/config, which jump hosts heed, too",
    ),
    (
        r"Permission denied",
        "refuses the user or the key",
        "launcher.user=NAME, launcher.options=[IdentityFile=FILE] or ~/.ssh/config, where those of jump hosts must be: "
        "`ssh {host} true` must ask nothing",
    ),
    (r"Could not resolve hostname", "no machine of this name is known here", None),
    (r"Bad configuration option|no argument after keyword|Can't open user config", "{last}", None),
)
"""What ssh says, what it means, and what helps."""
KEY_OF = re.compile(r"host key (?:is known )?for (\S+?)(?: and| has)", re.I)
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
    own_python = "does not have the job's Python, and its python3 is"
    if code == NO_PYTHON:
        return ConfigError(host, "has no Python: neither the job's nor a python3", remedy=remedy)
    if "SyntaxError" in last:
        return ConfigError(host, f"{own_python} older than 3.8", remedy=remedy)
    if re.match("ModuleNotFoundError|ImportError", last):
        return ConfigError(host, f"{own_python} older than 3.8, or not whole: {last}", remedy=remedy)
    if code != SSH_FAILED:
        return ConfigError(host, f"ended with code {code} before it could begin: {last}")
    named = KEY_OF.search(complaints)  # a jump host's ssh complains in the same place
    names = {"host": shlex.quote(host), "name": shlex.quote(named[1]) if named else "NAME", "last": last}
    names["key"] = f"the host key of {named[1]}" if named else "its host key, or that of a jump host before it,"
    for pattern, found, helps in COMPLAINTS:
        if re.search(pattern, complaints):
            return ConfigError(host, found.format(**names), remedy=helps and helps.format(**names))
    return Unreachable(host, f"cannot be reached: {re.sub(r'^ssh: ', '', last)}")
