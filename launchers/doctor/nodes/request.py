"""What each machine is asked, and the lines in which it answers. Plain values, so that any launcher can carry them."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launchers.spec import MASTER, NODE

MARK = "CROSSTUNE-NODE-REPORT "
"""Begins a line of a report: a scheduler's log holds other lines, too."""
HELLO = "CROSSTUNE-NODE-HELLO"
"""A machine's first line: what runs before it, a login or a setup script, has come to an end."""
LINE = re.compile(MARK + r"(\d+) (\S+)")
"""One of them: its number, and its piece of the report."""
PIECE = 400
DEVICE_SECONDS = 150.0
"""For a look at the devices, which imports torch. A driver that hangs is a finding."""
LATE_SECONDS = 60.0
"""Beyond its patience: for the checks, the conversation with machine 0, and for its report to arrive."""


@dataclass(frozen=True)
class Request:
    """One question to all machines; `node` says whose copy it is."""

    session: str
    """Random: tells this question's connections and files from everything else."""
    nodes: int
    names: tuple[str, ...]
    """Of the machines as the user calls them, by number; empty where only the scheduler knows them."""
    addresses: tuple[str, ...]
    """By which they are reached, likewise."""
    master: str
    """Name or address of machine 0; empty: the launcher's variable has it."""
    master_port: int
    nproc: int
    """Processes that a run would start per machine."""
    run_dir: str | None
    """Absolute; None: none is looked at."""
    shared: bool
    """Whether `run_dir` must be one folder for all machines."""
    needed_bytes: int
    """That must be free in `run_dir`."""
    interface: str | None
    """Where rendezvous and collectives are to go; None: where the route to machine 0 leads."""
    compare: tuple[str, ...]
    """Names of further environment variables whose values must be equal; they are told by hash only."""
    patience_seconds: float
    """By so much one machine may come later than another."""
    quick: bool
    """No look at devices, no all-reduce."""
    rendezvous: bool
    """Off for a host that is none of the machines, such as the one a job is submitted from."""
    allreduce_bytes: int
    """Of the buffer of the probe; 0: none is run."""
    allreduce_seconds: float
    """For the probe, from its first process to its last figure."""
    config: str
    """`DoctorConfig` as YAML: device, precision, processes."""
    asked_at: float
    """`time.time` of the asking host."""
    node: int = 0

    @property
    def name(self) -> str:
        """This machine's for the user; empty where only it knows."""
        return self.names[self.node] if self.names else ""

    @property
    def address(self) -> str:
        """By which this machine is reached; empty where only it knows."""
        return self.addresses[self.node] if self.addresses else ""

    @property
    def meets(self) -> bool:
        """Whether machines must find each other."""
        return self.rendezvous and self.nodes > 1

    @property
    def probes(self) -> bool:
        """Whether an all-reduce is run."""
        return not self.quick and self.rendezvous and self.allreduce_bytes > 0 and self.nodes * self.nproc > 1

    @property
    def agree_seconds(self) -> float:
        """After the machines have met, for the slowest one's look at its devices."""
        return self.patience_seconds + (0.0 if self.quick else DEVICE_SECONDS)

    @property
    def total_seconds(self) -> float:
        """After which a machine that has not answered will not."""
        return (
            self.patience_seconds + self.agree_seconds + LATE_SECONDS + (self.allreduce_seconds if self.probes else 0)
        )

    def to_json(self) -> str:
        """One line; what `from_json` reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Request:
        """What `to_json` gave.

        Raises:
            ValueError: it is no JSON.
            TypeError: a field is missing or unknown.
        """
        content: dict[str, Any] = json.loads(text)
        return Request(**content | {key: tuple(content[key]) for key in ("names", "addresses", "compare")})

    def on_this_machine(self, environment: Mapping[str, str] = os.environ) -> Request:
        """The copy for the machine whose number and master a launcher's variables say, where they are set."""
        return replace(
            self,
            node=int(environment.get(NODE, self.node)),
            master=environment.get(MASTER) or self.master,
        )


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """A report in short lines of printable characters: srun, and Kubernetes, tear long ones apart."""
    text = base64.b64encode(zlib.compress(json.dumps(report).encode())).decode()
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    yield from (f"{MARK}{number} {piece}" for number, piece in enumerate(pieces))


def report_in(lines: Iterable[str]) -> dict[str, Any] | None:
    """The report among the lines of a machine's output, whatever a launcher puts before each; None: not whole."""
    pieces = {int(match[1]): match[2] for line in lines if (match := LINE.search(line))}
    try:
        text = zlib.decompress(base64.b64decode("".join(pieces[number] for number in sorted(pieces))))
        report: dict[str, Any] = json.loads(text)
    except (ValueError, zlib.error):  # a checksum is in it
        return None
    return report


def existing_part(path: str) -> Path:
    """The path, or the nearest folder above it that exists: a run makes the rest."""
    folder = Path(path)
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder
