"""The agent of launcher=ssh: runs a machine's part of a job, and leaves nothing behind once it is over.

ssh starts it as ``python -c BOOTSTRAP``, which reads this very file from standard input: nothing needs to be installed
for it, and all of it is in one file. So it takes the standard library only, any Python from 3.8 on, and Linux. It runs
`launchers.node`, whose Python and crosstune may be others than its own.

Both ways goes one JSON object a line, behind the character RS that tells it from what a login shell may say (RFC 7464;
no string in JSON has it unescaped):

    to the agent     check, start, beat, stop, kill
    from the agent   hello, note, fault, ready, line, mark, beat, ended

The agent ends its part by itself when standard input ends or nothing has come for too long: first a signal, upon which
the run saves, then SIGKILL for all that descends from it: as a subreaper it inherits whoever loses his parent.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

RS = b"\x1e"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
"""Of Linux's prctl."""
LOOK_SECONDS = 0.2
REPEAT_SECONDS = 1.2
"""`launchers.node` takes a second signal sooner than this for the same wish."""
MARGIN_SECONDS = 15
"""Beyond the time to save, in which `launchers.node` ends its workers itself and says so."""
END_SECONDS = 10
"""From the second signal, or from the end of `launchers.node`, to SIGKILL for what is left."""
GIVE_UP_SECONDS = 30
"""From SIGKILL until a process counts as one that cannot be killed: it sits in a driver or a dead file system."""
PROBE_SECONDS = 120
ANSWER_SECONDS = 5
"""For another agent, which answers at once unless it is just looking (`Agent.check`)."""
BACKLOG_BYTES = 1 << 20
"""Of output that the other end has not taken. More is left out here; it is in the machine's output.log."""


class Fault(Exception):
    """What keeps this machine from taking part: place, finding, remedy."""


def parse(line: bytes) -> dict[str, Any] | None:
    """The frame in a line; None: there is none. What a shell said last, without a newline, may stand before it."""
    _, begun, text = line.rpartition(RS)
    try:
        frame = json.loads(text) if begun else None
    except ValueError:
        return None
    return frame if isinstance(frame, dict) else None


class Wire:
    """Frames on standard input and output, none of which ever blocks."""

    def __init__(self, source: int = 0, sink: int = 1) -> None:
        self.source, self.sink = source, sink
        self.ended = False
        """Nothing more will come."""
        self.heard = time.monotonic()
        self._in, self._out, self._left_out = b"", bytearray(), 0
        for number in (source, sink):
            os.set_blocking(number, False)

    def send(self, kind: str, **content: object) -> None:
        """A frame that must arrive."""
        self._out += b"\n" + RS + json.dumps({"kind": kind, **content}).encode() + b"\n"
        self.flush()

    def send_line(self, text: str) -> None:
        """A line of output, unless the other end takes none: the run never waits for a terminal."""
        if len(self._out) > BACKLOG_BYTES:
            self._left_out += 1
            return
        if self._left_out:
            self.send("line", text=f"... {self._left_out} lines left out here ...")
            self._left_out = 0
        self.send("line", text=text)

    def flush(self) -> None:
        """Writes what the other end takes now."""
        try:
            while self._out:
                del self._out[: os.write(self.sink, self._out[:65536])]
        except BlockingIOError:
            pass
        except OSError:  # it has gone; standard input says so, too
            self._out.clear()

    @property
    def waiting(self) -> bool:
        """Whether something is still to be written."""
        return bool(self._out)

    def receive(self) -> list[dict[str, Any]]:
        """The frames that have come."""
        try:
            data = os.read(self.source, 1 << 20)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            self.ended = True
            return []
        self.heard = time.monotonic()
        *lines, self._in = (self._in + data).split(b"\n")
        return [frame for frame in map(parse, lines) if frame]


class Agent:
    """See the module.

    Args:
        wire: to whoever asked for the job.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.job: dict[str, Any] = {}
        """What `check` brought."""
        self.child: subprocess.Popen[bytes] | None = None
        self.code: int | None = None
        self.output, self.rest = -1, b""
        self.over = False
        self.why = ""
        """Why the part is being ended; empty: it is not."""
        self.stage, self.since, self.deadline = 0, 0.0, float("inf")
        """0 running, 1 signalled, 2 signalled again, 3 killed; since when, and until when."""
        self.seen_mark = False
        self.left: list[str] = []
        self.listener: socket.socket | None = None
        self.selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Serves until its part is over and the other end knows, or has gone."""
        wake = self._hear_signals()
        self.selector.register(self.wire.source, selectors.EVENT_READ, self._on_frames)
        self.selector.register(wake, selectors.EVENT_READ, lambda: self._on_signals(wake))
        version = ".".join(str(number) for number in sys.version_info[:3])
        self.wire.send("hello", host=socket.gethostname(), pid=os.getpid(), python=version)
        beat = time.monotonic()
        while not self.over:
            for key, _ in self.selector.select(LOOK_SECONDS):
                key.data()
            if time.monotonic() - beat > self.job.get("heartbeat", 5):
                beat = time.monotonic()
                if not self.wire.waiting:
                    self.wire.send("beat")
            self._tick()
        give_up = time.monotonic() + 5
        while self.wire.waiting and not self.wire.ended and time.monotonic() < give_up:
            time.sleep(0.02)
            self.wire.flush()

    def _hear_signals(self) -> socket.socket:
        inbox, outbox = socket.socketpair()
        inbox.setblocking(False)
        outbox.setblocking(False)
        signal.set_wakeup_fd(outbox.fileno(), warn_on_full_buffer=False)
        self._outbox = outbox  # kept open
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        return inbox

    def _on_signals(self, inbox: socket.socket) -> None:
        if set(inbox.recv(4096)) - {signal.SIGCHLD}:
            self.stop(signal.SIGTERM, "the agent was signalled")

    def _on_frames(self) -> None:
        for frame in self.wire.receive():
            if frame["kind"] == "check":
                self.job = frame
                self._answer(self.check)
            elif frame["kind"] == "start":
                self._answer(partial(self.start, frame))
            elif frame["kind"] == "stop":
                self.stop(frame["signal"], "asked")
            elif frame["kind"] == "kill":
                self.kill("asked")
        if self.wire.ended:
            self.selector.unregister(self.wire.source)
            self.stop(signal.SIGTERM, "gone")

    def _answer(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Fault as fault:
            self.wire.send("fault", faults=[fault.args])
        self.wire.heard = time.monotonic()  # what came meanwhile has not been read

    # What is looked at before anything starts.

    def check(self) -> None:
        """Whether this machine can take part; every reason why not at once."""
        job = self.job
        self.claim()
        faults = []
        for look in (self._check_folder, self._check_master, self._check_python):
            try:
                look()
            except Fault as fault:
                faults.append(fault.args)
        if faults:  # its claim stays until the other end has heard of all machines
            self.wire.send("fault", faults=faults)
        else:
            shared = os.path.exists(job["token"])
            self.wire.send("ready", installed=self.installed, shared=shared, step=self.newest_step())

    def claim(self) -> None:
        """Makes this the machine's only agent of the job, once an earlier one has ended.

        Its claim is an abstract socket, which vanishes with it. Asked through it, an agent that runs on ends at once:
        it has lost its client without knowing, and the other machines with it. One that is ending is let save.
        """
        name = f"\0crosstune-{os.getuid()}-{hashlib.sha256(self.job['run_dir'].encode()).hexdigest()[:24]}"
        answered, told = time.monotonic(), False
        while (listener := _listen(name)) is None:
            holder = self._ask_holder(name)
            if holder is None or "launch" in holder:
                answered = time.monotonic()
            else:
                _refuse_silent(holder["pid"], time.monotonic() - answered)
            if holder and holder.get("launch") == self.job["launch"]:
                raise Fault("launcher.hosts", f"the same machine as node {holder['node']}", "name each machine once")
            if holder and not told:
                self.wire.send("note", text=f"waits for the earlier attempt's agent (process {holder['pid']}) to end")
                told = True
            time.sleep(LOOK_SECONDS)
            self.wire.receive()
            if self.wire.ended:
                raise Fault("agent", "the client has gone", None)
        self.listener = listener
        self.selector.register(listener, selectors.EVENT_READ, self._on_newer)

    def _ask_holder(self, name: str) -> dict[str, Any] | None:
        """What the holder of the claim says; its ``pid`` alone where it says nothing in time; None: it is ending."""
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(ANSWER_SECONDS)
            try:
                other.connect(name)
                pid, user = _peer_of(other)
                if user != os.getuid():
                    raise Fault("agent", "the job's name is held here by another user", None)
                other.sendall(self.job["launch"].encode())
                try:
                    answer: dict[str, Any] = json.loads(other.recv(4096))
                except socket.timeout:  # noqa: UP041 - before Python 3.10 it is no TimeoutError
                    answer = {"pid": pid}
                return answer
            except (OSError, ValueError):
                return None

    def _on_newer(self) -> None:
        assert self.listener is not None
        with self.listener.accept()[0] as other:
            if _peer_of(other)[1] != os.getuid():
                return
            other.settimeout(2)
            try:
                launch = other.recv(200).decode()
                answer = {"launch": self.job["launch"], "node": self.job["node"], "pid": os.getpid()}
                other.sendall(json.dumps(answer).encode())
            except OSError:
                return
        if launch != self.job["launch"] and self.stage == 0:
            self.stop(signal.SIGTERM, "replaced")
            self.deadline = min(self.deadline, self.since + REPEAT_SECONDS)

    def _check_folder(self) -> None:
        job = self.job
        if not os.path.isdir(job["working_dir"]):
            found = f"no folder '{job['working_dir']}', from which the job was launched"
            raise Fault("working folder", found, "launch from a folder that all machines have")
        folder = os.path.dirname(job["token"])
        trial = os.path.join(folder, f".try-{job['launch']}-{job['node']}")
        try:
            os.makedirs(folder, exist_ok=True)
            with open(trial, "w"):
                os.unlink(trial)
        except OSError as error:
            raise Fault("run_dir", f"cannot write '{folder}': {error.strerror}", None) from None

    def _check_master(self) -> None:
        try:
            socket.getaddrinfo(self.job["master"], 1)
        except OSError as error:
            found = f"the name '{self.job['master']}' of machine 0 is not known: {error.strerror}"
            raise Fault("launcher.master", found, "launcher.master=ADDRESS that all machines know") from None

    def _check_python(self) -> None:
        """Which crosstune the job's own Python has."""
        command, job = self.job["probe"], self.job
        for file in job["setup"]:
            if not os.path.isfile(os.path.join(job["working_dir"], file)):
                raise Fault("cluster.setup", f"no file '{file}'", None)
        try:
            done = subprocess.run(
                command,
                input=job["program"].encode(),
                env={**os.environ, **job["environment"]},
                cwd=job["working_dir"],
                capture_output=True,
                timeout=PROBE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            raise Fault("python", f"'{job['python']}' did not answer within {PROBE_SECONDS} s", None) from None
        except NotADirectoryError:
            return  # told by `_check_folder`
        except FileNotFoundError as error:
            if error.filename == job["working_dir"]:
                return
            if error.filename != job["python"]:
                raise Fault("cluster.setup", f"no '{error.filename}', which reads it", "install it there") from None
            raise Fault("python", f"no '{job['python']}'", "python=PATH of one that has crosstune") from None
        except OSError as error:
            raise Fault("python", f"'{job['python']}' cannot be run: {error.strerror}", None) from None
        answers = [answer for answer in map(parse, done.stdout.split(b"\n")) if answer]
        if not answers:
            said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
            last = said[-1] if said else "no message"
            raise Fault("python", f"'{job['python']}' ended with code {done.returncode}: {last}", None)
        self.installed = answers[-1]

    def newest_step(self) -> int:
        """Of the run's newest complete checkpoint that this machine sees; -1: none."""
        folder, steps = os.path.join(self.job["run_dir"], "checkpoints"), [-1]
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name[5:].isdigit() and os.path.exists(os.path.join(folder, name, "COMPLETE")):
                steps.append(int(name[5:]))
        return max(steps)

    # The machine's part.

    def start(self, frame: dict[str, Any]) -> None:
        """Starts `launchers.node`."""
        job = self.job
        for path, text in frame["files"].items():
            _write_if_other(path, text)
        try:
            self.child = subprocess.Popen(
                frame["command"],
                env={**os.environ, **job["environment"], **frame["environment"]},
                cwd=job["working_dir"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_agent,
            )
        except OSError as error:
            raise Fault("python", f"cannot be started: {error.strerror}", None) from None
        assert self.child.stdout is not None
        self.output = self.child.stdout.fileno()
        os.set_blocking(self.output, False)
        self.selector.register(self.output, selectors.EVENT_READ, self._on_output)

    def _on_output(self) -> bool:
        """Passes lines on; whether there were any, or a part of one."""
        try:
            data = os.read(self.output, 65536)
        except BlockingIOError:
            return False
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.rest and (not data or len(self.rest) > 65536):
            lines.append(self.rest)
            self.rest = b""
        for line in lines:
            self.wire.send_line(line.decode(errors="replace"))
        if not data:
            self.selector.unregister(self.output)
            self.output = -1
        return bool(data)

    def stop(self, number: int, why: str) -> None:
        """Ends the part: with a save the first time, at once the second."""
        if self.child is None:
            self.over = True
        elif self.stage == 0:
            self.stage, self.why, self.since = 1, why, time.monotonic()
            self._signal(number)
            self.deadline = self.since + self.job["grace"] + MARGIN_SECONDS
        elif self.stage == 1 and why == "asked":
            self.deadline = min(self.deadline, self.since + REPEAT_SECONDS)

    def kill(self, why: str) -> None:
        """Ends the part without a word to it."""
        if self.child is None:
            self.over = True
        elif self.stage < 3:
            self.stage, self.why, self.deadline = 3, self.why or why, time.monotonic() + GIVE_UP_SECONDS

    def _signal(self, number: int) -> None:
        if self.code is None and self.child is not None:
            os.kill(self.child.pid, number)

    def _tick(self) -> None:
        self.wire.flush()
        now = time.monotonic()
        if now - self.wire.heard > self.job.get("silence", 300):
            self.stop(signal.SIGTERM, "silence")
        if self.child is None:
            return
        if not self.seen_mark:
            self._send_mark()
        none_left = self._reap()
        if self.code is not None and self.stage < 2:
            self._end_rest(now)
        elif now > self.deadline and self.stage == 1:
            self.stage, self.deadline = 2, now + END_SECONDS
            self._signal(signal.SIGTERM)
        elif now > self.deadline and self.stage == 2:
            self.kill(self.why)
        if self.stage == 3 and not none_left:
            for pid in descendants():
                _try_to_kill(pid, signal.SIGKILL)
            none_left = now > self.deadline and self._cannot_be_killed()
        if none_left:
            self._end()

    def _end_rest(self, now: float) -> None:
        """`launchers.node` has ended: what it left has a moment to follow."""
        self.stage, self.deadline = 2, now + END_SECONDS
        for pid, name in descendants().items():
            self.left.append(f"{name} ({pid})")
            _try_to_kill(pid, signal.SIGTERM)

    def _cannot_be_killed(self) -> bool:
        self.left = [f"{name} ({pid}), which SIGKILL does not end" for pid, name in descendants().items()]
        return True

    def _reap(self) -> bool:
        """Whether no process of the part is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            if self.child is not None and pid == self.child.pid:
                signalled = os.WIFSIGNALED(status)
                self.code = 128 + os.WTERMSIG(status) if signalled else os.WEXITSTATUS(status)
                self.child.returncode = self.code

    def _end(self) -> None:
        while self.output >= 0 and self._on_output():
            pass
        self._send_mark()
        code = 128 + signal.SIGKILL if self.code is None else self.code
        self.wire.send("ended", code=code, why=self.why, left=self.left, step=self.newest_step())
        self.over = True

    def _send_mark(self) -> None:
        try:
            with open(self.job["mark"], encoding="utf-8") as file:
                self.wire.send("mark", mark=json.load(file))
            self.seen_mark = True
        except (OSError, ValueError):
            pass  # none yet


def descendants() -> dict[int, str]:
    """Processes below this one that have not ended, and their names."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                head, _, tail = file.read().rpartition(")")
        except OSError:
            continue
        state, parent = tail.split()[:2]
        parents[pid] = int(parent)
        if state not in "ZX":
            names[pid] = head.partition("(")[2]
    found: set[int] = set()
    frontier = {os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found |= frontier
    return {pid: names[pid] for pid in found & names.keys()}


def _write_if_other(path: str, text: str) -> None:
    """Writes a file whole, unless a shared folder has it already."""
    try:
        with open(path, encoding="utf-8") as file:
            if file.read() == text:
                return
    except (OSError, UnicodeDecodeError):
        pass
    partial = f"{path}.{socket.gethostname()}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        raise Fault("run_dir", f"cannot write '{path}': {error.strerror}", None) from None


def _listen(name: str) -> socket.socket | None:
    """The abstract socket of a name; None: another process has it."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(name)
        listener.listen(64)
    except OSError as error:
        listener.close()
        if error.errno != errno.EADDRINUSE:
            raise Fault("agent", f"cannot claim the job here: {error.strerror}", None) from None
        return None
    return listener


def _peer_of(peer: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; process 0: one of another container."""
    pid, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def _refuse_silent(pid: int, seconds: float) -> None:
    """Gives up a process that does not answer: one that is stopped at once, one that may be busy after a while."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except OSError:
        state = ""
    if seconds > (2 * ANSWER_SECONDS if state in ("T", "t", "D") else PROBE_SECONDS):
        found = f"process {pid} on {socket.gethostname()}, the earlier attempt's agent, does not answer"
        raise Fault("agent", f"{found}{f' (state {state})' if state else ''}", f"kill -9 {pid} there")


def _try_to_kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _end_with_agent() -> None:
    """In the child: kill -9 of the agent leaves nobody either."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Runs the agent on standard input and output."""
    wire = Wire()
    if sys.platform != "linux":
        wire.send("fault", faults=[("system", f"{sys.platform}, but the agent of launcher=ssh needs Linux", None)])
        return
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    Agent(wire).run()


if __name__ == "__main__":
    main()
