"""What differs between nodes and must not: clocks, versions, variables, devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launchers.doctor.nodes.findings import FAULT, WARNING, Answer, Finding

CLOCK_WARNING = 1.0
"""Seconds. Which rank failed first is told by the nodes' clocks."""
CLOCK_FAULT = 60.0
"""Credentials and leases of schedulers, network file systems and object stores live for minutes."""
NOT_COMPARED = ("kernel",)
MAY_DIFFER = ("python", "numpy", "safetensors", "machine", "driver", "libraries", "instructions")
"""A difference is worth knowing; of everything else, also a device's plugin and toolkit, it breaks a run."""
CODE = "the code of crosstune"


def of_clocks(answers: Sequence[Answer]) -> Iterator[Finding]:
    """Clocks that are off against the asking host's."""
    offsets = clock_offsets(answers)
    off = {node: offset for node, offset in offsets.items() if abs(offset) > CLOCK_WARNING}
    remedy = "keep time by NTP: timedatectl set-ntp true, or chronyc makestep"
    if len(off) == len(answers) > 1 and max(off.values()) - min(off.values()) < CLOCK_WARNING:
        what = f"all clocks are {_seconds(min(off.values(), key=abs))} against this host's: its own may be wrong"
        yield Finding(WARNING, "clock", tuple(off), what, remedy)
        return
    for node, offset in off.items():
        level = FAULT if abs(offset) > CLOCK_FAULT else WARNING
        yield Finding(level, "clock", (node,), f"the clock is {_seconds(offset)} against this host's", remedy)


def _seconds(offset: float) -> str:
    return f"{abs(offset):,.1f} s {'fast' if offset > 0 else 'slow'}"


def clock_offsets(answers: Sequence[Answer]) -> dict[int, float]:
    """By node, the smallest offset in seconds against the asking host that explains all times; positive: fast.

    A report's times bound the offset: it began after it was asked for and ended before it was heard, however long the
    way was. The offsets between nodes are known to their round trip, so that all bounds together bound each.
    """
    bounds, against_first = {}, {}
    for answer in answers:
        if answer.report is None:
            continue
        bounds[answer.node] = (
            answer.report["answered_at"] - answer.heard_at,
            answer.report["began_at"] - answer.asked_at,
        )
        offset = 0.0 if answer.node == 0 else answer.fact("meeting").get("offset_seconds")
        if offset is not None:
            against_first[answer.node] = offset
    linked = [node for node in against_first if node in bounds]
    low = max((bounds[node][0] - against_first[node] for node in linked), default=0.0)
    high = min((bounds[node][1] - against_first[node] for node in linked), default=0.0)
    offsets = {}
    for node, own in bounds.items():
        shift = against_first.get(node)
        lowest, highest = own if shift is None else (low + shift, high + shift)
        offsets[node] = _nearest_zero(lowest, highest)
    return offsets


def _nearest_zero(low: float, high: float) -> float:
    if low > high:  # clocks that ran differently while we looked: the middle is as good as any
        return (low + high) / 2
    return low if low > 0 else high if high < 0 else 0.0


def of_versions(answers: Sequence[Answer]) -> Iterator[Finding]:
    """Packages, Python, code, driver, toolkit and plugin that are not what most nodes have."""
    usual = _usual({answer.node: versions_of_node(answer) for answer in answers if answer.report})
    for answer in answers:
        own = versions_of_node(answer)
        other = {name: value for name, value in own.items() if name not in NOT_COMPARED and value != usual.get(name)}
        for level in (FAULT, WARNING):
            named = [name for name in other if (name in MAY_DIFFER) == (level == WARNING)]
            if named:
                shown = ", ".join(f"{CODE if name == 'code' else name} {own[name]} ({usual[name]})" for name in named)
                packages = " ".join(f"{name}=={usual[name].partition('+')[0]}" for name in named if name != "code")
                remedy = "the same environment, or the same image, on every node"
                if packages and not set(named) - set(PIP):
                    remedy = f"pip install {packages}, or {remedy}"
                yield Finding(level, "versions", (answer.node,), f"not what the other nodes have: {shown}", remedy)


PIP = ("torch", "transformers", "deepspeed", "peft", "accelerate", "numpy", "safetensors")


def versions_of_node(answer: Answer) -> dict[str, str]:
    """Packages, and what the device says of its driver, toolkit and plugin."""
    device: dict[str, str] = answer.fact("device").get("versions", {})
    return {**device, **answer.fact("versions")}


def _usual(values: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """By name, the value that most nodes have; of two as frequent ones that of the lower node."""
    names = dict.fromkeys(name for each in values.values() for name in each)
    counts = {name: Counter(each[name] for _, each in sorted(values.items()) if name in each) for name in names}
    return {name: count.most_common(1)[0][0] for name, count in counts.items()}


def of_environments(answers: Sequence[Answer]) -> Iterator[Finding]:
    """Variables whose value, or absence, is not what most nodes have. Values that may be secret are not shown."""
    found = {answer.node: answer.fact("environment") for answer in answers if answer.report}
    names = sorted({name for each in found.values() for name in each})
    absent = {"hash": None, "value": None}
    known = {node: {name: each.get(name, absent) for name in names} for node, each in found.items()}
    usual = _usual({node: {name: value["hash"] for name, value in each.items()} for node, each in known.items()})
    shown = {value["hash"]: value["value"] for each in known.values() for value in each.values()}
    for answer in answers:
        told = [each["what"] for each in answer.fact("device").get("findings", ())]
        own = {name: value for name, value in known.get(answer.node, {}).items() if value["hash"] != usual[name]}
        parts = [
            f"{name} {_value(value['hash'], shown)} (on the other nodes {_value(usual[name], shown)})"
            for name, value in own.items()
            if not any(what.startswith(name) for what in told)
        ]
        if parts:
            remedy = "let the launcher set it for all: environment, or cluster.environment"
            yield Finding(WARNING, "environment", (answer.node,), "; ".join(parts), remedy)


def _value(digest: str | None, shown: Mapping[str | None, str | None]) -> str:
    if digest is None:
        return "is not set"
    value = shown[digest]
    return "has another value" if value is None else f"is '{value}'"


def of_machines(answers: Sequence[Answer]) -> Iterator[Finding]:
    """Two names of one machine; and devices that are not the same everywhere."""
    machines: dict[str, int] = {}
    for answer in answers:
        if not answer.report:
            continue
        first = machines.setdefault(answer.report["machine"] or f"?{answer.node}", answer.node)
        if first != answer.node:
            what = f"is the same machine as node {first}: their processes would share its devices"
            yield Finding(WARNING, "names", (answer.node,), what, "name each machine once")
    devices = {answer.node: answer.fact("device") for answer in answers if answer.fact("device").get("device")}
    usual = _usual({node: {"device": each["device"], "count": _count(each)} for node, each in devices.items()})
    for node, each in devices.items():
        if each["device"] != usual["device"]:
            what = f"the device is {each['device']}, and {usual['device']} on the other nodes"
            yield Finding(FAULT, "device", (node,), what, f"device={usual['device']} says why it is not taken here")
        elif _count(each) != usual["count"] and not each["exit_code"] and each["device"] != "cpu":
            what = f"{_count(each)} devices, and {usual['count']} on the other nodes"
            yield Finding(WARNING, "device", (node,), what, "is one hidden by a variable, or not seen by the driver?")


def _count(device: Mapping[str, Any]) -> int:
    return int(device["answers"].get("count", 0))
