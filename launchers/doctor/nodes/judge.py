"""The reports of all nodes -> findings. Pure. Here what one node's report says; `between` compares nodes.

A cause is told once: where a node gave no report, or the first node's port was taken, what follows from it is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launchers.doctor.nodes.between import of_clocks, of_environments, of_machines, of_versions
from launchers.doctor.nodes.findings import FAULT, WARNING, Answer, Finding, merged
from launchers.doctor.nodes.meeting import of_collectives, of_folder, of_meeting, of_names
from launchers.doctor.nodes.network import INTERFACES, is_local, is_loopback
from launchers.doctor.nodes.request import Request
from train.units import in_gib

SHM_PER_PROCESS = 32 * 2**20
"""What the collective libraries of GPUs and NPUs take of /dev/shm per process; without it they end in a bus error."""
SHM_SENSIBLE = 2**30
"""What their documentation asks for; a container's default is 64 MiB."""
TMP_NEEDED, TMP_SENSIBLE = 64 * 2**20, 2**30
FILES_BASE, FILES_PER_RANK = 128, 4
"""Open files of a process: its own, and connections to every other rank in each of the run's process groups."""
MEMLOCK_SENSIBLE = 2**30
"""RDMA pins the buffers that it sends from."""
LEVELS = {"missing": FAULT, "note": WARNING}
"""Of `crosstune doctor`'s findings."""
CHECKS = {
    "names": ("names", "name resolution", WARNING),
    "network": ("interface", "network interfaces", WARNING),
    "way": ("interface", "the way to the first node", WARNING),
    "limits": ("limits", "limits", WARNING),
    "shm": ("shm", "/dev/shm", WARNING),
    "tmp": ("disk", "the folder for temporary files", WARNING),
    "run_dir": ("disk", "run_dir", FAULT),
    "versions": ("versions", "versions", WARNING),
    "environment": ("environment", "environment variables", WARNING),
    "meeting": ("rendezvous", "the rendezvous", FAULT),
    "device": ("device", "devices", FAULT),
}
"""Of each check of `look`: its word in findings, what it looks at, and what it means that it could not."""


def judge(request: Request, answers: Sequence[Answer]) -> list[Finding]:
    """Every finding, faults first.

    Args:
        request: what was asked; whose copy does not matter.
        answers: one per node, by number.
    """
    found: list[Finding] = []
    names = list(of_names(request, answers))
    misnamed = {each.nodes[0] for each in names if each.level == FAULT}
    astray, apart = set(misnamed), hosts_of(answers) > 1
    for answer in answers:
        if answer.report is None:
            found.append(silent(answer))
            continue
        found += of_failures(answer)
        found += of_interfaces(request, answer)
        ways = list(of_way(request, answer, apart=apart)) if answer.node not in misnamed else []
        astray |= {answer.node} if ways else set()
        found += ways
        found += of_limits(request, answer)
        found += of_room(request, answer)
        found += of_device(answer)
    found += names
    found += of_meeting(request, answers, astray)
    found += of_folder(request, answers)
    found += of_clocks(answers)
    found += of_versions(answers)
    found += of_environments(answers)
    found += of_machines(answers)
    found += of_collectives(request, answers)
    return merged(found)


def silent(answer: Answer) -> Finding:
    """A node without a report."""
    error = answer.error
    what = f"gave no report: {error.found}" if error else "gave no report"
    remedy = (
        error.remedy if error and error.remedy else "is it up, and does its name lead there? see the launcher's log"
    )
    return Finding(FAULT, "answer", (answer.node,), what, remedy)


def of_failures(answer: Answer) -> Iterator[Finding]:
    """Checks that raised or did not end, as where a file system or a driver is dead."""
    for name, (check, about, level) in CHECKS.items():
        why = (answer.facts.get(name) or {}).get("failed")
        if why:
            remedy = "crosstune doctor nodes on that node; the kernel's log (dmesg) knows of dead disks and drivers"
            yield Finding(level, check, (answer.node,), f"{about} could not be looked at: {why}", remedy)


def of_interfaces(request: Request, answer: Answer) -> Iterator[Finding]:
    """Variables and settings that choose a network interface."""
    facts = answer.fact("network")
    if not request.meets or not facts:
        return
    here, chosen = facts["here"], dict(facts["chosen"])
    if request.interface:
        means = [request.interface] if request.interface in here else []
        chosen["the interface of the cluster"] = {"value": request.interface, "means": means}
    # The device's own check says it with more.
    told = [each["what"] for each in answer.fact("device").get("findings", ()) if each["level"] == "missing"]
    usable = sorted(name for name, each in here.items() if reachable(each))
    for name, each in chosen.items():
        if any(what.startswith(name) for what in told):
            continue
        named = each["means"]
        if not named:
            what = f"{name}: no interface '{each['value']}' here"
        elif not any(reachable(here[one]) for one in named):
            loopback = any(is_loopback(address) for address in here[named[0]]["addresses"])
            state = "is loopback: no other node reaches it" if loopback else "is down or has no address"
            what = f"{name}={each['value']}: {named[0]} {state}"
        else:
            continue
        yield Finding(FAULT, "interface", (answer.node,), what, f"one of {', '.join(usable) or 'none that is up'}")


def of_way(request: Request, answer: Answer, *, apart: bool) -> Iterator[Finding]:
    """The interface that a run would take where neither a variable nor the cluster names one.

    Args:
        request: what was asked.
        answer: of a node that knows the first one's name.
        apart: whether the nodes are several machines: on one they meet on its loopback interface.
    """
    way, network = answer.fact("way"), answer.fact("network")
    if not way or not network or request.interface:
        return
    if "wrong" in way:
        yield Finding(FAULT, "interface", (answer.node,), way["wrong"], way["remedy"])
    elif apart and not network["chosen"].keys() >= set(INTERFACES) and not reachable(network["here"][way["interface"]]):
        what = f"a run would take {way['interface']}, which no other node reaches: the first node's name leads there"
        usable = sorted(name for name, each in network["here"].items() if reachable(each))
        remedy = f"cluster.interface=..., one of {', '.join(usable) or 'none that is up'}; or mend /etc/hosts"
        yield Finding(FAULT, "interface", (answer.node,), what, remedy)


def hosts_of(answers: Sequence[Answer]) -> int:
    """How many machines the nodes are, as far as they say."""
    return len({answer.report["machine"] or answer.node for answer in answers if answer.report})


def reachable(interface: Mapping[str, Any]) -> bool:
    """Whether others can reach this node through it."""
    return interface["up"] and not all(is_local(each) for each in interface["addresses"])


def of_limits(request: Request, answer: Answer) -> Iterator[Finding]:
    """Limits that the run's processes would meet."""
    facts = answer.fact("limits")
    if not facts:
        return
    files, needed = facts["nofile"], FILES_BASE + FILES_PER_RANK * request.nodes * request.nproc
    if files is not None and files < needed:
        what = f"no more than {files} open files are allowed, and a rank needs up to {needed}"
        remedy = f"a hard limit of {max(65536, needed)}: LimitNOFILE of the service that starts ranks, or limits.conf"
        yield Finding(FAULT, "limits", (answer.node,), what, remedy)
    pinned, rdma = facts["memlock"], facts["rdma"]
    if request.nodes > 1 and rdma and on_host(answer) is False and pinned is not None and pinned < MEMLOCK_SENSIBLE:
        what = f"only {in_gib(pinned)} of memory may be locked, and RDMA ({', '.join(rdma)}) locks its buffers"
        yield Finding(
            WARNING, "limits", (answer.node,), what, "ulimit -l unlimited; LimitMEMLOCK=infinity of the service"
        )


def on_host(answer: Answer) -> bool | None:
    """Whether a run computes without an accelerator; None: that was not looked at, and no device was named."""
    facts = answer.fact("device")
    device = facts.get("device") or facts.get("asked")
    return None if device in (None, "auto") else device == "cpu"


def of_room(request: Request, answer: Answer) -> Iterator[Finding]:
    """Shared memory, which only the collectives of accelerators need, and disks."""
    shm = answer.fact("shm") if on_host(answer) is not True else {}
    if shm and shm["free_bytes"] < request.nproc * SHM_PER_PROCESS:
        what = (
            f"/dev/shm has {in_gib(shm['free_bytes'])} free of {in_gib(shm['total_bytes'])}, too little for collectives"
        )
        remedy = "mount -o remount,size=16G /dev/shm; in a container --shm-size=16g, in a pod an emptyDir of Memory"
        yield Finding(FAULT if on_host(answer) is False else WARNING, "shm", (answer.node,), what, remedy)
    elif shm and shm["free_bytes"] < SHM_SENSIBLE:
        what = f"/dev/shm has only {in_gib(shm['free_bytes'])} free"
        yield Finding(WARNING, "shm", (answer.node,), what, "1 GiB or more; in a container --shm-size=16g")
    yield from _disk(answer, "run_dir", request.needed_bytes, request.needed_bytes, "name another run_dir")
    yield from _disk(answer, "tmp", TMP_NEEDED, TMP_SENSIBLE, "export TMPDIR=...")


def _disk(answer: Answer, check: str, needed: int, sensible: int, otherwise: str) -> Iterator[Finding]:
    facts = answer.fact(check)
    if not facts:
        return
    where, free = facts["folder"], facts["free_bytes"]
    what, remedy, level = None, f"make room, or {otherwise}", FAULT
    if free < needed:
        what = f"{where} has {in_gib(free)} free, {in_gib(needed)} needed"
    elif facts.get("free_files") == 0:
        what = f"{where} has room, but no file can be added: its file system has no inode left"
    elif facts["refused"]:
        what, remedy = f"cannot write in {where}: {facts['refused']}", f"rights, quota and mount, or {otherwise}"
    elif free < sensible:
        what, level = f"{where} has only {in_gib(free)} free", WARNING
    if what is not None:
        yield Finding(level, "disk", (answer.node,), f"{check}: {what}", remedy)


def of_device(answer: Answer) -> Iterator[Finding]:
    """What `crosstune doctor` finds on the node."""
    for each in answer.fact("device").get("findings", ()):
        if each["level"] in LEVELS:
            yield Finding(LEVELS[each["level"]], "device", (answer.node,), each["what"], each["remedy"])
