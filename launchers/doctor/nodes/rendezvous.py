"""Machines find each other as the ranks of a run will: all connect to machine 0, and it connects back to each.

The same conversation measures clocks, and later lets all machines begin the all-reduce together, or leave it out.
Each message is one line of JSON::

    guest -> host   {"session", "node", "name", "port"}      port: where this guest listens
    guest -> host   {"ping"}          host -> guest  {"time"}                              PINGS times
    host  -> guest  {"back", "token"}                        back: None, or why the host did not get through to it
    guest -> host   {"unable"}                               None, or why it cannot take part in the all-reduce
    host  -> guest  {"go", "missing", "unable"}              to all at once

Needs psutil besides the standard library. Who does not know the session is not answered.
"""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from launchers.doctor.nodes.network import addresses_of
from launchers.doctor.nodes.request import Request

PINGS = 3
CONNECT_SECONDS = 3.0
"""For one try; packets that a firewall drops are not answered at all."""
STEP_SECONDS = 10.0
"""For one message."""
RETRY_SECONDS = 0.2
LONGEST_LINE = 2**20
BACKLOG = 1024


class Talk:
    """A connection on which lines of JSON travel."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")

    def say(self, **content: Any) -> None:
        """Sends a message; OSError if the other side has gone."""
        self.connection.sendall(json.dumps(content).encode() + b"\n")

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next message.

        Raises:
            OSError: none came, or the other side has gone.
            ValueError: it is not one of ours.
        """
        self.connection.settimeout(seconds)
        line = self.reader.readline(LONGEST_LINE)
        if not line:
            raise ConnectionResetError(errno.ECONNRESET, "the other side closed the connection")
        content = json.loads(line)
        if not isinstance(content, dict):
            raise ValueError("no message of the doctor's")
        return content

    def close(self) -> None:
        """Closes the connection."""
        with suppress(OSError):
            self.connection.close()


def why(error: Exception) -> dict[str, str]:
    """What a failed connection means: ``kind`` is name, silent, refused, unreachable or strange."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        return {"kind": "name", "text": text}
    if isinstance(error, TimeoutError):
        return {"kind": "silent", "text": "no answer"}
    if isinstance(error, ConnectionRefusedError):
        return {"kind": "refused", "text": text}
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH):
        return {"kind": "unreachable", "text": text}
    return {"kind": "strange", "text": text}


def listener(port: int) -> socket.socket:
    """Listens on all addresses, as torch's store does.

    Raises:
        OSError: the port is taken.
    """
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG)
    return socket.create_server(("", port), backlog=BACKLOG)


def holder_of(port: int) -> str | None:
    """The process that listens on a port of this machine; None where it cannot be seen."""
    import psutil

    with suppress(psutil.Error, OSError):
        for each in psutil.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN and each.laddr and each.laddr.port == port and each.pid:
                return f"{psutil.Process(each.pid).name()} (process {each.pid})"
    return None


class Host:
    """Machine 0."""

    def __init__(self, request: Request, *, token: bool) -> None:
        self.request, self.token = request, token
        self.changed = threading.Condition()
        self.guests: dict[int, dict[str, Any]] = {}
        """Who came: name, address, and why we did not get through to it (``back``)."""
        self.words: dict[int, str | None] = {}
        """Who has said whether it can take part in the all-reduce, and why not."""
        self.decision: dict[str, Any] | None = None
        self.server: socket.socket | None = None

    def meet(self) -> dict[str, Any]:
        """Lets the others come.

        Returns:
            ``{"listens": True, "guests": {number: ...}, "missing": [numbers]}``, or False with why and ``holder``.
        """
        try:
            self.server = listener(self.request.master_port)
        except OSError as error:
            return {"listens": False, **why(error), "holder": holder_of(self.request.master_port)}
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()
        others = range(1, self.request.nodes)
        with self.changed:
            self.changed.wait_for(lambda: len(self.guests) == len(others), self.request.patience_seconds)
            guests = {number: dict(facts) for number, facts in self.guests.items()}
        return {"listens": True, "guests": guests, "missing": [number for number in others if number not in guests]}

    def agree(self, unable: str | None) -> dict[str, Any]:
        """Waits for every guest's word, decides, tells them; then the port is free again."""
        if self.server is None:
            return {"go": False, "missing": [], "unable": {}}
        with self.changed:
            self.words[0] = unable
            self.changed.wait_for(lambda: self.guests.keys() <= self.words.keys(), self.request.agree_seconds)
            said = {n: self.words.get(n, "it did not say whether it is ready") for n in (0, *self.guests)}
            reasons = {number: reason for number, reason in said.items() if reason}
            missing = [number for number in range(1, self.request.nodes) if number not in self.guests]
            self.decision = {"go": not reasons and not missing, "missing": missing, "unable": reasons}
            self.changed.notify_all()
        self.close()
        return self.decision

    def close(self) -> None:
        """Stops listening."""
        if self.server is not None:
            with suppress(OSError):
                self.server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            self.server.close()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, address = server.accept()
                threading.Thread(target=self._serve, args=(Talk(connection), address[0]), daemon=True).start()

    def _serve(self, talk: Talk, address: str) -> None:
        """One guest's conversation."""
        number = None
        try:
            hello = talk.hear(STEP_SECONDS)
            if hello.get("session") != self.request.session:
                return
            for _ in range(PINGS):
                talk.hear(STEP_SECONDS)
                talk.say(time=time.time())
            address = address.removeprefix("::ffff:")
            back = call_back(self.request, hello, address)
            talk.say(back=back, token=self.token)
            number = int(hello["node"])
            with self.changed:
                self.guests[number] = {"name": hello["name"], "address": address, "back": back}
                self.changed.notify_all()
            word = talk.hear(self.request.agree_seconds + STEP_SECONDS)["unable"]
            with self.changed:
                self.words[number] = word
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.decision is not None, self.request.agree_seconds)
            talk.say(**self.decision or {})
        except (OSError, ValueError, KeyError):  # it has gone, or was none of ours
            if number is not None:
                with self.changed:
                    self.words.setdefault(number, "its connection ended")
                    self.changed.notify_all()
        finally:
            talk.close()


def call_back(request: Request, hello: dict[str, Any], seen: str) -> dict[str, Any] | None:
    """Connects to a guest under the address that it came from: a run asks for no other machine's name than the first's.

    Returns:
        None, or what went wrong, with ``addresses``: that address.
    """
    addresses = [seen]
    try:
        with socket.create_connection((seen, int(hello["port"])), timeout=CONNECT_SECONDS) as connection:
            talk = Talk(connection)
            talk.say(session=request.session)
            answered = talk.hear(CONNECT_SECONDS).get("node")
            if answered == hello["node"]:
                return None
            return {"kind": "strange", "text": f"node {answered} answers", "addresses": addresses}
    except (OSError, ValueError) as error:
        return {**why(error), "addresses": addresses}


class Guest:
    """Every other machine."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.talk: Talk | None = None

    def meet(self) -> dict[str, Any]:
        """Connects to machine 0, which may come up later than this one.

        Returns:
            ``{"reached": True, "address", "seconds", "offset_seconds", "back", "token"}`` (round trip, this clock
            minus the host's, and see the module), or False with why, and ``addresses``: what the host's name means.
        """
        deadline = time.monotonic() + self.request.patience_seconds
        with listener(0) as server:
            threading.Thread(target=self._answer, args=(server,), daemon=True).start()
            while True:
                addresses: list[str] = []
                try:
                    addresses = addresses_of(self.request.master)
                    return {"reached": True, **self._introduce(server.getsockname()[1])}
                except (OSError, ValueError, KeyError, UnicodeError) as error:
                    if time.monotonic() >= deadline:
                        return {"reached": False, **why(error), "addresses": addresses}
                time.sleep(RETRY_SECONDS)

    def agree(self, unable: str | None) -> dict[str, Any]:
        """Says whether this machine can take part, and waits for the decision of all; `meet` must have reached."""
        assert self.talk is not None
        try:
            self.talk.say(unable=unable)
            decision = self.talk.hear(self.request.agree_seconds + STEP_SECONDS)
            return {key: decision[key] for key in ("go", "missing", "unable")}
        except (OSError, ValueError, KeyError):
            return {"go": False, "missing": [0], "unable": {}}
        finally:
            self.talk.close()

    def _introduce(self, port: int) -> dict[str, Any]:
        request = self.request
        address = (request.master, request.master_port)
        talk = Talk(socket.create_connection(address, timeout=CONNECT_SECONDS))
        try:
            name = request.name or socket.gethostname()
            talk.say(session=request.session, node=request.node, name=name, port=port)
            trip, offset = min(self._ping(talk) for _ in range(PINGS))
            answer = talk.hear(STEP_SECONDS)
            self.talk = talk
            reached = talk.connection.getpeername()[0].removeprefix("::ffff:")
            return {
                "address": reached,
                "seconds": trip,
                "offset_seconds": offset,
                "back": answer["back"],
                "token": answer["token"],
            }
        except BaseException:
            talk.close()
            raise

    def _ping(self, talk: Talk) -> tuple[float, float]:
        """Round trip, and by how much this clock is ahead of the host's, taking both ways for equally long."""
        began, clock = time.monotonic(), time.time()
        talk.say(ping=True)
        there = float(talk.hear(STEP_SECONDS)["time"])
        trip = time.monotonic() - began
        return trip, clock + trip / 2 - there

    def _answer(self, server: socket.socket) -> None:
        """Tells whoever knows the session which machine this is."""
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                with suppress(OSError, ValueError):
                    talk = Talk(connection)
                    if talk.hear(CONNECT_SECONDS).get("session") == self.request.session:
                        talk.say(node=self.request.node)
                with suppress(OSError):
                    connection.close()
