"""`crosstune doctor device=X`: what a device can do here, what is missing, and how to get it.

Nothing is trained and nothing is changed. Not covered: speed, and whether several devices reach each other
(`tests/device/check.py` runs them).
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.compose import save_resolved
from configs.errors import EXIT_DONE, EXIT_USER_FAULT
from configs.schema.device import DeviceConfig
from configs.schema.doctor import DoctorConfig
from launchers.doctor import bounded
from launchers.doctor.findings import AUTO, PACKAGES, Finding, of_ascend, of_fault, of_look, of_packages
from launchers.environment import ascend_config
from train.devices.ascend_environment import Plan, plan
from train.versions import versions_of

PATIENCE_SECONDS = 120
"""For one device. A driver that hangs is a finding."""


def doctor(cfg: DoctorConfig) -> dict[str, Any]:
    """`crosstune doctor`: prints what was found; the result is the same as data, with the exit code."""
    report = examine(cfg)
    from launchers.doctor.page import show

    show(report)
    return report


def examine(cfg: DoctorConfig) -> dict[str, Any]:
    """What the device answered, versions, settings and findings, with the exit code they mean."""
    ascend = ascend_config(cfg.device)
    settings = plan(ascend, os.environ) if ascend else None
    records = look(cfg, environment_for(settings))
    chosen, passed_over = records[-1], records[:-1]
    versions = {"python": platform.python_version(), **versions_of(PACKAGES), **chosen["versions"]}
    findings = [*of_packages(versions), *of_look(chosen, cfg)]
    if settings is not None:
        # device=auto settles an Ascend's variables before it knows whether it takes one.
        more = of_ascend(settings, cfg) if chosen["name"] == "ascend" else map(of_fault, settings.faults)
        findings += [each for each in more if each not in findings]
    return {
        "device": chosen["name"],
        "answers": chosen,
        "passed_over": passed_over,
        "versions": versions,
        "settings": settings_of(chosen, settings),
        "findings": [vars(finding) for finding in findings],
        "exit_code": EXIT_USER_FAULT if any(each.level == "missing" for each in findings) else EXIT_DONE,
    }


def findings_of_settings(cfg: DoctorConfig) -> list[Finding]:
    """The part of the findings that needs no torch: packages, and the variables of the device that was named."""
    ascend = ascend_config(cfg.device)
    if ascend is None:
        return [*of_packages(versions_of(PACKAGES))]
    settings = plan(ascend, os.environ)
    named = cfg.device._target_ != AUTO
    return [
        *of_packages(versions_of(PACKAGES)),
        *(of_ascend(settings, cfg) if named else map(of_fault, settings.faults)),
    ]


def settings_of(chosen: Mapping[str, Any], settings: Plan | None) -> list[dict[str, str]]:
    """Environment variables of the device as a run would have them, with where each value comes from."""
    if settings is not None and chosen["name"] == "ascend":
        return [
            {"variable": name, "value": value, "from": settings.origins[name]}
            for name, value in sorted(settings.values.items())
        ]
    return [
        {"variable": name, "value": value, "from": "environment"}
        for name, value in sorted(chosen.get("variables", {}).items())
    ]


def environment_for(settings: Plan | None) -> dict[str, str]:
    """The environment of the look: as for a run, without what would stop one, so that the rest is seen."""
    environment = dict(os.environ)
    if settings is None:
        return environment
    faulty = {fault.where for fault in settings.faults}
    for name in faulty & environment.keys():
        del environment[name]
    return environment | {name: value for name, value in settings.values.items() if name not in faulty}


def look(cfg: DoctorConfig, environment: Mapping[str, str]) -> list[dict[str, Any]]:
    """What each device answered, the one that a run would take last.

    A device that takes the looking process down is recorded so, and the look goes on without it.
    """
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="crosstune-doctor-", ignore_cleanup_errors=True) as folder:
        config = Path(folder) / "config.yaml"
        save_resolved(cfg, config)
        while True:
            out = Path(folder) / f"{len(records)}.jsonl"
            ended = _look(config, out, [record["name"] for record in records], environment)
            lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
            records += [line for line in lines if "available" in line]
            if ended is None and records:
                return records
            lost = lines[-1]["name"] if lines and "available" not in lines[-1] else None
            records.append(_lost(lost or name_of(cfg.device), ended or "it ended without an answer"))
            if lost is None or cfg.device._target_ != AUTO:
                return records


def name_of(device: DeviceConfig) -> str:
    """As a device calls itself; ``auto`` where it is to be found out."""
    return device._target_.rpartition(".")[2].removesuffix("Device").lower()


def _look(config: Path, out: Path, skip: list[str], environment: Mapping[str, str]) -> str | None:
    """Runs the looking process; None, or how it ended."""
    command = [sys.executable, "-P", "-m", "launchers.doctor.look", str(config), str(out), *skip]
    messages = out.with_suffix(bounded.MESSAGES)
    process = bounded.start(command, environment, messages)
    if bounded.end([process], time.monotonic() + PATIENCE_SECONDS):
        return f"it did not answer within {PATIENCE_SECONDS} s"
    if process.returncode == 0:
        return None
    said = bounded.last_words(messages) or "no message"
    if process.returncode < 0:
        return f"it took its process down ({signal.Signals(-process.returncode).name}): {said}"
    return said


def _lost(name: str, how: str) -> dict[str, Any]:
    """The record of a device that could not even say that it is not there."""
    reason = f"{how}; see the driver's and the plugin's own logs"
    return {"name": name, "available": False, "reason": reason, "versions": {}, "faults": []}
