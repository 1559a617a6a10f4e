"""What the doctor concludes: what is in order, what is missing and how to get it, what is worth knowing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import CrosstuneError
from configs.schema.device import KernelChoice
from configs.schema.doctor import DoctorConfig
from launchers.doctor.standin.build import MARK
from train.devices.ascend_environment import Plan
from train.devices.ascend_variables import unknown
from train.versions import versions_of

AUTO = "train.devices.auto.AutoDevice"
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate")
SET_ENV = (
    *("/usr/local/Ascend/cann/set_env.sh", "/usr/local/Ascend/ascend-toolkit/set_env.sh"),
    *("~/Ascend/cann/set_env.sh", "~/Ascend/ascend-toolkit/set_env.sh"),
)
"""Where CANN's installer puts the script that sets its paths: since 8.5, and before."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    level: str
    """``ok``; ``missing``: a run would not start; ``note``: it would."""
    what: str
    remedy: str | None = None


def of_packages(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Packages that are not there."""
    for name in PACKAGES:
        if name not in versions:
            yield Finding(
                "missing", f"{name} is not installed", f"pip install crosstune brings it, or pip install {name}"
            )


def of_look(record: Mapping[str, Any], cfg: DoctorConfig) -> Iterator[Finding]:
    """What a device said of itself."""
    if not record["available"]:
        # A device says what is wrong, then what to do.
        problem, _, remedy = record["reason"].partition("; ")
        yield Finding("missing", f"{record['name']} cannot be used: {problem}", remedy or None)
    for fault in record["faults"]:
        yield of_fault(CrosstuneError(fault["where"], fault["found"], allowed=fault["allowed"], remedy=fault["remedy"]))
    if record.get("multiplies") is True:
        yield Finding("ok", f"a matrix product on {record['torch_device']} came out right")
    elif record.get("multiplies") is False:
        yield Finding("missing", f"a matrix product on {record['torch_device']} came out wrong", "see the driver's log")
    if record["available"] and not record["faults"] and cfg.nproc <= record["count"]:
        yield Finding("ok", f"nproc={cfg.nproc} and model.precision={cfg.model.precision.value} are possible")
    for op, reason in record.get("kernels", {}).items():
        if reason and getattr(cfg.device, f"{op}_kernel") is KernelChoice.device:
            what = f"device.{op}_kernel=device, but it cannot be used: {reason}"
            yield Finding("missing", what, f"device.{op}_kernel=auto")
    if record["available"] and record["deepspeed"] is None:
        yield Finding(
            "note", f"DeepSpeed knows no {record['name']}: sharding=zero1, zero2 and zero3 stop", "sharding=plain"
        )
    if record["available"] and not record["proven"]:
        yield Finding(
            "note",
            f"{record['name']} was not run by crosstune's makers",
            f"tests/device/check.py device={record['name']} proves it here",
        )


def of_fault(error: CrosstuneError) -> Finding:
    """A fault that would stop a run."""
    allowed = f" (allowed: {error.allowed})" if error.allowed else ""
    return Finding("missing", f"{error.where}: {error.found}{allowed}", error.remedy)


def of_ascend(plan: Plan, cfg: DoctorConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """What can be said of an Ascend without loading torch_npu, which may take the process down."""
    if MARK in environment:
        yield Finding("note", "this is crosstune's stand-in: the real torch_npu API on a pretended device, no card")
    yield from _versions_of_torch_npu()
    home = environment.get("ASCEND_HOME_PATH") or environment.get("ASCEND_TOOLKIT_HOME")
    if not home:
        yield Finding("missing", "CANN's environment is not set: no ASCEND_HOME_PATH", how_to_source())
    elif not (Path(home) / "lib64").is_dir() and not (Path(home) / "runtime").is_dir():
        yield Finding("missing", f"ASCEND_HOME_PATH={home} holds no CANN", how_to_source())
    else:
        yield Finding("ok", f"CANN in {home}")
    for fault in plan.faults:
        yield of_fault(fault)
    if not plan.faults:
        yield Finding("ok", "Ascend's settings have no misspelt name and no value out of range")
    for note in plan.notes:
        yield Finding("note", note)
    strange = unknown(environment, getattr(cfg.device, "known_variables", ()))
    if strange:
        shown = ", ".join(strange[:8]) + (f" and {len(strange) - 8} more" if len(strange) > 8 else "")
        yield Finding(
            "note", f"variables that crosstune does not know: {shown}", "they may do nothing; see CANN's list"
        )


def _versions_of_torch_npu() -> Iterator[Finding]:
    """Only what stops nothing: the device itself says whether torch_npu is there, and of another release."""
    found = versions_of(["torch", "torch_npu"])
    torch, plugin = found.get("torch", "").partition("+")[0], found.get("torch_npu", "")
    release = re.match(r"\d+(\.\d+)*", plugin)
    if release is not None and release[0].split(".")[:3] == torch.split("."):
        yield Finding("ok", f"torch_npu {plugin} matches torch {torch}")
    elif release is not None and release[0].split(".")[:2] == torch.split(".")[:2]:
        yield Finding("note", f"torch_npu {plugin} was made for another patch of torch {torch}", f"torch_npu=={torch}")


def how_to_source() -> str:
    """The command that sets CANN's paths, as far as its script is found."""
    found = [path for path in SET_ENV if Path(path).expanduser().is_file()]
    return f"source {found[0]}" if found else f"install CANN (toolkit and kernels), then source {SET_ENV[0]}"
