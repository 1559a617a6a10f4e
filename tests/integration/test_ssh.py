"""launcher=ssh on real hosts: runs that succeed, fail, are cut off, abandoned or lose the machine where ranks meet.

The hosts are namespaces with an sshd each (tests/net_lab.py). Nothing is ever left running, on any of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.command import final_weights, write_uneven_records
from tests.net_lab import NetLab, net_lab, wait_for
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
SECRET = "s3cr3t-4f1d"
STEPS, EVERY = 24, 4
ODD = "a b'c\"d$(touch planted)`touch planted`\n;&*é"
"""A name that a shell would act on."""

FAKE_NODE = '''
"""Stands for `launchers.node`: leaves marks and a process that outlives it, as BEHAVE_<node> says."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
from launchers.job import JobFolder, Mark
folder = JobFolder(Path(sys.argv[-1]).parent)
node, attempt = int(os.environ["CROSSTUNE_NODE"]), int(os.environ["CROSSTUNE_ATTEMPT"])
behave = os.environ[f"BEHAVE_{node}"]
name = os.uname().nodename
def mark(code=None, fault=None):
    ended = None if code is None else time.time()
    folder.mark(Mark(node, attempt, name, os.getpid(), began, "same", ended, code, fault))
def leave(code, fault=None):
    mark(code, fault)
    print(f"{name} leaves with {code}", flush=True)
    os._exit(code)
began = time.time()
mark()
daemon = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('daemon', flush=True)"
daemon = [sys.executable, "-c", daemon + "; time.sleep(600)"]
started = subprocess.Popen(daemon, start_new_session=True, stdout=subprocess.PIPE)
started.stdout.readline()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, (lambda *_: leave(75)) if behave == "saves" else signal.SIG_IGN)
(folder.path / f"up-{node}").touch()
print(f"{name} is up", flush=True)
if behave == "done":
    leave(0)
if behave == "fails":
    while not all((folder.path / f"up-{other}").exists() for other in range(2)):
        time.sleep(0.05)
    error = {"kind": "DataError", "where": "rows.jsonl:7", "found": "no text", "allowed": None, "remedy": None}
    leave(3, {"time": time.time(), "rank": 1, "exit_code": 3, "errors": [error]})
while True:
    time.sleep(600)
'''


class Kit:
    """A lab with what runs there.

    Args:
        lab: hosts n0, n1, n2.
        home: model, records, and tools.
    """

    def __init__(self, lab: NetLab, home: Path) -> None:
        self.lab, self.home = lab, home
        tools = home / "tools"
        tools.mkdir()
        (tools / "fake_node.py").write_text(FAKE_NODE)
        (tools / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        fake = f'case "$*" in *launchers.node*) exec {sys.executable} {tools}/fake_node.py "$@";; esac'
        (tools / "fake").write_text(f'#!/bin/sh\n{fake}\nexec {sys.executable} "$@"\n')
        for name in ("python", "fake"):
            (tools / name).chmod(0o755)

    def command(self, *words: str) -> list[str]:
        return self.lab.from_client([sys.executable, "-P", "-m", "launchers.cli", *words])

    def launch(self, run: Path, *words: str, hosts: str = "n0,n1", nodes: int = 2) -> list[str]:
        quoted = str(run).replace("\\", "\\\\").replace("'", "\\'")
        return self.command(
            *("launch", "train", "launcher=ssh", f"launcher.hosts=[{hosts}]", f"launcher.config={self.lab.ssh_config}"),
            *("launcher.heartbeat_seconds=1", "launcher.silence_seconds=6", f"nodes={nodes}", "restarts=0"),
            *("nproc=1", f"+environment.PYTHONPATH={ROOT}", "+environment.OMP_NUM_THREADS='1'", f"run_dir='{quoted}'"),
            *(f"model.path={self.home}/model", f"dataset.path={self.home}/data.jsonl", "dataset.test_fraction=0.2"),
            *("dataset.license=CC0-1.0", f"cache_dir={self.home}/cache", "device=cpu", "model.precision=fp32"),
            *("batch_tokens=256", "max_length=128", "micro_batch_tokens=256", "optim.lr=5e-3", f"max_steps={STEPS}"),
            *(f"checkpoint.every={EVERY}", "guard.grace_seconds=20", *words),
        )

    def fake(self, run: Path, *behave: str, hosts: str = "n0,n1") -> list[str]:
        behaves = [f"+environment.BEHAVE_{node}={each}" for node, each in enumerate(behave)]
        return self.launch(run, f"python={self.home}/tools/fake", *behaves, hosts=hosts, nodes=len(behave))

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=os.environ | {"COLUMNS": "200"} | environment, **streams)

    def run(self, command: list[str], code: int = 0, **environment: str) -> str:
        process = self.start(command, **environment)
        shown, _ = process.communicate(timeout=300)
        assert process.returncode == code, f"exit code {process.returncode}, not {code}:\n{shown}"
        return shown

    def left_on(self, name: str) -> list[str]:
        """What still runs on a host besides its sshd."""
        lines = self.lab.processes(name).values()
        return [f"{name}: {line[:150]}" for line in lines if not line.startswith("sshd: ")]

    def left(self) -> list[str]:
        """What still runs of any job, on any machine."""
        found = [line for name in self.lab.names for line in self.left_on(name)]
        for process in psutil.process_iter(["cmdline"]):
            if str(self.lab.ssh_config) in " ".join(process.info["cmdline"] or []):
                found.append(f"login: {process.info['cmdline'][:4]}")
        return found

    def nothing_is_left(self, seconds: float, *names: str) -> float:
        """How long it took until nothing was left, anywhere or on some hosts."""
        began = time.monotonic()

        def left() -> list[str]:
            return [line for name in names for line in self.left_on(name)] if names else self.left()

        try:
            wait_for(lambda: not left(), seconds)
        except AssertionError:
            raise AssertionError(left()) from None
        return time.monotonic() - began


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Iterator[Kit]:
    home = tmp_path_factory.mktemp("home")
    save_tiny_model(home / "model")
    write_uneven_records(home / "data.jsonl")
    with net_lab(tmp_path_factory.mktemp("lab"), 3) as lab:
        yield Kit(lab, home)


@pytest.fixture(autouse=True)
def _clean(kit) -> Iterator[None]:
    yield
    assert not kit.left()


@pytest.fixture(scope="module")
def undisturbed(kit, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Final weights of a run in peace, in a folder and with values that a shell would act on."""
    place = tmp_path_factory.mktemp("peace") / ODD
    place.mkdir()
    run = place / "run"
    began = time.monotonic()
    words = [*kit.launch(run, "secrets=[CROSSTUNE_TOKEN]"), f'+environment.ODD="{ODD_VALUE}"']
    process = kit.start(words, CROSSTUNE_TOKEN=SECRET)
    wait_for(lambda: (run / "metrics.jsonl").exists() or process.poll() is not None, 240)
    seen = subprocess.run(["ps", "-eww", "-o", "args="], capture_output=True, text=True).stdout
    environments = [ranks_environment(process) for process in psutil.process_iter() if is_rank(process, run)]
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 0, shown
    print(f"success on 2 hosts: {time.monotonic() - began:.1f} s")
    assert len(environments) == 2 and "launchers.cli" in seen, shown
    for environment in environments:
        assert environment["CROSSTUNE_TOKEN"] == SECRET and environment["ODD"] == ODD_VALUE
    assert SECRET not in seen and SECRET not in shown
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 10 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert not list(place.rglob("planted")) and not Path("planted").exists()
    marks = [json.loads(path.read_text()) for path in sorted((run / "launch/attempts/000").glob("node-*.json"))]
    assert [mark["host"] for mark in marks] == ["n0", "n1"] and len({mark["environment"] for mark in marks}) == 1
    assert f"0: train: step {STEPS}/{STEPS}" in shown
    return final_weights(run)


ODD_VALUE = "two words; $(touch planted) `touch planted` 'single' %s"


def is_rank(process: psutil.Process, run: Path) -> bool:
    try:
        return "RANK" in process.environ() and str(run) in " ".join(process.cmdline())
    except psutil.Error:
        return False


def ranks_environment(process: psutil.Process) -> dict[str, str]:
    return process.environ()


def test_two_hosts_train_and_odd_names_arrive_unchanged(undisturbed):
    assert undisturbed


def saved(run: Path, step: int) -> bool:
    return (run / f"checkpoints/step-{step:08}/COMPLETE").exists()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_dead_worker_ends_all_and_the_run_goes_on_from_its_checkpoint(kit, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = kit.start(kit.launch(run, "restarts=1"))
    wait_for(lambda: saved(run, EVERY) or process.poll() is not None, 240)
    began = time.monotonic()
    rank = next(one for one in psutil.process_iter() if is_rank(one, run) and one.environ()["RANK"] == "1")
    rank.kill()
    shown, _ = process.communicate(timeout=300)
    print(f"a worker killed, restart, end: {time.monotonic() - began:.1f} s")
    assert process.returncode == 0, shown
    assert "node 1 (n1): ended with exit code 3: the other machines end, too" in shown, shown
    assert "attempt 0 ended with exit code 3: starting again from step " in shown, shown
    kit.nothing_is_left(5)
    assert same(final_weights(run), undisturbed)


@pytest.mark.slow
def test_a_cut_link_is_found_and_the_run_goes_on_when_it_is_back(kit, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = kit.start(kit.launch(run, "restarts=1"))
    assert process.stdout is not None
    wait_for(lambda: saved(run, EVERY) or process.poll() is not None, 240)
    began = time.monotonic()
    kit.lab.link("n1", up=False)
    shown = ""
    while "n1 cannot be reached: waiting up to" not in shown:
        line = process.stdout.readline()
        assert line, shown
        shown += line
    print(f"a cut link: found and ended on the others after {time.monotonic() - began:.1f} s")
    alone = kit.nothing_is_left(60, "n1")
    print(f"the cut host had ended its part {alone:.1f} s later")
    kit.lab.link("n1", up=True)
    rest, _ = process.communicate(timeout=300)
    print(f"all of it: {time.monotonic() - began:.1f} s")
    assert process.returncode == 0, shown + rest
    assert "node 1 (n1): lost: no sign of it for" in shown, shown
    assert same(final_weights(run), undisturbed)


@pytest.mark.slow
def test_a_killed_client_leaves_nothing_and_resume_goes_on(kit, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = kit.start(kit.launch(run))
    wait_for(lambda: saved(run, EVERY) or process.poll() is not None, 240)
    assert process.poll() is None, process.communicate()
    process.kill()
    print(f"client killed: nothing left after {kit.nothing_is_left(60):.1f} s")
    process.communicate()
    assert "preempted: " in kit.run(kit.command("status", str(run)))
    began = time.monotonic()
    shown = kit.run(kit.command("resume", str(run)))
    print(f"resumed and done in {time.monotonic() - began:.1f} s")
    assert same(final_weights(run), undisturbed), shown


@pytest.mark.slow
def test_the_rendezvous_host_dies_and_a_spare_takes_its_place(kit, undisturbed, tmp_path):
    run = tmp_path / "run"
    process = kit.start(kit.launch(run, "restarts=1", hosts="n0,n1,n2"))
    wait_for(lambda: saved(run, EVERY) or process.poll() is not None, 240)
    began = time.monotonic()
    kit.lab.switch_off("n0")
    try:
        shown, _ = process.communicate(timeout=300)
        print(f"rendezvous host dead, spare, end: {time.monotonic() - began:.1f} s")
        assert process.returncode == 0, shown
        assert "n2 takes its place" in shown and "node 0 (n0): lost: no sign of it for" in shown, shown
    finally:
        kit.lab.switch_on("n0")
    assert same(final_weights(run), undisturbed)


# What needs no training: a stand-in for `launchers.node` that leaves a process behind which ignores SIGTERM.


def up(run: Path, process: subprocess.Popen[str], nodes: int = 2) -> None:
    wait_for(lambda: len(list((run / "launch").glob("up-*"))) == nodes or process.poll() is not None, 60)
    assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_a_failed_machine_ends_all_with_its_fault_though_the_other_ignores_signals(kit, tmp_path):
    run = tmp_path / "run"
    began = time.monotonic()
    shown = kit.run(kit.fake(run, "ignores", "fails"), code=3)
    print(f"a machine failed, one that ignores signals: {time.monotonic() - began:.1f} s")
    assert shown.rstrip().endswith("rows.jsonl:7: no text (rank 1 on n1)"), shown
    assert "node 1 (n1): ended what was left behind: python" in shown and "Traceback" not in shown, shown
    kit.nothing_is_left(1)
    assert "failed: " in kit.run(kit.command("status", str(run)))


@pytest.mark.slow
def test_cancel_from_another_terminal_saves_and_hard_ends_at_once(kit, tmp_path):
    for hard, behave, code, state in ((False, "saves", 75, "cancelled"), (True, "ignores", 137, "cancelled")):
        run = tmp_path / str(hard)
        process = kit.start(kit.fake(run, behave, behave))
        up(run, process)
        began = time.monotonic()
        kit.run(kit.command("cancel", *(["--hard"] if hard else []), str(run)))
        shown, _ = process.communicate(timeout=60)
        print(f"cancel hard={hard}: {time.monotonic() - began:.1f} s")
        assert process.returncode == code, shown
        kit.nothing_is_left(1)
        assert f"{state}: " in kit.run(kit.command("status", str(run)))


@pytest.mark.slow
def test_the_first_ctrl_c_saves_and_the_second_ends_at_once(kit, tmp_path):
    for behave, signals, code in (("saves", 1, 75), ("ignores", 2, 137)):
        run = tmp_path / behave
        process = kit.start(kit.fake(run, behave, behave))
        up(run, process)
        for _ in range(signals):
            process.send_signal(signal.SIGINT)
            time.sleep(1.3)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == code, shown
        kit.nothing_is_left(1)


@pytest.mark.slow
def test_whoever_kills_the_client_leaves_nothing_even_behind_a_jump_host(kit, tmp_path):
    run = tmp_path / "run"
    with kit.lab.ssh_config.open("a") as config:
        config.write(f"Host far\n  HostName {kit.lab.address('n1')}\n  HostKeyAlias n1\n  ProxyJump n2\n")
    process = kit.start(kit.fake(run, "saves", "saves", hosts="n0,far"))
    up(run, process)
    process.kill()
    process.communicate()
    print(f"client killed, stand-in: nothing left after {kit.nothing_is_left(20):.1f} s")
    assert "preempted: " in kit.run(kit.command("status", str(run)))


@pytest.mark.slow
def test_a_killed_agent_is_a_lost_machine(kit, tmp_path):
    process = kit.start(kit.fake(tmp_path / "run", "saves", "ignores"))
    up(tmp_path / "run", process)
    for pid, line in kit.lab.processes("n1").items():
        if "crosstune-agent" in line:
            os.kill(pid, signal.SIGKILL)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 3 and "node 1 (n1): lost: " in shown, shown
    [daemon] = kit.left_on("n1")  # the kernel ends the node with its agent; nobody is left to find who had gone astray
    assert "fake_node.py" not in daemon
    kit.lab.switch_off("n1")
    kit.lab.switch_on("n1")


def test_what_keeps_machines_from_taking_part_is_told_of_all_before_anything_starts(kit, tmp_path):
    lab = kit.lab
    with lab.ssh_config.open("a") as config:
        config.write(f"Host unknown\n  HostName {lab.address('n0')}\nHost away\n  HostName 10.77.0.99\n")
        config.write(f"Host behind\n  HostName {lab.address('n1')}\n  HostKeyAlias n1\n  ProxyJump unknown\n")
        config.write(f"Host twin\n  HostName {lab.address('n0')}\n  HostKeyAlias n0\n")
        config.write(f"Host stranger\n  HostName {lab.address('n2')}\n  HostKeyAlias n2\n")
    (lab.folder / "other").write_text('"""Another crosstune."""\n')
    bound = str(ROOT / "launchers/__init__.py")
    lab.run_on("n1", "mount", "--bind", str(lab.folder / "other"), bound)
    lab.run_on("n2", "mount", "-t", "tmpfs", "none", str(kit.home / "tools"))
    try:
        hosts = "n0,n1,n2,twin,unknown,behind,nobody-here@stranger,away,nx"
        python = f"python={kit.home}/tools/python"
        shown = kit.run(kit.launch(tmp_path / "run", python, hosts=hosts, nodes=9), code=2)
    finally:
        lab.run_on("n1", "umount", bound)
        lab.run_on("n2", "umount", str(kit.home / "tools"))
    for said in (
        f"n2: python: no '{kit.home}/tools/python'\n",
        "the same machine as node ",  # n0 or twin, whichever came first
        f"unknown: the host key of {lab.address('n0')} is not known here\n  remedy:  ssh unknown once, or Strict",
        f"behind: the host key of {lab.address('n0')} is not known here\n",  # of its jump host
        "nobody-here@stranger: refuses the user or the key\n  remedy:  launcher.user=NAME",
        "away: cannot be reached: connect to host 10.77.0.99 port 22: No route to host\n",
        "nx: no machine of this name is known here\n",
    ):
        assert said in shown, f"{said}\n{shown}"
    # Installed, it has a version; run from its sources alone, none.
    other = r"^n1: crosstune \S.* \(sources \w+\), but here .*\n  remedy:  install the same"
    assert re.search(other, shown, re.MULTILINE), shown
    assert not list(tmp_path.rglob("attempts")) and not list(tmp_path.rglob(".seen-*"))


@pytest.mark.slow
def test_hosts_without_a_shared_folder_get_the_job_and_give_back_marks_and_logs(kit, tmp_path):
    run = tmp_path / "run"
    for name in ("n0", "n1"):
        kit.lab.run_on(name, "mount", "-t", "tmpfs", "none", str(tmp_path))
    try:
        shown = kit.run(kit.fake(run, "done", "done"))
        there = kit.lab.run_on("n1", "ls", "-A", str(run / "launch")).stdout.split()
    finally:
        for name in ("n0", "n1"):
            kit.lab.run_on(name, "umount", str(tmp_path))
    assert there == ["attempts", "job.json", "request.yaml", "up-1"], there
    assert f"n0, n1: {run} is on a disk of the machine's own" in shown, shown
    marks = [json.loads(path.read_text()) for path in sorted((run / "launch/attempts/000").iterdir())]
    assert [(mark["host"], mark["exit_code"]) for mark in marks] == [("n0", 0), ("n1", 0)]
    assert "succeeded: " in kit.run(kit.command("status", str(run)))
    assert kit.run(kit.command("logs", "--node", "1", str(run))) == "n1 is up\nn1 leaves with 0\n"
