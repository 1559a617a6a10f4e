"""How the doctor's questions are carried: into the environment, container and place that a run would have there."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from configs.compose import build, compose
from configs.errors import CrosstuneError
from launchers.base import Launcher
from launchers.doctor.nodes import converse
from launchers.doctor.nodes.carry import COMMAND, IN_PLACE, OverSsh, ThroughSlurm, asker_of, unreported
from launchers.doctor.nodes.command import requests_of
from launchers.doctor.nodes.converse import Asker, Conversation, Ended, Heard
from launchers.doctor.nodes.request import HELLO, Request, report_in, report_lines
from launchers.spec import MASTER, NODE
from launchers.torchrun import free_port
from tests.net_lab import wait_for


def asker(*words: str) -> object:
    """Who asks, with these words of `crosstune doctor nodes`."""
    cfg = compose("doctor_nodes", list(words))
    return asker_of(cfg, build(cfg.launcher, Launcher, cfg.cluster))


def srun(*words: str) -> tuple[list[str], list[str]]:
    """Options of the srun, and the command that takes its place on a node."""
    slurm = asker("launcher=slurm", "nodes=2", *words)
    assert isinstance(slurm, ThroughSlurm)
    argv = slurm.command(60)
    at = argv.index("bash")
    assert argv[at : at + 4] == ["bash", "-c", IN_PLACE, "crosstune"]
    return argv[:at], argv[at + 4 :]


def test_srun_is_asked_as_a_run_would_be(tmp_path: Path) -> None:
    options, command = srun("launcher.srun_extra=[--network=sn_all, '--comment=a b']", "queue_seconds=300")
    assert {"--network=sn_all", "--comment=a b", "--immediate=300"} <= set(options)
    assert command[-len(COMMAND) :] == list(COMMAND) and not any("container" in word for word in options)


@pytest.mark.parametrize("kind", ["pyxis", "apptainer"])
def test_a_container_of_slurm_is_looked_into(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = [f"launcher.container={kind}", "launcher.image='/images/a b.sif'", "launcher.mounts=['/data:/data:ro']"]
    options, command = srun(*words, "launcher.container_args=[--nv]", f"run_dir={tmp_path}/runs/not-yet")
    mounts = f"{tmp_path}/runs:{tmp_path}/runs,{tmp_path}:{tmp_path},/data:/data:ro"
    inside = ["python3", *COMMAND]
    if kind == "pyxis":
        assert options[-4:-1] == ["--container-image=/images/a b.sif", f"--container-mounts={mounts}", "--nv"]
        assert command == inside
    else:
        assert command == ["apptainer", "exec", "--bind", mounts, "--nv", "/images/a b.sif", *inside]
        assert not any("container" in word for word in options)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[01-04,07],login", "n01"), ("a,b", "a"), ("gpu-7", "gpu-7"), ("r[3,5]-ib", "r3-ib"), ("x-[2-9],y[1-2]", "x-2")],
)
def test_without_scontrol_the_first_machine_is_read_from_the_list(nodes: str, first: str, tmp_path: Path) -> None:
    """As inside a container, which has no commands of Slurm."""
    for word in ("sed", "bash", "env"):
        (tmp_path / word).symlink_to(f"/bin/{word}" if Path(f"/bin/{word}").exists() else f"/usr/bin/{word}")
    environment = {"PATH": str(tmp_path), "SLURM_JOB_NODELIST": nodes, "SLURM_PROCID": "1"}
    done = subprocess.run(["/bin/bash", "-c", IN_PLACE, "crosstune", "env"], env=environment, stdout=subprocess.PIPE)
    found = dict(line.partition("=")[::2] for line in os.fsdecode(done.stdout).splitlines())
    assert (found[NODE], found[MASTER]) == ("1", first)


class Scripted(Asker):
    """Nodes that are scripts of the shell, which may use ``$HELLO``, ``$REPORT`` and ``$NODE``."""

    first_seconds = 20.0

    def __init__(self, *scripts: str) -> None:
        self.scripts = scripts

    def called(self, node: int) -> str:
        return f"host-{node}"

    def commands(self, nodes: int, seconds: float) -> Mapping[tuple[int, ...], Sequence[str]]:
        return {(node,): ["bash", "-c", self.script(node)] for node in range(nodes)}

    def script(self, node: int) -> str:
        [report] = report_lines({"node": node})
        return f"HELLO={HELLO}; REPORT={shlex.quote(report)}; NODE={node}\n{self.scripts[node]}"

    def fault(self, node: int, ended: Ended) -> CrosstuneError:
        return unreported(self.called(node), ended, "/opt/python")


def requests_for(nodes: int) -> list[Request]:
    cfg = compose("doctor_nodes", [f"nodes={nodes}", "quick=true", "patience_seconds=1"])
    return requests_of(cfg, [f"host-{node}" for node in range(nodes)], ())


def told(asks: Asker, nodes: int, seconds: float = 20.0) -> dict[int, str]:
    """By node, ``report``, or what is wrong with it."""
    heard = dict(asks.run_on_each(requests_for(nodes), seconds))
    return {
        node: each.found if isinstance(each, CrosstuneError) else "report" if report_in(each) else "?"
        for node, each in heard.items()
    }


ANSWERS = "echo $HELLO; read -r request; echo $REPORT"


def test_all_nodes_are_asked_at_the_same_time_once_the_last_has_come(tmp_path: Path) -> None:
    first = f"echo $HELLO; read -r request; [ -e {tmp_path}/came ] && echo $REPORT"
    assert told(Scripted(first, f"sleep 0.5; touch {tmp_path}/came; {ANSWERS}"), 2) == {0: "report", 1: "report"}


def test_a_node_that_hangs_at_login_is_given_up_soon_and_named_meanwhile(monkeypatch, capfd) -> None:
    monkeypatch.setattr(converse, "NOTE_SECONDS", 0.3)
    asks = Scripted(ANSWERS, "echo no such home >&2; sleep 60", "echo $HELLO; sleep 60")
    asks.first_seconds = 0.8
    began = time.monotonic()
    found = told(asks, 3, seconds=1.0)
    assert time.monotonic() - began < 5
    assert found[0] == "report" and found[2] == "nothing came within 1 s"
    assert found[1] == "no sign within 1 s; it said last: no such home"
    said = capfd.readouterr().err
    assert "no sign yet of host-1 (1 of 3 nodes)" in said and "still at work: host-2" in said


OVERLOADED = "kex_exchange_identification: Connection closed by remote host"


def test_a_host_that_has_too_many_logins_is_tried_again_as_the_launcher_does(tmp_path: Path, monkeypatch) -> None:
    """No more at a time than the launcher calls; and what is no overload is no reason to try again."""
    words = ["nodes=4", "launcher=ssh", "launcher.hosts=[a,b,c,d]", "launcher.parallel=2"]
    asks = asker(*words)
    assert isinstance(asks, OverSsh) and asks.first_seconds == 50
    monkeypatch.setattr("launchers.doctor.nodes.carry.PAUSE_SECONDS", 0.1)
    once = f"[ -e {tmp_path}/$NODE ] || {{ touch {tmp_path}/$NODE; echo {OVERLOADED} >&2; exit 255; }}; "
    busy = f"[ $(ls -d {tmp_path}/busy-* | wc -l) -gt 2 ] && touch {tmp_path}/crowd"
    count = f"touch {tmp_path}/busy-$NODE; {busy}; sleep 0.2; rm {tmp_path}/busy-$NODE; "
    denied = "echo Permission denied >&2; exit 255"
    scripted = Scripted(*[count + once + ANSWERS] * 3, f"echo x >> {tmp_path}/denied; {denied}")
    monkeypatch.setattr(asks, "commands", scripted.commands)
    found = told(asks, 4)
    assert [found[node] for node in range(3)] == ["report"] * 3 and found[3] == "refuses the user or the key"
    assert not (tmp_path / "crowd").exists() and (tmp_path / "denied").read_text() == "x\n"


def test_ssh_asks_nothing_at_the_terminal() -> None:
    """A jump host's ssh does not inherit BatchMode: it asks at the terminal of its session, or by a program."""
    words = Scripted(
        "echo $HELLO; echo $(ps -o tty= -p $$) $SSH_ASKPASS_REQUIRE $(ps -o sid= -p $$) $$; cat > /dev/null"
    )
    lines = [line for _, heard in [*Lines(words).run()] for line in heard]
    tty, askpass, session, process = lines[-1].split()
    assert (tty, askpass) == ("?", "never") and session == process


class Lines(Conversation):
    """What a process has printed when the time is over."""

    def __init__(self, asks: Asker) -> None:
        super().__init__(asks, requests_for(1), 0.5)

    def run(self) -> Generator[Heard, None, None]:
        list(super().run())
        yield 0, self.lines[0]


@pytest.mark.parametrize(
    ("script", "found", "remedy"),
    [
        ("echo Welcome; exec /opt/no/python", "'/opt/python' cannot be run there: ", "python=PATH"),
        ("echo Welcome; echo No module named x >&2; exit 1", "with code 1; it said last: No module named x", "install"),
        ("echo Welcome; exit 3", "it ended without one, with code 3; it said last: Welcome", None),
        ("echo $HELLO; exit 3", "it ended without one, with code 3; it said last: nothing", None),
    ],
)
def test_a_greeting_does_not_hide_the_reason(script: str, found: str, remedy: str | None) -> None:
    [(_, fault)] = Scripted(script).run_on_each(requests_for(1), 20.0)
    assert (
        isinstance(fault, CrosstuneError) and found in fault.found and "Welcome" not in fault.found.replace(found, "")
    )
    assert (fault.remedy is None) if remedy is None else remedy in str(fault.remedy)


def test_tasks_of_slurm_are_told_apart_by_their_labels() -> None:
    slurm = asker("launcher=slurm", "nodes=2")
    assert isinstance(slurm, ThroughSlurm) and slurm.whose((0, 1), "1: text") == (1, "text")
    said = "0: bash: line 8: /no/python: No such file\nsrun: error: n0: task 0: Exited with exit code 127"
    assert "cannot be run there: bash: line 8" in slurm.fault(0, Ended(127, [], said, 1)).found
    assert slurm.fault(1, Ended(1, [], "srun: error: Invalid partition", 1)).found.startswith("Slurm: srun: error")


def looks(tmp_path: Path) -> tuple[subprocess.Popen[bytes], Request]:
    """The first node of two, which waits for the second one: its port is taken and its file is there."""
    cfg = compose("doctor_nodes", ["nodes=2", "device=cpu", f"master_port={free_port()}", f"run_dir={tmp_path}"])
    request = replace(requests_of(cfg, ("a", "b"), ("127.0.0.1",) * 2)[0], patience_seconds=60.0)
    process = subprocess.Popen([sys.executable, *COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline().decode().strip() == HELLO
    process.stdin.write(request.to_json().encode() + b"\n")
    process.stdin.flush()
    wait_for(lambda: any(tmp_path.iterdir()) and listens(request.master_port), 20)
    return process, request


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_look_ends_with_whoever_asked_and_leaves_nothing(number: int | None, tmp_path: Path) -> None:
    """The next doctor would find its port taken, for minutes."""
    process, request = looks(tmp_path)
    with process:
        assert process.stdin is not None
        if number is None:
            process.stdin.close()
        else:
            process.send_signal(number)
        assert process.wait(5) == (1 if number is None else 128 + number)
    assert list(tmp_path.iterdir()) == [] and not listens(request.master_port)
