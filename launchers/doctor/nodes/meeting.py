"""What the nodes' attempts to reach each other mean: names, ports, the shared folder, the all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from launchers.doctor.nodes.findings import FAULT, WARNING, Answer, Finding
from launchers.doctor.nodes.network import is_loopback
from launchers.doctor.nodes.request import Request

FIREWALL = "open TCP between the nodes, the rendezvous port and those from 1024 up: firewall, security group, routes"


def of_names(request: Request, answers: Sequence[Answer]) -> Iterator[Finding]:
    """Names that mean nothing on a node, or the wrong machine. The first node's is what every rank needs."""
    if not request.meets:
        return
    owned = {answer.node: _own_addresses(answer) for answer in answers}
    for answer in answers:
        known = answer.fact("names").get("known", {})
        for name in dict.fromkeys([*request.names, *filter(None, [request.master])]):
            node = request.names.index(name) if name in request.names else 0
            matters = node in (0, answer.node) or answer.node == 0
            level = FAULT if matters else WARNING
            entry = known.get(name)
            if entry is None:
                continue
            if "failed" in entry:
                remedy = f"DNS, or a line for {name} in /etc/hosts of this node"
                yield Finding(level, "names", (answer.node,), f"'{name}' does not resolve: {entry['failed']}", remedy)
                continue
            wrong = _wrong(entry["addresses"], node == answer.node, owned.get(node, set()))
            if wrong and (node != answer.node) and _is_right_elsewhere(name, node, answers, owned):
                right = ", ".join(sorted(owned[node])) or "another address"
                what = f"'{name}' is {wrong} here, and that machine has {right}"
                yield Finding(level, "names", (answer.node,), what, f"DNS, or {name} in /etc/hosts of this node")
        yield from _own_name(request, answer)


def _own_addresses(answer: Answer) -> set[str]:
    here = answer.fact("network").get("here", {})
    return {
        each
        for interface in here.values()
        for each in interface["addresses"]
        if not each.startswith(("fe80:", "127.", "::1"))
    }


def _wrong(addresses: Sequence[str], own: bool, owned: set[str]) -> str | None:
    """The address that cannot be another machine's, where all are such; None where one is right, or none is known."""
    if own or not addresses:
        return None
    if all(is_loopback(each) for each in addresses):
        return addresses[0]
    return addresses[0] if owned and not owned & set(addresses) else None


def _is_right_elsewhere(name: str, node: int, answers: Sequence[Answer], owned: dict[int, set[str]]) -> bool:
    """Whether the name means the machine's own address on some node: behind a translating network it does on none.

    A loopback address is wrong in any case.
    """
    entries = [answer.fact("names").get("known", {}).get(name, {}).get("addresses", []) for answer in answers]
    loopback = any(entry and all(is_loopback(each) for each in entry) for entry in entries)
    return loopback or any(owned[node] & set(entry) for entry in entries)


def _own_name(request: Request, answer: Answer) -> Iterator[Finding]:
    """The node's own host name at its loopback address: what binds by host name then offers that to the others."""
    names = answer.fact("names")
    own = names.get("own")
    entry = names.get("known", {}).get(own, {})
    addresses = entry.get("addresses", [])
    if "GLOO_SOCKET_IFNAME" in answer.fact("network").get("chosen", {}) or request.interface:
        return
    if addresses and all(is_loopback(each) for each in addresses):
        what = (
            f"its own name '{own}' is {addresses[0]} here, which libraries that bind by host name offer to the others"
        )
        remedy = f"take {own} out of the line of {addresses[0]} in /etc/hosts, or set cluster.interface"
        yield Finding(WARNING, "names", (answer.node,), what, remedy)


def of_meeting(request: Request, answers: Sequence[Answer], misnamed: set[int]) -> Iterator[Finding]:
    """Who did not get through to the first node's port, and to whom it did not get through.

    Args:
        request: what was asked.
        answers: of all nodes.
        misnamed: nodes whose names are wrong already.
    """
    host = answers[0].fact("meeting")
    if not request.meets or not host:
        return
    if not host["listens"]:
        holder = f" by {host['holder']}" if host["holder"] else ""
        what = f"port {request.master_port} is taken{holder}: {host['text']}"
        yield Finding(FAULT, "rendezvous", (0,), what, "master_port=..., a port that is free")
        return
    where = f"{request.master or answers[0].report and answers[0].report['name']}:{request.master_port}"
    for answer in answers[1:]:
        guest = answer.fact("meeting")
        if guest and not guest["reached"] and answer.node not in misnamed:
            yield Finding(FAULT, "rendezvous", (answer.node,), f"cannot reach {where}: {_how(guest)}", FIREWALL)
        back = host["guests"].get(str(answer.node), {}).get("back") if guest else None
        if back and 0 not in misnamed:
            what = f"reaches {where}, but is not reached from there: {_how(back)}"
            yield Finding(FAULT, "rendezvous", (answer.node,), what, FIREWALL)


def _how(fault: dict[str, Any]) -> str:
    meant = f" ({', '.join(fault['addresses'])})" if fault["addresses"] else ""
    texts = {
        "silent": "no answer; something drops the packets, or the way back is missing",
        "refused": "refused; a firewall rejects it, or the address is another machine's",
        "strange": f"something else answers there ({fault['text']})",
    }
    return texts.get(fault["kind"], str(fault["text"])) + meant


def of_folder(request: Request, answers: Sequence[Answer]) -> Iterator[Finding]:
    """Whether all nodes see what the first one writes to `run_dir`."""
    left = answers[0].fact("meeting").get("token")
    if not request.meets or not request.shared or left is not True:
        return  # that it cannot be written is the disk's finding
    folder = answers[0].fact("run_dir").get("folder", request.run_dir)
    remedy = "mount the shared file system here, or name a run_dir that every node sees"
    for answer in answers[1:]:
        seen = answer.fact("meeting").get("token")
        if seen is False:
            yield Finding(FAULT, "folder", (answer.node,), f"does not see what node 0 writes to {folder}", remedy)
        elif isinstance(seen, str):
            yield Finding(
                FAULT, "folder", (answer.node,), f"cannot read what node 0 writes to {folder}: {seen}", remedy
            )


def of_collectives(request: Request, answers: Sequence[Answer]) -> Iterator[Finding]:
    """The all-reduce: who was not heard of, or how it failed where all were."""
    found = {answer.node: answer.facts["allreduce"] for answer in answers if answer.facts.get("allreduce")}
    ranks = {rank for each in found.values() for rank in each["silent"]}
    silent: dict[int, list[int]] = {}
    for rank in sorted(ranks):
        silent.setdefault(rank // request.nproc, []).append(rank)
    for node, lost in silent.items():
        which = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}"
        what = f"{which} gave no sign in the all-reduce within {request.allreduce_seconds:g} s"
        yield Finding(FAULT, "allreduce", (node,), what, "is the device's network up there? see the driver's own logs")
    for node, each in found.items():
        if each["failed"] and not silent:
            yield Finding(FAULT, "allreduce", (node,), f"the all-reduce failed: {each['failed']}", FIREWALL)
