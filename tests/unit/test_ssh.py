"""launcher=ssh without ssh: hostfiles, command lines, ssh's complaints, and the agent on this machine."""

from __future__ import annotations

import ast
import errno
import inspect
import json
import os
import queue
import re
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.compose import build, compose
from configs.errors import ConfigError
from configs.schema.launcher_ssh import SshLauncherConfig
from launchers import agent
from launchers.base import Launcher, with_setup
from launchers.job import Job, JobFolder, Mark, root_cause
from launchers.spec import LaunchSpec
from launchers.ssh import probe
from launchers.ssh.attempt import Attempt, worst
from launchers.ssh.beats import Beats
from launchers.ssh.connection import (
    Connection,
    Unreachable,
    agent_command,
    ssh_command,
    ssh_fault,
)
from launchers.ssh.gather import Gathering, in_one
from launchers.ssh.hosts import host_faults, idle_devices, parse_hostfile, to_hostfile
from launchers.ssh.session import Session
from launchers.supervise import StopSignals
from launchers.terminal import ROOM, Terminal, lines_missing

HOSTFILE = """# the new rack
n1 slots=8
n2   slots = 4   # two cards are broken

root@n3
N1 slots=8
n4 slot=8
-oProxyCommand=touch slots=8
"""
SPEC = LaunchSpec(
    name="job", command="train", request="/r/launch/request.yaml", run_dir="/r", working_dir="/", nodes=2, nproc=8,
    threads=0, environment={}, secrets=(), setup=(), python=None, interface=None, master_port=29500, cpus=0,
    memory_gib=0, devices=0, time_limit_minutes=0, restarts=0, grace_seconds=5,
)  # fmt: skip


def test_a_hostfile_is_read_as_deepspeed_does_and_faults_name_the_line():
    hosts, faults = parse_hostfile(HOSTFILE, "rack")
    assert [(host.name, host.slots) for host in hosts] == [("n1", 8), ("n2", 4), ("root@n3", None), ("N1", 8)]
    assert [fault.where for fault in faults] == ["rack:7", "rack:8"]
    told = [fault.render() for fault in host_faults(hosts, SPEC)]
    assert told[0].startswith("rack:3: n2 slots=4, but nproc=8") and "nproc=4" in told[0]
    assert told[1].startswith("rack:6: N1, as in rack:2") and len(told) == 2
    [few] = host_faults(hosts[:1], SPEC)
    assert not host_faults(hosts[:1], SPEC, unread=1), "who knows what the other line names"
    assert few.render() == "launcher.hosts: 1 machine named, but nodes=2"
    again, faults = parse_hostfile(to_hostfile(hosts[:3], 2), "hosts")
    assert not faults and [(host.name, host.slots) for host in again] == [(host.name, host.slots) for host in hosts[:3]]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("n1:2222", "launcher.port=N"),
        ("root@n1:22", "launcher.port=N"),
        ("[::1]:22", "launcher.port=N"),
        ("[::1]", "without brackets"),
        ("slots=8", "the name first"),
        ("n[1-3]", "no ranges"),
        ("n[1,3]", "no ranges"),
    ],
)
def test_what_is_no_name_of_a_machine_is_refused_with_what_was_meant(name, remedy):
    hosts, [fault] = parse_hostfile(f"n0\n{name}\n", "rack")
    assert len(hosts) == 1 and fault.where == "rack:2" and remedy in str(fault.remedy)
    if "," not in name:
        with pytest.raises(ConfigError, match="launcher.hosts: "):
            SshLauncherConfig(hosts=[name])
    assert SshLauncherConfig(hosts=["::1", "root@fe80::1", "10.0.0.1"])


def test_devices_that_stay_idle_are_told():
    hosts, _ = parse_hostfile("n1 slots=8\nn2 slots=8\nn3 slots=4\nn4", "rack")
    assert idle_devices(hosts[:2], 1) == "slots=8 per machine, nproc=1: 7 devices stay idle; nproc=8 uses them"
    assert "slots=4 to 8" in idle_devices(hosts[:3], 3) and "1 device or more stay idle" in idle_devices(hosts[:3], 3)
    assert not idle_devices(hosts[:2], 8) and not idle_devices(hosts[:3], 4) and not idle_devices(hosts, 1)


def test_a_launch_tells_of_idle_devices_and_may_open_many_files(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise ConfigError("here", str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))

    told: list[str] = []
    monkeypatch.setattr("launchers.ssh.launcher.Session", refuse)
    monkeypatch.setattr("launchers.ssh.launcher.SshLauncher.note", told.append)
    job, folder = Job(replace(SPEC, nproc=1), 1.0), JobFolder(tmp_path)
    (tmp_path / "hosts").write_text("n1 slots=8\nn2 slots=8\n")
    cfg = compose("launch", ["launcher=ssh", "nodes=2", "launcher.hosts=[n1,n2]"])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with pytest.raises(ConfigError) as fault:
            build(cfg.launcher, Launcher, cfg.cluster).submit(job, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert int(fault.value.found) > 256
    assert told == ["slots=8 per machine, nproc=1: 7 devices stay idle; nproc=8 uses them"]


def test_the_launcher_renders_its_machines_and_tells_what_is_wrong_before_anything_is_written(tmp_path, monkeypatch):
    file = tmp_path / "hosts of\nmine"
    file.write_text("\ufeffn1 slots=8\nn2 slots=8\nn3 slots=8\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    cfg = compose("launch", ["launcher=ssh", "nodes=2", f"launcher.hostfile='{file.name}'"])
    assert cfg.launcher.hostfile == str(file), "a job is resumed from any folder"
    launcher = build(cfg.launcher, Launcher, cfg.cluster)
    assert not list(launcher.faults(SPEC))
    assert launcher.render(SPEC, 0) == {"hosts": "n1 slots=8  # node 0\nn2 slots=8  # node 1\nn3 slots=8  # spare\n"}
    file.write_text("n1 slots=8\nn1 slots=8\nn2:22\n")
    assert [fault.where.rpartition(":")[2] for fault in launcher.faults(SPEC)] == ["3", "2"], "all at once"
    file.unlink()
    assert "cannot be read: No such file" in next(iter(launcher.faults(SPEC))).render()
    for words, key in (
        (["launcher.hosts=[n1]", "launcher.hostfile=x"], "launcher.hostfile"),
        (["launcher.hosts=['-oProxyCommand=x']"], "launcher.hosts"),
        (["launcher.hosts=['n1 n2']"], "launcher.hosts"),
        (["launcher.options=['no equals sign']", "launcher.user='-x'"], "launcher.user"),
        (["launcher.silence_seconds=10"], "launcher.silence_seconds"),
    ):
        with pytest.raises(ConfigError) as fault:
            compose("launch", ["launcher=ssh", *words])
        assert fault.value.where == key


def test_ssh_asks_nothing_and_the_users_options_come_before_ours():
    cfg = SshLauncherConfig(
        user="me", port=2222, config="/c d", options=["ConnectTimeout=3", "IdentityFile=~/.ssh/x y"]
    )
    command = ssh_command(cfg, "n1", "true")
    assert command[:10] == ["ssh", "-T", "-a", "-x", "-F", "/c d", "-p", "2222", "-l", "me"]
    options = [command[place + 1] for place, word in enumerate(command) if word == "-o"]
    assert options[:3] == ["BatchMode=yes", "ConnectTimeout=3", "IdentityFile=~/.ssh/x y"]
    assert command[-3:] == ["--", "n1", "true"] and "ControlPath=none" in options


@pytest.mark.parametrize(
    ("code", "complaints", "found"),
    [
        (
            255,
            "No ED25519 host key is known for jump and you\nHost key verification failed.",
            "host key of jump is not known",
        ),
        (255, "Host key verification failed.", "its host key, or that of a jump host before it, is not known here"),
        (
            255,
            "Host key for [n1]:22 has changed and you\nHost key verification failed.",
            "host key of [n1]:22 is not the",
        ),
        (255, "me@n1: Permission denied (publickey).", "refuses the user or the key"),
        (255, "ssh: Could not resolve hostname n1: Name or service not known", "no machine of this name is known here"),
        (255, "/c: line 3: Bad configuration option: hots", "/c: line 3: Bad configuration option: hots"),
        (
            255,
            "ssh: connect to host n1 port 22: Connection timed out",
            "cannot be reached: connect to host n1 port 22: ",
        ),
        (127, "", "has no Python"),
        (1, "line 16\nSyntaxError: future feature annotations is not defined", "its python3 is older than 3.8"),
        (1, "ModuleNotFoundError: No module named '_ctypes'", "older than 3.8, or not whole: Module"),
        (1, "This account is currently not available.", "ended with code 1 before it could begin: This account is"),
    ],
)
def test_what_ssh_says_becomes_a_fault_with_the_machine(code, complaints, found):
    fault = ssh_fault("n1", code, complaints)
    assert fault.where == "n1" and found in fault.found
    assert isinstance(fault, Unreachable) == ("timed out" in complaints), "waited for after a restart"


def test_the_same_fault_of_many_machines_is_told_once():
    fault = in_one({node: [ConfigError(f"n{node}", "is down")] for node in range(200)})
    assert fault.render() == "n0, n1, n2 and 197 more: is down"


def test_the_worst_exit_code_decides():
    assert [worst(codes) for codes in ([0, 0], [0, 75], [75, 143], [143, 3], [3, 2])] == [0, 75, 143, 3, 2]


def test_a_terminal_that_takes_nothing_holds_up_nobody():
    held, shown = queue.Queue[None](), list[str]()

    def say(line: str) -> None:
        held.get()
        shown.append(line)

    with Terminal(say, lines_missing) as terminal:
        began = time.monotonic()
        for number in range(ROOM + 100):
            terminal.show(str(number))
        assert time.monotonic() - began < 5
        for _ in range(ROOM + 200):
            held.put(None)
        while len(shown) < ROOM:
            time.sleep(0.01)
        terminal.show("last")
    assert shown[0] == "0" and shown[-2].endswith(" lines left out here ...") and shown[-1] == "last"


def test_a_job_goes_on_when_nobody_reads_its_output_or_a_character_cannot_be_shown():
    script = (
        "import sys, time; from launchers.terminal import say\n"
        "say('caf\u00e9'); sys.stdin.readline(); say('lost'); say('lost, too'); sys.exit(7)"
    )
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, **streams)
    assert process.stdout.readline() == b"caf\\xe9\n"
    process.stdout.close()
    process.stdin.write(b"\n")
    process.stdin.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 7, said
    assert said == "crosstune: nobody takes this command's output any more (Broken pipe); the job goes on\n"


class Recorder:
    """A connection that only notes what is sent."""

    def __init__(self, node: int) -> None:
        self.node, self.host = node, f"n{node}"
        self.sent: list[str] = []
        self.signals: list[object] = []
        self.closed = False

    def send(self, kind: str, **content: object) -> None:
        self.sent.append(kind)
        self.signals += [content["signal"]] if "signal" in content else []

    def close(self) -> None:
        self.closed = True

    def complaints(self) -> str:
        return "Timeout, server n1 not responding."


def attempt_of(
    folder: Path, events: list[tuple[int, dict[str, Any]]], *, shared: bool = True, silence: float = 60
) -> Any:
    """An attempt of two machines that has heard all events; the connections and what was shown."""
    inbox, shown, connections = queue.Queue[Any](), list[str](), [Recorder(0), Recorder(1)]
    for node, frame in events:
        inbox.put((connections[node], frame))
    (folder / "launch").mkdir(exist_ok=True)
    answers = dict.fromkeys(range(2), {"shared": shared})
    times = {"silence_seconds": silence, "grace_seconds": 60}
    job = JobFolder(folder / "launch")
    attempt = Attempt(0, job, connections, answers, inbox, StopSignals(), **times, show=shown.append)
    return attempt, connections, shown, inbox


def mark_of(node: int, environment: str, **more: Any) -> dict[str, Any]:
    return {"kind": "mark", "mark": {**vars(Mark(node, 0, f"n{node}", 7, 1.0, environment)), **more}}


ENDED = {"kind": "ended", "why": "", "left": [], "step": 4}


def test_environments_that_differ_are_said_and_marks_of_the_begin_do_not_overwrite_those_of_the_end(tmp_path):
    begins = [(0, mark_of(0, "aaa")), (1, mark_of(1, "bbb"))]
    for shared, ends in ((True, []), (False, [None, None])):
        attempt, connections, shown, _ = attempt_of(
            tmp_path, [*begins, (0, ENDED | {"code": 0}), (1, ENDED | {"code": 0})], shared=shared
        )
        assert attempt.run(lambda node: {}) == 0 and attempt.step == 4
        [differ] = shown
        assert differ.startswith("the machines' environments differ (n0 aaa, n1 bbb): ") and "ssh HOST env" in differ
        assert [mark.ended for mark in JobFolder(tmp_path / "launch").marks()] == ends
        assert all(connection.sent == ["start"] and connection.closed for connection in connections)


def test_a_failure_hastens_the_end_that_a_save_had_planned_and_a_lost_machine_has_a_mark(tmp_path, monkeypatch):
    monkeypatch.setattr("launchers.ssh.attempt.SETTLE_SECONDS", 0.2)
    monkeypatch.setattr("launchers.ssh.attempt.STEP_SECONDS", 0.3)
    line = {"kind": "line", "text": "half a word"}
    attempt, connections, shown, inbox = attempt_of(tmp_path, [(1, line), (1, {"kind": "closed", "code": 255})])
    attempt._begin = time.monotonic() + 60  # as after a machine that saved
    stopper = threading.Timer(1.5, lambda: inbox.put((connections[0], ENDED | {"code": 137})))
    stopper.start()
    assert attempt.run(lambda node: {}) == 3
    assert connections[0].sent == ["start", "stop", "stop", "kill"]
    assert "node 1 (n1): lost: Timeout, server n1 not responding." in shown and "1: half a word" in shown
    marks = JobFolder(tmp_path / "launch").marks()
    assert [mark.exit_code for mark in marks] == [137, 3]
    mark, fault = root_cause(marks)
    assert mark.node == 1 and fault.render().startswith("n1: Timeout, server n1 not responding.")


def test_nobody_is_lost_while_this_command_is_held_up_itself(tmp_path):
    """As by Ctrl-Z: what the machines said meanwhile is read only afterwards, and it is that they saved and ended."""
    attempt, connections, shown, inbox = attempt_of(tmp_path, [], silence=1)

    def speak() -> None:
        time.sleep(0.3)
        for connection in connections:
            inbox.put((connection, ENDED | {"code": 75}))

    def look_around(now: float) -> None:
        if not held:
            time.sleep(1.5)
            held.append(threading.Thread(target=speak))
            held[0].start()
        usual(now)

    held, usual = list[threading.Thread](), attempt._look_around
    attempt._look_around = look_around
    assert attempt.run(lambda node: {}) == 75, shown


def test_the_mark_that_a_machine_left_at_its_end_stands_though_its_connection_was_lost(tmp_path):
    mark = Mark(1, 0, "n1", 7, 1.0, "aaa", ended=2.0, exit_code=75)
    ends = [(0, ENDED | {"code": 75}), (1, {"kind": "closed", "code": 255})]
    attempt, *_ = attempt_of(tmp_path, ends)
    JobFolder(tmp_path / "launch").mark(mark)
    assert attempt.run(lambda node: {}) == 75
    assert mark in JobFolder(tmp_path / "launch").marks()


def test_a_stop_heard_before_the_machines_were_started_reaches_them(tmp_path):
    attempt, connections, _, inbox = attempt_of(tmp_path, [])
    attempt._stops.heard.append(signal.SIGINT)
    ends = [(connection, ENDED | {"code": 143}) for connection in connections]
    threading.Timer(0.5, lambda: [inbox.put(end) for end in ends]).start()
    assert attempt.run(lambda node: {}) == 130, "ended by Ctrl-C"
    for connection in connections:
        assert connection.sent == ["start", "stop"] and connection.signals == [signal.SIGTERM]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize(
    ("complaint", "tries"),
    [
        ("kex_exchange_identification: Connection closed by remote host", 4),
        ("me@jump: Permission denied (publickey).\nConnection closed by UNKNOWN port 65535", 1),
    ],
)
def test_a_machine_that_is_refused_again_and_again_leaves_no_files_open(monkeypatch, complaint, tries):
    monkeypatch.setattr("launchers.ssh.gather.PAUSE_SECONDS", 0.0)
    inbox, opened, before = queue.Queue[Any](), list[Connection](), open_files()

    def connect(node: int, host: str) -> Connection:
        command = ["sh", "-c", f"echo '{complaint}' >&2; echo $SSH_ASKPASS_REQUIRE >&2; exit 255"]
        opened.append(Connection(node, host, command, inbox))
        beats.connections.add(opened[-1])
        return opened[-1]

    with Beats(0.05) as beats:
        cfg, refuse = SshLauncherConfig(), pytest.fail
        gathered = Gathering({0: "n0"}, connect, refuse, inbox, StopSignals(), cfg, refuse).run()
        assert len(opened) == tries and [each.closed for each in opened] == [True] * (tries - 1) + [False]
        assert opened[-1].complaints().endswith("never"), "no window asks for a passphrase"
        while len(beats.connections) > 1:
            time.sleep(0.01)
    assert opened[-1].closed and gathered.faults[0][0].where == "n0"
    opened[-1].send("beat")
    give_up = time.monotonic() + 10
    while open_files() > before:  # the thread that reads closes what it reads from
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_too_many_open_files_is_a_fault_with_a_remedy(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("launchers.ssh.session.Connection", full)
    folder, inbox = JobFolder(tmp_path), queue.Queue[Any]()
    session = Session(SshLauncherConfig(), Job(SPEC, 1.0), folder, 0, StopSignals(), inbox, Beats(1), print)
    with pytest.raises(ConfigError, match="no ssh to n1: Too many open files\n.*ulimit -Hn"):
        session.assemble({0: "n1", 1: "n2"}, [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_here_is_said_once_and_ends_no_job(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    lines = [(0, {"kind": "line", "text": text}) for text in "ab"]
    ends = [(node, ENDED | {"code": 0}) for node in range(2)]
    attempt, _, shown, _ = attempt_of(tmp_path, [*lines, *ends], shared=False)
    assert attempt.run(lambda node: {}) == 0
    assert len(shown) == 3 and "takes no more marks and logs here: " in shown[1]


def test_the_agent_is_for_old_pythons_too():
    """Of a host on which nothing is installed. Annotations are not evaluated; all else must be known to 3.8."""
    source = inspect.getsource(agent)
    ast.parse(source, feature_version=(3, 8))
    with pytest.raises(SyntaxError):  # by which `ssh_fault` knows what to advise
        ast.parse(source, feature_version=(3, 7))
    assert "from __future__ import annotations" in source
    modules = {node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    modules |= {
        name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names
    }
    assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names


# The agent itself, started as a login shell would start it.


def checks(folder: Path) -> dict[str, Any]:
    """What an agent is to look at."""
    python = {"python": sys.executable, "probe": [sys.executable, "-"], "program": inspect.getsource(probe)}
    times = {"grace": 1, "heartbeat": 1, "silence": 30}
    place = {"launch": "1", "node": 0, "master": "127.0.0.1", "setup": [], "working_dir": str(folder)}
    paths = {"run_dir": str(folder), "token": str(folder / "token"), "mark": str(folder / "mark.json")}
    return {**python, **times, **place, **paths, "environment": {}}


def start_of(command: list[str]) -> dict[str, Any]:
    """What an agent is to start."""
    return {"command": command, "environment": {}, "files": {}}


class Far:
    """An agent as a process of this machine."""

    def __init__(self, folder: Path, command: list[str], **check: Any) -> None:
        self.folder, self.command = folder, command
        self.inbox: queue.Queue[Any] = queue.Queue()
        remote = "printf 'Welcome> '; " + agent_command([sys.executable])  # as some ~/.bashrc
        self.connection = Connection(0, "here", ["sh", "-c", remote], self.inbox)
        self.check = {**checks(folder), **check}

    def until(self, *kinds: str, seconds: float = 30) -> dict[str, Any]:
        """The next frame of one of the kinds."""
        give_up = time.monotonic() + seconds
        while True:
            _, frame = self.inbox.get(timeout=max(0.01, give_up - time.monotonic()))
            if frame["kind"] in kinds:
                return dict(frame)

    def start(self, **more: Any) -> None:
        """Brings it to run the command."""
        self.until("hello")
        self.connection.send("check", **self.check)
        assert self.until("ready", "fault")["kind"] == "ready"
        self.connection.send("start", **{**start_of(self.command), **more})


@pytest.fixture
def far(tmp_path) -> Iterator[Any]:
    agents: list[Far] = []

    def make(script: str, **check: Any) -> Far:
        agents.append(Far(tmp_path, [sys.executable, "-c", script], **check))
        return agents[-1]

    yield make
    for each in agents:
        each.connection.close()


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:  # a daemon: its parent is gone, its session is its own
    os.setsid()
    if os.fork() == 0:
        open("daemon", "w").write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
print("up", flush=True)
time.sleep(600)
"""


def daemon_of(folder: Path) -> psutil.Process:
    while not (folder / "daemon").exists() or not (folder / "daemon").read_text():
        time.sleep(0.02)
    return psutil.Process(int((folder / "daemon").read_text()))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch) -> None:
    """The agent with shorter times."""
    source = inspect.getsource(agent)
    for name in ("MARGIN_SECONDS", "END_SECONDS", "ANSWER_SECONDS"):
        source, times = re.subn(rf"^{name} = \d+$", f"{name} = 1", source, flags=re.M)
        assert times == 1
    monkeypatch.setattr("launchers.ssh.connection.agent_source", lambda: source)


def gone(process: psutil.Process, seconds: float) -> bool:
    psutil.wait_procs([process], timeout=seconds)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("how", ["the connection ends", "silence", "killed by word"])
def test_whatever_ends_the_part_nothing_is_left_even_of_daemons_that_ignore_signals(far, tmp_path, how):
    one = far(STUBBORN, silence=2 if how == "silence" else 300)
    one.start()
    assert one.until("line")["text"] == "up"
    daemon = daemon_of(tmp_path)
    assert daemon.parent().pid == one.connection.process.pid, "the agent inherits those whose parent is gone"
    if how == "killed by word":
        one.connection.send("kill")
        ended = one.until("ended")
        assert ended["code"] == 128 + signal.SIGKILL and ended["why"] == "asked"
    elif how == "the connection ends":
        one.connection.process.stdin.close()
    assert gone(daemon, 20)
    assert one.connection.process.wait(timeout=10) == 0


def test_a_killed_agent_takes_its_part_with_it(far):
    one = far("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    one.start()
    child = psutil.Process(int(one.until("line")["text"]))
    one.connection.close()
    assert gone(child, 10)


def test_the_first_stop_is_the_signal_itself_and_what_is_left_behind_is_told(far, tmp_path):
    saves = "import os, signal\nsignal.signal(signal.SIGUSR1, lambda *_: (print('saved', flush=True), os._exit(75)))\n"
    one = far(saves + STUBBORN)
    one.start()
    assert one.until("line")["text"] == "up"
    daemon = daemon_of(tmp_path)
    one.connection.send("stop", signal=signal.SIGUSR1)
    assert one.until("line")["text"] == "saved"
    ended = one.until("ended")
    assert ended["code"] == 75 and len(ended["left"]) == 1 and gone(daemon, 1)


def test_odd_values_arrive_unchanged_behind_setup_scripts_and_are_written_nowhere(far, tmp_path):
    odd = "two words 'single' \"double\" $(touch planted) `touch planted`\nsecond line é"
    script = tmp_path / "set env $(touch planted).sh"
    script.write_text('FROM_SETUP="$ODD"; export FROM_SETUP; printf "env ok "\n')
    shows = "import json, os; print(json.dumps([os.environ[n] for n in ('ODD', 'FROM_SETUP', 'TOKEN')]))"
    name = str(tmp_path / "job of\nmine $(touch planted).json")
    one = far(shows, environment={"ODD": odd, "TOKEN": "hidden"}, setup=[str(script)])
    one.command = with_setup(one.command, [str(script)])
    one.start(files={name: odd})
    assert one.until("line")["text"] == "env ok " + json.dumps([odd, odd, "hidden"])
    assert one.until("ended")["code"] == 0 and Path(name).read_text() == odd
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([script.name, Path(name).name])
    assert "hidden" not in shlex.join(one.connection.process.args)


def test_a_file_that_a_shared_folder_has_is_not_written_again(far, tmp_path):
    (tmp_path / "job.json").write_text("same")
    before = (tmp_path / "job.json").stat().st_ino
    one = far("pass")
    one.start(files={str(tmp_path / "job.json"): "same"})
    one.until("ended")
    assert (tmp_path / "job.json").stat().st_ino == before


def test_a_newer_agent_ends_one_that_is_cut_off_and_refuses_its_own_twin(far, tmp_path):
    one = far(STUBBORN, grace=60)  # to save, which it no longer can
    one.start()
    one.until("line")
    daemon = daemon_of(tmp_path)
    twin = far("pass")
    twin.until("hello")
    twin.connection.send("check", **twin.check)
    assert twin.until("ready", "fault")["faults"] == [
        ["launcher.hosts", "the same machine as node 0", "name each machine once"]
    ]
    newer = far("print('newer')", launch="2")
    newer.start()
    assert newer.until("line")["text"] == "newer" and gone(daemon, 1)
    assert one.until("ended")["why"] == "replaced"


SAVES = """
import os, signal, time
def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(2)
    os._exit(75)
signal.signal(signal.SIGTERM, save)
print("up", flush=True)
while True: time.sleep(1)
"""


def test_a_newer_agent_lets_one_that_is_ending_already_save(far):
    one = far(SAVES, grace=60)
    one.start()
    one.until("line")
    one.connection.send("stop", signal=signal.SIGTERM)  # as upon Ctrl-C
    newer = far("print('newer')", launch="2")
    newer.start()
    assert one.until("ended")["code"] == 75 and newer.until("line")["text"] == "newer"


def test_an_earlier_agent_that_does_not_answer_is_named(far):
    one = far("import time; time.sleep(600)")
    one.start()
    stopped = one.connection.process.pid
    os.kill(stopped, signal.SIGSTOP)
    newer = far("pass", launch="2")
    newer.until("hello")
    newer.connection.send("check", **newer.check)
    [[where, found, remedy]] = newer.until("fault", "ready")["faults"]
    assert (where, remedy) == ("agent", f"kill -9 {stopped} there")
    assert found.startswith(f"process {stopped} on ") and found.endswith("does not answer (state T)")


def test_a_frame_is_found_behind_what_a_shell_left_without_a_newline():
    frame = {"kind": "line", "text": "a \x1e b"}
    assert agent.parse(b"Welcome> " + agent.RS + json.dumps(frame).encode() + b"\n") == frame
    for noise in (b"\n", b"Welcome\n", agent.RS + b"{half", agent.RS + b"[1]", b"\xff" + agent.RS):
        assert agent.parse(noise) is None


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, "no '/no/python'"),
        ({"setup": ["/x.sh"], "probe": ["true"]}, "no file '/x.sh'"),
        ({"setup": ["/etc/passwd"], "probe": ["/no/bash", "-c"]}, "no '/no/bash', which reads it"),
    ],
)
def test_what_is_wrong_with_a_machine_is_told_all_at_once(far, tmp_path, more, told):
    (tmp_path / "file").touch()
    wrong = {"token": str(tmp_path / "file/token"), "master": "no.such.host.invalid", "python": "/no/python"}
    one = far("pass", **{**wrong, "probe": ["/no/python", "-"], **more})
    one.until("hello")
    one.connection.send("check", **one.check)
    found = [found for _, found, _ in one.until("fault", "ready")["faults"]]
    assert found[0] == f"cannot write '{tmp_path}/file': Not a directory" or "File exists" in found[0]
    assert "'no.such.host.invalid' of machine 0 is not known" in found[1] and found[2] == told


def test_output_that_nobody_takes_does_not_hold_up_the_run(tmp_path):
    """As on a connection that stalls: the agent's standard output is not read until the run is over."""
    script = "import sys\nfor n in range(60_000): print(f'{n:0100}')\nopen('done', 'w').close()"
    start = {"kind": "start", **start_of([sys.executable, "-c", script])}
    command = ["sh", "-c", agent_command([sys.executable])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(inspect.getsource(agent)).encode() + b"\n")
        for frame in ({"kind": "check", **checks(tmp_path)}, start):
            process.stdin.write(agent.RS + json.dumps(frame).encode() + b"\n")
            process.stdin.flush()
        give_up = time.monotonic() + 30
        while not (tmp_path / "done").exists():
            assert time.monotonic() < give_up
            time.sleep(0.05)
        frames = [frame for frame in map(agent.parse, process.stdout) if frame]
    texts = [frame["text"] for frame in frames if frame["kind"] == "line"]
    assert frames[-1]["kind"] == "ended" and frames[-1]["code"] == 0
    assert int(texts[0]) == 0 and len(texts) < 60_000, "the first came, later ones were left out"


def sources_under(path):
    """The hash that the program of the probe, sent to a Python of its own, gives of a checkout."""
    program, environment = inspect.getsource(probe).encode(), os.environ | {"PYTHONPATH": str(path)}
    # -S: the crosstune that is installed here would lend what is missing.
    done = subprocess.run([sys.executable, "-S", "-"], input=program, env=environment, cwd="/", capture_output=True)
    [answer] = [answer for answer in map(agent.parse, done.stdout.splitlines()) if answer]
    return answer["sources"]


def test_the_hash_of_the_sources_tells_two_checkouts_apart(tmp_path):
    assert sources_under(Path(__file__).parents[2]) == probe.installed()["sources"] != ""
    for package in probe.PACKAGES:
        (tmp_path / package / "templates").mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    seen = [sources_under(tmp_path)]
    (tmp_path / "train/a.pyc").touch()
    assert sources_under(tmp_path) == seen[0], "what Python leaves beside them is no source"
    for file in ("train/a.py", "configs/a.yaml", "launchers/templates/a.jinja"):
        (tmp_path / file).touch()
        seen.append(sources_under(tmp_path))
    (tmp_path / "train/a.py").write_text("1")
    seen.append(sources_under(tmp_path))
    assert len(set(seen)) == len(seen) == 5
    (tmp_path / "train/__init__.py").unlink()
    (tmp_path / "train").rename(tmp_path / "trains")
    assert sources_under(tmp_path) == "", "a part of it is not crosstune"
