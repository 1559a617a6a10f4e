"""How this machine sees the others: names and interfaces. Needs psutil besides the standard library."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from launchers.doctor.nodes.threads import in_threads

INTERFACES = ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that choose an interface."""
LOOKUP_SECONDS = 10.0
"""For a name; a resolver asks a silent server for 5 s before it asks the next."""


def addresses_of(name: str) -> list[str]:
    """What a name means here, each address once, in the resolver's order.

    Raises:
        OSError: it does not resolve.
    """
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def names(wanted: Sequence[str]) -> dict[str, Any]:
    """What each name, and this machine's own, means here: ``{"addresses": [...]}`` or ``{"failed": why}``."""
    own = socket.gethostname()

    def look_up(name: str) -> dict[str, Any]:
        try:
            return {"addresses": addresses_of(name)}
        except (OSError, UnicodeError) as error:
            return {"failed": getattr(error, "strerror", None) or str(error)}

    found = in_threads({name: partial(look_up, name) for name in {own, *wanted}}, LOOKUP_SECONDS)
    return {"own": own, "known": found}


def is_loopback(address: str) -> bool:
    """Whether nobody else can reach it."""
    return ipaddress.ip_address(address).is_loopback


def is_local(address: str) -> bool:
    """Whether it leads nowhere beyond this machine, or beyond its own link."""
    return is_loopback(address) or ipaddress.ip_address(address).is_link_local


def interfaces(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """The interfaces of this machine, and which of them the variables name."""
    import psutil

    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    here: dict[str, dict[str, Any]] = {
        name: {
            "addresses": [
                e.address.partition("%")[0] for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)
            ],
            "up": name in up,
        }
        for name, entries in psutil.net_if_addrs().items()
    }
    chosen = {
        name: {"value": environment[name], "means": meant_by(name, environment[name])}
        for name in INTERFACES
        if environment.get(name)
    }
    return {"here": here, "chosen": chosen}


def meant_by(variable: str, value: str) -> list[str]:
    """Interfaces of this machine that a variable stands for: gloo takes names, the vendors' libraries prefixes."""
    import psutil

    from train.devices.ascend_values import matching_interfaces

    if variable == "GLOO_SOCKET_IFNAME":
        return [name for name in value.split(",") if name in psutil.net_if_addrs()]
    return matching_interfaces(value)


def source_address(peer: str) -> str:
    """The own address from which a connection to `peer` would come; nothing is sent.

    Raises:
        OSError: the name does not resolve, or no route leads there.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0]).partition("%")[0]
