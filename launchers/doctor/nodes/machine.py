"""What this machine has of its own: limits, shared memory, disks, versions, environment. No torch is imported."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launchers.doctor.nodes.ending import leaves
from launchers.doctor.nodes.request import Request, existing_part
from launchers.ssh import probe
from train.versions import versions_of

PACKAGES = ("crosstune", "torch", "transformers", "deepspeed", "peft", "accelerate", "numpy", "safetensors")
RDMA = Path("/sys/class/infiniband")
"""InfiniBand and RoCE adapters."""
WRITE_BYTES = 2**16
"""Written to each disk: a quota, or a file system that has become read-only, shows only so."""
TOKEN_SECONDS = 10.0
"""A network file system may show a new file to other machines only after a while."""

FAMILIES = re.compile(r"(P2P_|TORCH_)?[HNRX]CCL_|(GLOO|TORCH|PYTORCH|ASCEND|ACL|CUDA|HIP|OMP|MKL|KMP)_|DS_ACCELERATOR$")
"""Variables that decide how a run computes and communicates, and hold nothing secret."""
OWN = re.compile(r"_IF_IP$|DEVICE_ID$|_HOME(_PATH)?$|_PATH$|_DIR$")
"""Of these every machine may have a value of its own, beside those of which a run says so."""
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL")


def limits() -> dict[str, Any]:
    """Soft limits, None: unlimited; and ``rdma``: the adapters that need locked memory."""
    import resource

    kinds = {"memlock": resource.RLIMIT_MEMLOCK, "nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    soft = {name: resource.getrlimit(kind)[0] for name, kind in kinds.items()}
    found = {name: None if value == resource.RLIM_INFINITY else value for name, value in soft.items()}
    return {**found, "rdma": sorted(path.name for path in RDMA.glob("*"))}


def shared_memory() -> dict[str, int]:
    """Size and free bytes of /dev/shm; empty where there is none, as on macOS."""
    folder = Path("/dev/shm")
    return room(folder) if folder.is_dir() else {}


def room(folder: Path) -> dict[str, int]:
    """Bytes and files that an ordinary user may still write there."""
    found = os.statvfs(folder)
    counts = {"free_files": found.f_favail} if found.f_files else {}  # some file systems do not count files
    return {"total_bytes": found.f_blocks * found.f_frsize, "free_bytes": found.f_bavail * found.f_frsize, **counts}


def temporary_folder(environment: Mapping[str, str] = os.environ) -> str:
    """Where temporary files are meant to go; `tempfile.gettempdir` would pass over one that is full."""
    return environment.get("TMPDIR") or "/tmp"


def disk(path: str) -> dict[str, Any]:
    """Room, and whether a small file can be written: ``{"folder", "free_bytes", ..., "refused": why | None}``."""
    folder = existing_part(path)
    facts: dict[str, Any] = {"path": path, "folder": str(folder), **room(folder), "refused": None}
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".crosstune-try-") as file:
            leaves(Path(file.name))
            file.write(bytes(WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        facts["refused"] = error.strerror or str(error)
    return facts


def versions() -> dict[str, str]:
    """Of what decides what a run computes, the operating system's kernel, and the code of crosstune itself."""
    return {
        "python": platform.python_version(),
        **versions_of(PACKAGES),
        "code": probe.sources(),
        "machine": platform.machine(),
        "kernel": platform.release(),
    }


def environment(
    session: str, further: Iterable[str], not_shared: re.Pattern[str], variables: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """By name: a hash of the value, and the value of what holds no secret. Variables of a machine's own are left out.

    Args:
        session: goes into the hashes, so that they tell nothing outside this look.
        further: names to compare beside `FAMILIES`.
        not_shared: whole names that a run does not compare either.
        variables: of the process.
    """
    asked = {name for name in further if name in variables}
    compared = (name for name in variables if not OWN.search(name) and not not_shared.fullmatch(name))
    ours = {name for name in compared if FAMILIES.match(name)}
    found = {}
    for name in sorted(asked | ours):
        digest = hashlib.sha256(f"{session}\0{variables[name]}".encode(errors="surrogateescape")).hexdigest()[:12]
        shown = name in ours and not SECRET.search(name)
        found[name] = {"hash": digest, "value": variables[name] if shown else None}
    return found


def identity() -> dict[str, str]:
    """Tells two names of one machine: boot and network namespace. Empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {"host": socket.gethostname(), "machine": f"{boot} {os.readlink('/proc/self/ns/net')}"}
    except OSError:
        return {"host": socket.gethostname(), "machine": ""}


def token_file(request: Request) -> Path:
    """The file that machine 0 leaves in `run_dir`, or above it, for the others to see."""
    assert request.run_dir is not None
    return existing_part(request.run_dir) / f".crosstune-doctor-{request.session}"


def sees_token(request: Request, seconds: float) -> bool:
    """Whether the file that machine 0 wrote appears here with its content, within `seconds`."""
    file = token_file(request)
    deadline = time.monotonic() + seconds
    while True:
        # A listing asks the server, where a look-up may be answered from a cache.
        if file.name in os.listdir(file.parent) and file.read_text(encoding="ascii") == request.session:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
