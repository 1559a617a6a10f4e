"""environment.json: where and with what a run was made. Variables by an allow-list, so that no secret gets in."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from configs.files import write_whole
from data_prep.pool import usable_cores
from train.devices.base import Device
from train.versions import versions_of

PACKAGES = (
    *("crosstune", "torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "tokenizers"),
    *("safetensors", "hydra-core", "numpy", "pyarrow"),
)
VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"),
    *("DS_ACCELERATOR", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "TOKENIZERS_PARALLELISM"),
    *("PYTHONHASHSEED", "TORCH_EXTENSIONS_DIR", "TORCH_DEVICE_BACKEND_AUTOLOAD"),
    "CROSSTUNE_STANDIN",  # a device that is only pretended must show in the record
)
"""Those of the device come besides: it names its own."""


def package_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a run computes; absent ones are left out."""
    return versions_of(PACKAGES)


def code_version() -> str:
    """Version of crosstune; from a checkout also its commit, with ``+changed`` if files differ from it."""
    try:
        release = version("crosstune")
    except PackageNotFoundError:
        release = "unreleased"
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return release
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return release
    changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml", "*.jinja")
    return f"{release} ({commit}{'+changed' if changed else ''})"


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here: the release alone must do
    return done.stdout.strip() if done.returncode == 0 else None


def write_environment(path: Path, device: Device) -> None:
    """Writes environment.json, whole or not at all."""
    facts = {
        "code": code_version(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": device.describe(),
        "packages": package_versions(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ} | device.variables(),
    }
    write_whole(path, json.dumps(facts, indent=2) + "\n")


def _processor() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
