"""What one process can say in a hang: the stacks of its threads, whether it waits for others, how its neighbours are.

Whether the thread of the steps waits for other ranks is read from its frames: inside torch.distributed, or in the
``wait()`` of what that gave. Devices that compute behind the thread's back hide it: there, a thread in a phase that
reads results from the device may wait for that device or, through it, for another rank.
"""

from __future__ import annotations

import linecache
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from types import FrameType

import psutil
import torch.distributed as dist

from train.guard.heartbeat import Phase

ROOT = Path(__file__).resolve().parents[2]
OURS = str(ROOT / "train") + os.sep
COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")
THREADING = os.sep + "threading.py"
WAIT = re.compile(r"\.(wait|synchronize)\(")
"""A call that waits for a collective begun before."""
TO_DEVICE = re.compile(r"\.(to|copy_|cpu|item|tolist)\(|float\(|int\(|bool\(")
"""A call that may wait for the device."""
STACK_CHARACTERS = 60_000
"""The most that one rank's stacks take in a report."""


class Waits(Enum):
    """Whether a rank waits for others."""

    yes = "yes"
    maybe = "maybe"
    no = "no"


@dataclass(frozen=True)
class Member:
    """A process of the run; does not change."""

    rank: int
    host: str
    machine: str
    """Equal for processes that see each other's process ids."""
    pid: int
    born: float
    """Creation time of the process: a process id may be given out again."""

    @staticmethod
    def of_this_process(rank: int) -> Member:
        """This process."""
        try:
            namespace = os.readlink("/proc/self/ns/pid")
        except OSError:  # not Linux
            namespace = ""
        host = socket.gethostname()
        process = psutil.Process()
        return Member(rank, host, f"{host} {psutil.boot_time():.0f} {namespace}", process.pid, process.create_time())

    def state(self) -> str:
        """Of the process, asked from its own machine: stopped, dead, gone, or what the kernel says of a living one."""
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.born:
                return "gone"
            status = str(process.status())
        except psutil.NoSuchProcess:
            return "gone"
        if status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP):
            return "stopped"
        return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else status

    def kill(self) -> None:
        """Ends the process, if it is still the one that it was."""
        try:
            process = psutil.Process(self.pid)
            if process.create_time() == self.born:
                process.kill()
        except psutil.Error:  # gone by now
            pass


@dataclass(frozen=True)
class Account:
    """What a process says of itself and its neighbours, at one moment."""

    beats: int
    waits: Waits
    doing: str
    """File, line and function at which the thread of the steps is, or the collective in which it waits."""
    collectives: list[int] | None
    """Begun so far, by group of the steps; None where a backend keeps no count."""
    states: dict[int, str]
    """Of the ranks on this machine, by rank."""
    stacks: str

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self) | {"waits": self.waits.value}

    @staticmethod
    def from_json(content: dict[str, object]) -> Account:
        """From what `to_json` gave, maybe by way of JSON."""
        states = {int(rank): state for rank, state in content["states"].items()}  # type: ignore[attr-defined]
        return Account(**(content | {"waits": Waits(content["waits"]), "states": states}))  # type: ignore[arg-type]


def give_account(
    beats: int,
    phase: Phase,
    neighbours: Sequence[Member],
    *,
    asynchronous: bool,
    background: dist.ProcessGroup | None,
    leave_out: Sequence[threading.Thread] = (),
) -> Account:
    """Looks at this process.

    Args:
        beats: of its heartbeat.
        phase: of its heartbeat.
        neighbours: members on this machine.
        asynchronous: the device computes behind the thread's back.
        background: the group whose collectives do not belong to the steps.
        leave_out: threads of the watch itself.
    """
    frames = sys._current_frames()
    for thread in leave_out:
        frames.pop(thread.ident or 0, None)
    waits, doing = _waiting(frames, phase, asynchronous)
    return Account(
        beats=beats,
        waits=waits,
        doing=doing,
        collectives=_collectives(background),
        states={member.rank: member.state() for member in neighbours},
        stacks=_stacks(frames),
    )


def _waiting(frames: dict[int, FrameType], phase: Phase, asynchronous: bool) -> tuple[Waits, str]:
    """Whether the thread of the steps waits for other ranks, and where it is."""
    main = threading.main_thread().ident or 0
    frame = frames[main]
    doing = _waits_in(frame)
    if doing is None and (writer := _joined(frame)) in frames:  # for a writer of a checkpoint: what does that do?
        frame = frames[writer]
        doing = _waits_in(frame)
    elif doing is None and frame.f_code.co_name == "_engine_run_backward":  # hooks run on threads of autograd
        named = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        found = [_waits_in(other) for ident, other in frames.items() if ident not in named]
        doing = next((text for text in found if text), None)
    if doing is not None:
        return Waits.yes, doing
    place = _place(frame)
    if not asynchronous or phase is Phase.setup:
        return Waits.no, place
    hidden = phase is not Phase.data or TO_DEVICE.search(_call_under_way(frame))
    return (Waits.maybe if hidden else Waits.no), place


def _waits_in(frame: FrameType) -> str | None:
    """The collective in which a thread waits, and who called it; None where it does not wait."""
    name, current = None, frame
    while current is not None:
        if current.f_code.co_filename.endswith(COLLECTIVES):
            name = current.f_code.co_name
        elif name is not None and current.f_code.co_filename.startswith(OURS):
            break
        current = current.f_back  # type: ignore[assignment]
    if name is not None:
        return f"{name} called at {_line(current)}" if current is not None else name
    call = _call_under_way(frame)
    if WAIT.search(call) and not frame.f_code.co_filename.endswith(THREADING):
        return f"{call.strip()[:80]} at {_place(frame)}"
    return None


def _joined(frame: FrameType | None) -> int:
    """The thread for whose end another waits; 0 where it waits for none."""
    while frame is not None and frame.f_code.co_filename.endswith(THREADING):
        if frame.f_code.co_name == "join" and isinstance(thread := frame.f_locals.get("self"), threading.Thread):
            return thread.ident or 0
        frame = frame.f_back
    return 0


def _is_ours(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return True
        frame = frame.f_back
    return False


def _place(frame: FrameType) -> str:
    """Innermost line, and the innermost one of ours if that is another."""
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(OURS):
        ours = ours.f_back
    text = _line(frame)
    return text if ours is None or ours is frame else f"{text}, from {_line(ours)}"


def _line(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    short = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
    return f"{short}:{frame.f_lineno} ({frame.f_code.co_name})"


def _call_under_way(frame: FrameType) -> str:
    """Source text of the call that a frame waits for; empty where the source is not at hand."""
    place = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None, None, None, None))
    first, last, begin, end = place
    if first is None or begin is None:
        return ""
    line = linecache.getline(frame.f_code.co_filename, first).encode()
    return line[begin : end if first == last else None].decode(errors="replace")


def _collectives(background: dist.ProcessGroup | None) -> list[int] | None:
    """Begun in each group but `background`, whose thread is not that of the steps; groups are made in one order."""
    if not dist.is_initialized():
        return None
    counts: list[int] = []
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is background:
            continue
        try:
            counts.append(group._get_sequence_number_for_group())  # type: ignore[attr-defined]  # not in torch's stub
        except RuntimeError:  # the backend keeps no count
            return None
    return counts


def _stacks(frames: dict[int, FrameType]) -> str:
    """Python stacks, the thread of the steps first, then ours, then the others."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    order = sorted(frames, key=lambda ident: (ident != main, not _is_ours(frames[ident]), ident))
    parts = []
    for ident in order:
        lines = "".join(traceback.format_stack(frames[ident]))
        parts.append(f"thread {names.get(ident, 'without a name')}, most recent call last:\n{lines}")
    return "\n".join(parts)[:STACK_CHARACTERS]
