"""Which machines a job runs on: a list, or a hostfile in DeepSpeed's form (``name slots=N``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, CrosstuneError
from configs.schema.launcher_ssh import SshLauncherConfig, check_host
from launchers.spec import LaunchSpec

LINE = re.compile(r"(\S+)(?:\s+slots\s*=\s*(\d+))?")


@dataclass(frozen=True)
class Host:
    """A machine."""

    name: str
    """For ssh."""
    slots: int | None
    """Processes that it has room for; None: not said."""
    where: str
    """The place that names it, for messages."""

    @property
    def machine(self) -> str:
        """The name without a user."""
        return self.name.rpartition("@")[2].lower()


def parse_hostfile(text: str, source: str) -> tuple[list[Host], list[CrosstuneError]]:
    """Machines in order, and what is wrong with the other lines.

    Args:
        text: of the file.
        source: its name, for messages.
    """
    hosts: list[Host] = []
    faults: list[CrosstuneError] = []
    for number, line in enumerate(text.splitlines(), 1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        where = f"{source}:{number}"
        match = LINE.fullmatch(content)
        try:
            if match is None:
                raise ConfigError(where, f"'{content}'", allowed="name slots=N, # comment")
            check_host(where, match[1])
            hosts.append(Host(match[1], int(match[2]) if match[2] else None, where))
        except ConfigError as fault:
            faults.append(fault)
    return hosts, faults


def configured_hosts(cfg: SshLauncherConfig) -> tuple[list[Host], list[CrosstuneError]]:
    """The machines that a config names, and what is wrong with its hostfile."""
    if cfg.hostfile is None:
        return [Host(name, None, "launcher.hosts") for name in cfg.hosts], []
    try:
        text = Path(cfg.hostfile).read_text(encoding="utf-8-sig")  # Windows begins a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        return [], [ConfigError("launcher.hostfile", f"'{cfg.hostfile}' cannot be read: {reason}")]
    return parse_hostfile(text, cfg.hostfile)


def host_faults(hosts: Sequence[Host], spec: LaunchSpec, unread: int = 0) -> list[CrosstuneError]:
    """What speaks against running a job on these machines, as far as their names and slots tell.

    Args:
        hosts: the machines.
        spec: the job.
        unread: how much was named besides that is not understood: nobody knows how many machines that is.
    """
    faults: list[CrosstuneError] = []
    first: dict[str, Host] = {}
    for host in hosts:
        known = first.setdefault(host.machine, host)
        if known is not host:
            also = f", as in {known.where}" if known.where != host.where else " twice"
            faults.append(ConfigError(host.where, f"{host.name}{also}", remedy="name each machine once"))
        if host.slots is not None and host.slots < spec.nproc:
            found = f"{host.name} slots={host.slots}, but nproc={spec.nproc}"
            faults.append(ConfigError(host.where, found, remedy=f"nproc={host.slots}, or a machine with more slots"))
    if len(first) < spec.nodes and not unread:
        named = f"{len(first)} machine{'' if len(first) == 1 else 's'} named, but nodes={spec.nodes}"
        remedy = "launcher.hosts=[n1,n2,...] or launcher.hostfile=FILE"
        faults.append(ConfigError("launcher.hosts", named, remedy=remedy if not first else None))
    return faults


def idle_devices(hosts: Sequence[Host], nproc: int) -> str:
    """What to tell a user whose machines have room for more processes than are asked for; empty: nothing.

    Args:
        hosts: those that the job runs on, without spares.
        nproc: processes per machine.
    """
    slots = [host.slots for host in hosts if host.slots is not None]
    if not slots or len(slots) < len(hosts) or min(slots) <= nproc:
        return ""
    room = f"{min(slots)}" if min(slots) == max(slots) else f"{min(slots)} to {max(slots)}"
    rest = f"{min(slots) - nproc} device{'s' if min(slots) - nproc > 1 else ''}"
    least = "" if min(slots) == max(slots) else " or more"
    return f"slots={room} per machine, nproc={nproc}: {rest}{least} stay idle; nproc={min(slots)} uses them"


def to_hostfile(hosts: Sequence[Host], nodes: int) -> str:
    """The machines as a hostfile: machine 0 first, then the others, then the spares."""
    lines = []
    for number, host in enumerate(hosts):
        role = f"node {number}" if number < nodes else "spare"
        lines.append(f"{host.name}{f' slots={host.slots}' if host.slots is not None else ''}  # {role}")
    return "\n".join(lines) + "\n"
