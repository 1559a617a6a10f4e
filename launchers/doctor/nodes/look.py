"""One machine's part: ``python -P -m launchers.doctor.nodes.look``.

It says `request.HELLO`, then reads the request, one line of standard input, which stays open: its end means that who
asked has gone, and ends the look. A launcher says by its variables which machine this is (`launchers.spec`). The report
is in lines of standard output (`request.report_lines`); standard error has what libraries print. Needs the standard
library and psutil; torch is imported in processes of its own, and what only a run needs where it is looked at.

    {"node", "name", "host", "machine", "asked_at", "began_at", "answered_at", "facts": {check: {...}}}

A check that raised or did not end has ``{"failed": why}`` for its facts.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from configs.errors import CrosstuneError
from launchers.doctor.nodes import machine, network
from launchers.doctor.nodes.allreduce import probe
from launchers.doctor.nodes.ending import GONE, clear, ends_on_signals, ends_with_asker, leave, leaves
from launchers.doctor.nodes.machine import TOKEN_SECONDS
from launchers.doctor.nodes.rendezvous import Guest, Host
from launchers.doctor.nodes.request import DEVICE_SECONDS, HELLO, Request, report_lines
from launchers.doctor.nodes.threads import in_threads

WAIT_SECONDS = 3600
"""For the request, which comes once all machines have been tried."""
CHECK_SECONDS = 20.0
"""For what only asks this machine: a file system that does not answer is a finding."""


def main() -> None:
    """Answers the request on standard input."""
    ends_on_signals()
    signal.alarm(WAIT_SECONDS)
    print(HELLO, flush=True)
    text = sys.stdin.buffer.readline()
    if not text.endswith(b"\n"):
        leave(GONE)
    ends_with_asker()
    answer(text.decode())


def answer(text: str, name: str = "") -> NoReturn:
    """Prints the report on this machine that a request asks for, and ends the process.

    Args:
        text: the request.
        name: of this machine, where its host name tells less.
    """
    channel = os.dup(1)
    os.dup2(2, 1)
    ends_on_signals()
    request = Request.from_json(text).on_this_machine()
    # Whoever asked may have gone without a word.
    signal.alarm(int(request.total_seconds) + 1)
    report = look(request)
    report["name"] = name or report["name"]
    with os.fdopen(channel, "w", encoding="ascii") as out:
        out.writelines(f"{line}\n" for line in report_lines(report))
    leave(0)


def look(request: Request) -> dict[str, Any]:
    """The report on this machine."""
    began = time.time()
    checks, seconds = local_checks(request), CHECK_SECONDS
    meeting = Meeting(request) if request.meets else None
    if meeting is not None:
        checks["meeting"] = meeting.meet
        seconds += request.patience_seconds + TOKEN_SECONDS
    facts = in_threads(checks, seconds)
    if not request.quick:
        facts |= in_threads({"device": lambda: look_at_device(request)}, DEVICE_SECONDS)
    if meeting is not None:
        facts["agreed"] = meeting.agree(unable(facts) if request.probes else "none was asked for")
    if request.probes and (facts["agreed"]["go"] if meeting is not None else unable(facts) is None):
        facts["allreduce"] = probe(request, interface_to_take(request, facts))
    who = {"node": request.node, "name": request.name or machine.identity()["host"], **machine.identity()}
    when = {"asked_at": request.asked_at, "began_at": began, "answered_at": time.time()}
    return {**who, **when, "facts": facts}


def local_checks(request: Request) -> dict[str, Callable[[], Any]]:
    """What needs no other machine and no device, by name."""
    # All need the first one's name. Others' are of use to people only: a name server is spared n * n questions.
    wanted = [request.master, request.address] if request.node else [request.master, *request.addresses]
    checks: dict[str, Callable[[], Any]] = {
        "names": lambda: network.names(list(filter(None, wanted))),
        "network": network.interfaces,
        "limits": limits,
        "shm": machine.shared_memory,
        "tmp": lambda: machine.disk(machine.temporary_folder()),
        "versions": machine.versions,
        "environment": lambda: environment(request),
    }
    if request.run_dir is not None:
        run_dir = request.run_dir
        checks["run_dir"] = lambda: machine.disk(run_dir)
    if request.quick:
        checks["device"] = lambda: settings_of_device(request)
    if request.meets:
        checks["way"] = lambda: way_to(request.master, request.interface)
    return checks


def way_to(master: str, interface: str | None) -> dict[str, Any]:
    """The interface that a run takes, as the run finds it: ``{"interface": name}``, or ``{"wrong", "remedy"}``.

    Args:
        master: name or address of machine 0.
        interface: that was chosen for all machines.
    """
    from launchers.node import interface_to

    try:
        return {"interface": interface or interface_to(master)}
    except CrosstuneError as error:
        return {"wrong": f"{error.where}: {error.found}", "remedy": error.remedy}


def environment(request: Request) -> dict[str, Any]:
    """`machine.environment`, without what rightly differs between the machines of a run."""
    from launchers.node import NOT_SHARED

    return machine.environment(request.session, request.compare, NOT_SHARED)


def limits() -> dict[str, Any]:
    """`machine.limits` once a run has raised those that it may raise. So has this process, which has guests itself."""
    from launchers.node import raise_file_limit

    raise_file_limit()
    return machine.limits()


class Meeting:
    """This machine's part in finding each other, and in seeing one folder."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.host: Host | None = None
        self.guest: Guest | None = None

    def meet(self) -> dict[str, Any]:
        """What `Host.meet` or `Guest.meet` found, and of the folder ``token``: see `_leave` and `_find`."""
        if self.request.node == 0:
            left = self._leave()
            self.host = Host(self.request, token=left is True)
            return {**self.host.meet(), "token": left}
        guest = Guest(self.request)
        facts = guest.meet()
        self.guest = guest
        wanted = bool(facts.pop("token", False))
        return {**facts, "token": self._find(wanted)}

    def agree(self, unable: str | None) -> dict[str, Any]:
        """Whether all begin the all-reduce, with who is missing and who cannot; takes the token away."""
        try:
            if self.host is not None:
                return self.host.agree(unable)
            if self.guest is not None and self.guest.talk is not None:
                return self.guest.agree(unable)
            return {"go": False, "missing": [], "unable": {}}
        finally:
            clear()

    def _leave(self) -> bool | str | None:
        """Writes the token: True, why it cannot be written, or None where none is wanted."""
        if self.request.run_dir is None:
            return None
        token = machine.token_file(self.request)
        leaves(token)
        try:
            token.write_text(self.request.session, encoding="ascii")
        except OSError as error:
            return error.strerror or str(error)
        return True

    def _find(self, wanted: bool) -> bool | str | None:
        """Whether the token is seen, why it cannot be looked for, or None where nobody said that there is one."""
        if self.request.run_dir is None or not wanted:
            return None
        seen = in_threads({"token": lambda: machine.sees_token(self.request, TOKEN_SECONDS)}, TOKEN_SECONDS + 2)[
            "token"
        ]
        return seen if isinstance(seen, bool) else str(seen["failed"])


def settings_of_device(request: Request) -> dict[str, Any]:
    """Findings of `crosstune doctor` on the variables of a device, as far as they need no torch."""
    from launchers.doctor.device import findings_of_settings, name_of

    cfg = config_of(request)
    return {"asked": name_of(cfg.device), "findings": [vars(each) for each in findings_of_settings(cfg)]}


def look_at_device(request: Request) -> dict[str, Any]:
    """The report of `crosstune doctor` on this machine."""
    from launchers.doctor.device import examine
    from launchers.environment import prepare_environment

    cfg = config_of(request)
    prepare_environment(cfg)
    return examine(cfg)


def config_of(request: Request) -> Any:
    """The request's `DoctorConfig`."""
    from configs.compose import load_resolved

    with tempfile.TemporaryDirectory(prefix="crosstune-doctor-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(request.config, encoding="utf-8")
        return load_resolved(file)


def unable(facts: Mapping[str, Any]) -> str | None:
    """Why this machine cannot take part in an all-reduce."""
    device = facts.get("device", {"failed": "was not looked at"})
    if "failed" in device:
        return f"its devices: {device['failed']}"
    return "its devices cannot be used as asked" if device["exit_code"] else None


def interface_to_take(request: Request, facts: Mapping[str, Any]) -> str | None:
    """Where collectives go unless their own variables say so: as a launcher sets it."""
    if request.nodes == 1:
        return "lo" if sys.platform == "linux" else "lo0"
    way: str | None = facts.get("way", {}).get("interface")
    return way


if __name__ == "__main__":
    main()
