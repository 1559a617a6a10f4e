"""What the nodes' attempts to reach each other mean: names, ports, the shared folder, the all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from launchers.doctor.nodes.findings import FAULT, WARNING, Answer, Finding
from launchers.doctor.nodes.network import is_local, is_loopback
from launchers.doctor.nodes.request import Request

FIREWALL = "open TCP between the nodes, the rendezvous port and those from 1024 up: firewall, security group, routes"


def of_names(request: Request, answers: Sequence[Answer]) -> Iterator[Finding]:
    """Names that mean nothing, or the wrong machine: a run needs that of the first node on all, and no other one.

    An address that a machine does not know may still lead to it, behind a network that translates addresses: it is
    wrong only where another node has the right one.
    """
    if not request.meets:
        return
    numbers = {address: number for number, address in reversed(list(enumerate(request.addresses)))}
    if request.master:
        numbers.setdefault(request.master, 0)
    for address, number in numbers.items():
        owned = _own_addresses(answers[number])
        known = {answer.node: _meaning(address, answer) for answer in answers}
        right = any(owned & set(entry.get("addresses", ())) for entry in known.values())
        for node, entry in known.items():
            what = _wrong(entry, owned if right else set()) if node != number or "failed" in entry else None
            if what:
                shown = f"'{address}'" + (f" ({request.names[number]})" if _is_alias(request, number) else "")
                remedy = f"DNS, or a line for {address} in /etc/hosts of this node"
                yield Finding(FAULT if number == 0 else WARNING, "names", (node,), f"{shown} {what}", remedy)


def _is_alias(request: Request, number: int) -> bool:
    return bool(request.names) and request.names[number] != request.addresses[number]


def _own_addresses(answer: Answer) -> set[str]:
    """At which other nodes may reach it."""
    here = answer.fact("network").get("here", {}).values()
    return {each for interface in here for each in interface["addresses"] if not is_local(each)}


def _wrong(entry: dict[str, Any], owned: set[str]) -> str | None:
    """What is wrong with the meaning of another machine's name; None where nothing is known to be.

    Args:
        entry: what the name means on a node; empty: it was not looked up there.
        owned: addresses of that machine; empty: not to be compared with.
    """
    if "failed" in entry:
        return f"does not resolve: {entry['failed']}"
    addresses = entry.get("addresses")
    if addresses and all(is_loopback(each) for each in addresses):
        return f"is {addresses[0]} here, this node itself"
    if addresses and owned and not owned & set(addresses):
        return f"is {addresses[0]} here, and that machine has {', '.join(sorted(owned))}"
    return None


def _meaning(name: str, answer: Answer) -> dict[str, Any]:
    entry: dict[str, Any] = answer.fact("names").get("known", {}).get(name, {})
    return entry


def of_meeting(request: Request, answers: Sequence[Answer], astray: set[int]) -> Iterator[Finding]:
    """Who did not get through to the first node's port, and to whom it did not get through.

    Args:
        request: what was asked.
        answers: of all nodes.
        astray: nodes that were found not to know the way already.
    """
    host = answers[0].fact("meeting")
    if not request.meets or not host:
        return
    if not host["listens"]:
        holder = f" by {host['holder']}" if host["holder"] else ""
        what = f"port {request.master_port} is taken{holder}: {host['text']}"
        yield Finding(FAULT, "rendezvous", (0,), what, "master_port=..., a port that is free")
        return
    first = request.names[0] if request.names else request.master or "the first node"
    where = f"{first}:{request.master_port}"
    for answer in answers[1:]:
        guest = answer.fact("meeting")
        if guest and not guest["reached"] and answer.node not in astray:
            yield Finding(FAULT, "rendezvous", (answer.node,), f"cannot reach {where}: {_how(guest)}", FIREWALL)
        back = host["guests"].get(str(answer.node), {}).get("back") if guest else None
        if back and 0 not in astray:
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
    first = request.names[0] if request.names else "the first node"
    remedy = "mount the shared file system here, or name a run_dir that every node sees"
    for answer in answers[1:]:
        seen = answer.fact("meeting").get("token")
        if seen is False:
            yield Finding(FAULT, "folder", (answer.node,), f"does not see what {first} writes to {folder}", remedy)
        elif isinstance(seen, str):
            yield Finding(
                FAULT, "folder", (answer.node,), f"cannot read what {first} writes to {folder}: {seen}", remedy
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
        if each["error"] and not silent:
            yield Finding(FAULT, "allreduce", (node,), f"the all-reduce failed: {each['error']}", FIREWALL)
