"""What is to be started, as plain values: the same for every launcher.

A launcher decides only how a machine comes to run `launchers.node` with three facts of its own: its number, the address
of the first machine and the number of the attempt. Whatever a rank sees follows from these and from the spec.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError

if TYPE_CHECKING:  # what looks at a machine on which something is broken reads the names below without omegaconf
    from configs.schema.launch import LaunchConfig
    from configs.schema.roots import TrainConfig

NODE, ATTEMPT, MASTER = "CROSSTUNE_NODE", "CROSSTUNE_ATTEMPT", "CROSSTUNE_MASTER"
"""Variables by which a launcher tells `launchers.node` the machine's number from 0, the attempt's number from 0, and
the address of machine 0."""
NAME = re.compile(r"[^a-z0-9]+")
FIRST_PORT, PORTS = 20_000, 9_000
NAME_LENGTH = 40
"""Schedulers put names into host names, which end at 63 characters."""


@dataclass(frozen=True)
class LaunchSpec:
    """A job. All paths are absolute and the same on every machine."""

    name: str
    """Lower-case letters, digits and dashes: fit for a host name."""
    command: str
    """Of `crosstune`: ``train`` or ``run``."""
    request: str
    """File with the resolved config that every rank reads."""
    run_dir: str
    working_dir: str
    """What relative paths in the config are meant from."""
    nodes: int
    nproc: int
    """Processes per machine."""
    threads: int
    """CPU threads per process; 0: the machine's cores divided by `nproc`."""
    environment: Mapping[str, str]
    """Of every process, over what the machine's own environment has."""
    secrets: tuple[str, ...]
    """Names of variables that the launcher hands over; crosstune writes their values nowhere."""
    setup: tuple[str, ...]
    """Shell scripts that each machine sources first."""
    python: str | None
    """Null: the launcher's choice."""
    interface: str | None
    master_port: int
    cpus: int
    memory_gib: int
    devices: int
    """Per machine; 0: none are asked for."""
    time_limit_minutes: int
    restarts: int
    grace_seconds: int

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.nproc

    def arguments(self, attempt: int) -> list[str]:
        """What each rank's `crosstune` is called with. A later attempt goes on where a checkpoint is."""
        return [self.command, "--resolved", self.request, *(["--resume"] if attempt else [])]

    def port(self, attempt: int) -> int:
        """Of the rendezvous: another one for each attempt, since the last one's may not be free yet."""
        return self.master_port + attempt % 500

    def to_json(self) -> dict[str, Any]:
        """Plain values; what `from_json` reads."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> LaunchSpec:
        """What `to_json` gave.

        Raises:
            TypeError: a field is missing or unknown.
        """
        lists = {key: tuple(content[key]) for key in ("secrets", "setup") if key in content}
        return LaunchSpec(**{**content, **lists})


def make_spec(command: str, cfg: TrainConfig, launch: LaunchConfig, request: Path, stamp: str) -> LaunchSpec:
    """The job that a launch config and the config of a step describe.

    Args:
        command: ``train`` or ``run``.
        cfg: its config; `run_dir` is set.
        launch: where and how.
        request: where `cfg` will be written.
        stamp: makes the job's name its own, such as date and time.

    Raises:
        ConfigError: a secret has no value here, or the working folder has been removed.
    """
    try:
        working_dir = Path.cwd()
    except FileNotFoundError:
        raise ConfigError("the working folder", "has been removed", remedy="launch from one that is there") from None
    missing = [n for n in launch.secrets if n not in os.environ and not launch.launcher.keeps_secret(n)]
    if missing:
        raise ConfigError("secrets", f"not set in this environment: {', '.join(missing)}", remedy="export them first")
    word = NAME.sub("-", cfg.name.lower()).strip("-")[:NAME_LENGTH].strip("-") or "job"
    cluster = launch.cluster
    asks = bool(cluster.gres or cluster.resource)
    return LaunchSpec(
        name=f"{word if word[0].isalpha() else f'j{word}'}-{stamp}",
        command=command,
        request=str(request),
        run_dir=str(cfg.run_dir),
        working_dir=str(working_dir),
        nodes=launch.nodes,
        nproc=cfg.nproc,
        threads=cfg.device.threads,
        environment={**cluster.environment, **launch.environment},
        secrets=tuple(launch.secrets),
        setup=tuple(str(working_dir / Path(script).expanduser()) for script in cluster.setup),
        python=launch.python,
        interface=cluster.interface,
        master_port=launch.master_port or drawn_port(f"{stamp} {cfg.run_dir}"),
        cpus=launch.cpus,
        memory_gib=launch.memory_gib,
        devices=(cluster.devices_per_node or cfg.nproc) if asks else 0,
        time_limit_minutes=launch.time_limit_minutes,
        restarts=launch.restarts,
        grace_seconds=cfg.guard.grace_seconds,
    )


def drawn_port(text: str) -> int:
    """A port for a job's rendezvous, below those that systems give out by themselves (from 32,768 on).

    Jobs that share a machine must not meet at one port: the ranks of one would join the other's.
    """
    return FIRST_PORT + int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % PORTS


def this_python() -> str:
    """The interpreter of this command, for machines that have it under the same path."""
    return sys.executable


def environment_hash(environment: Mapping[str, str]) -> str:
    """Short name of an environment, to see that two machines have the same; tells nothing of its values."""
    content = json.dumps(sorted(environment.items()), ensure_ascii=True).encode()
    return hashlib.sha256(content).hexdigest()[:12]
