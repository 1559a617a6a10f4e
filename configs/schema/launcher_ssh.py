"""The launcher group's option ssh."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field

from configs.errors import ConfigError, not_empty
from configs.schema.launch import LauncherConfig

HOST = re.compile(r"[^\s\x00-\x1f,/#-][^\s\x00-\x1f,/#]*")
"""A name, an address or ``user@name``; no dash first, which ssh would take for an option."""


def check_host(where: str, name: str) -> None:
    """Refuses what is no name of a machine.

    Args:
        where: the place that names it, for the message.
        name: as it is written there.

    Raises:
        ConfigError: it is none; with what was probably meant.
    """
    machine, remedy = name.rpartition("@")[2], None
    if re.search(r"\[.*[-,].*\]", machine):
        remedy = "each machine by its name: a list has no ranges"
    elif re.fullmatch(r"(\[.*\]|[^:]*):\d+", machine):
        remedy = "launcher.port=N for all machines, or Port N under Host NAME in ~/.ssh/config"
    elif "[" in machine:
        remedy = "an address of IPv6 without brackets"
    elif name.startswith("slots="):
        remedy = "the name first: name slots=N"
    elif HOST.fullmatch(name) and (":" not in machine or _is_ipv6(machine)):
        return
    raise ConfigError(where, f"'{name}'", allowed="name, user@name or an alias of ~/.ssh/config", remedy=remedy)


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


@dataclass
class SshLauncherConfig(LauncherConfig):
    """Machines reached by ssh, in the foreground. Names, users, keys and jump hosts are those of ~/.ssh/config."""

    hosts: list[str] = field(default_factory=list)
    """Machines, number 0 first: ``name``, ``user@name`` or an alias of ~/.ssh/config. Beyond `nodes`: spares, each of
    which takes the place of a machine that is lost and does not come back."""
    hostfile: str | None = None
    """Instead of `hosts`: a file with a line ``name slots=N`` for each machine, as DeepSpeed reads it."""
    master: str | None = None
    """Address by which the machines reach machine 0. Null: what ssh makes of its name."""
    user: str | None = None
    """Null: ssh's own choice."""
    port: int = 0
    """0: ssh's own choice."""
    config: str | None = None
    """A file for ``ssh -F``. Null: ~/.ssh/config and the system's."""
    options: list[str] = field(default_factory=list)
    """For ``ssh -o``, such as ``IdentityFile=~/.ssh/cluster``."""
    connect_seconds: int = 20
    """How long a machine may take to answer."""
    parallel: int = 32
    """So many machines are connected to at the same time. A jump host may refuse more (its sshd's MaxStartups)."""
    heartbeat_seconds: int = 5
    """Between two signs of life, both ways."""
    silence_seconds: int = 60
    """Without a sign after which a machine counts as lost, and after which a machine ends its part by itself."""
    return_seconds: int = 600
    """How long a restart waits for a machine that cannot be reached and has no spare."""

    def __post_init__(self) -> None:
        if self.hosts and self.hostfile is not None:
            raise ConfigError("launcher.hostfile", "and launcher.hosts are both set", remedy="name one of them")
        for host in self.hosts:
            check_host("launcher.hosts", host)
        for key in ("hostfile", "master", "user", "config"):
            not_empty(f"launcher.{key}", getattr(self, key))
        if self.master is not None:
            check_host("launcher.master", self.master)
        if self.user is not None and not HOST.fullmatch(self.user):
            raise ConfigError("launcher.user", f"'{self.user}'", allowed="a name without spaces")
        # A job is resumed from any folder.
        self.hostfile = self.hostfile and os.path.abspath(os.path.expanduser(self.hostfile))
        self.config = self.config and os.path.abspath(os.path.expanduser(self.config))
        for option in self.options:
            if not re.fullmatch(r"[A-Za-z]\w*[= ][^\n\r\0]+", option):
                raise ConfigError("launcher.options", f"'{option}'", allowed="Key=value, as in ~/.ssh/config")
        if not 0 <= self.port <= 65535:
            raise ConfigError("launcher.port", str(self.port), allowed="1 to 65535, or 0 for ssh's own choice")
        for key in ("connect_seconds", "parallel", "heartbeat_seconds"):
            if getattr(self, key) < 1:
                raise ConfigError(f"launcher.{key}", str(getattr(self, key)), allowed="1 or more")
        if self.silence_seconds < 3 * self.heartbeat_seconds:
            least = 3 * self.heartbeat_seconds
            raise ConfigError("launcher.silence_seconds", str(self.silence_seconds), allowed=f"{least} or more")
        if self.return_seconds < 0:
            raise ConfigError("launcher.return_seconds", str(self.return_seconds), allowed="0 or more")
