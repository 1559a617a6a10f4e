"""`crosstune doctor nodes`: asks every node through the launcher of the run, judges the answers, prints the page."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.compose import build, to_yaml
from configs.errors import EXIT_DONE, EXIT_USER_FAULT, CrosstuneError
from configs.schema.doctor import DoctorConfig
from configs.schema.doctor_nodes import DoctorNodesConfig
from launchers.base import Launcher
from launchers.doctor.nodes.carry import AsksNodes, asker_of
from launchers.doctor.nodes.findings import FAULT, Answer
from launchers.doctor.nodes.judge import judge
from launchers.doctor.nodes.request import Request, report_in


def doctor_nodes(cfg: DoctorNodesConfig, asks: AsksNodes | None = None) -> dict[str, Any]:
    """`crosstune doctor nodes`: prints what was found; the result is the same as data, with the exit code.

    Args:
        cfg: what is meant to run.
        asks: who carries the questions; None: the configured launcher.

    Raises:
        ConfigError: the launcher's nodes cannot be asked.
    """
    asks = asks or asker_of(cfg, build(cfg.launcher, Launcher, cfg.cluster))
    requests = requests_of(cfg, asks.node_names(cfg.nodes), asks.node_addresses(cfg.nodes))
    answers = ask(requests, asks)
    findings = judge(requests[0], answers)

    from rich.console import Console

    from launchers.doctor.nodes.page import name_of, show

    show(requests[0], answers, findings, Console())
    names = [name_of(answer.node, requests[0], answers) for answer in answers]
    return {
        "nodes": [
            {"node": answer.node, "name": name, "report": answer.report, "error": answer.error and answer.error.found}
            for answer, name in zip(answers, names, strict=True)
        ],
        "findings": [{**vars(each), "nodes": [names[node] for node in each.nodes]} for each in findings],
        "exit_code": EXIT_USER_FAULT if any(each.level == FAULT for each in findings) else EXIT_DONE,
    }


def requests_of(cfg: DoctorNodesConfig, names: Sequence[str], addresses: Sequence[str]) -> list[Request]:
    """The question to each node.

    Args:
        cfg: what is meant to run.
        names: as the user calls the nodes; empty: only a scheduler knows them.
        addresses: by which they reach each other, likewise.
    """
    doctor = DoctorConfig(nproc=cfg.nproc, model=cfg.model, device=cfg.device)
    first = Request(
        session=secrets.token_hex(16),
        nodes=cfg.nodes,
        names=tuple(names),
        addresses=tuple(addresses),
        master=addresses[0] if addresses else "",
        master_port=cfg.master_port,
        nproc=cfg.nproc,
        run_dir=None if cfg.run_dir is None else os.path.abspath(Path(cfg.run_dir).expanduser()),
        shared=cfg.shared,
        needed_bytes=int(cfg.needed_gib * 2**30),
        interface=cfg.cluster.interface,
        compare=tuple(cfg.compare),
        patience_seconds=float(cfg.patience_seconds),
        quick=cfg.quick,
        rendezvous=True,
        allreduce_bytes=cfg.allreduce_mib * 2**20,
        allreduce_seconds=float(cfg.allreduce_seconds),
        config=to_yaml(doctor),
        asked_at=time.time(),
    )
    return [replace(first, node=node) for node in range(cfg.nodes)]


def ask(requests: Sequence[Request], asks: AsksNodes) -> list[Answer]:
    """One answer per node, by number; of a node that did not answer why."""
    seconds = requests[0].total_seconds
    answers: dict[int, Answer] = {}
    with closing(asks.run_on_each(requests, seconds)) as asked:
        for node, heard in asked:
            heard_at = time.time()
            report = None if isinstance(heard, CrosstuneError) else report_in(lines := list(heard))
            error = heard if isinstance(heard, CrosstuneError) else None
            if report is None and error is None:
                said = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
                error = CrosstuneError(f"node {node}", f"it ended without one; it said last: {said[:200]}")
            # The question may have waited for the last node to come.
            asked_at = (report or {}).get("asked_at", requests[node].asked_at)
            answers[node] = Answer(node, report, error, asked_at, heard_at)
    late = CrosstuneError("time", f"nothing came within {seconds:.0f} s")
    now = time.time()
    return [answers.get(each.node) or Answer(each.node, None, late, each.asked_at, now) for each in requests]
