"""A stand-in of the Kubernetes API server: real sockets and paths, objects in memory, faults on order.

It speaks what the launchers use: POST (with dry run and strict fields), GET, lists by label, watches, PATCH, DELETE,
and a pod's log that may be followed. Manifests are held against `tests.kubernetes_models`. It runs nothing: see
`fake_kubelet`.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from pydantic import ValidationError

from tests.kubernetes_models import check

TOKEN = "token-of-the-kubeconfig"
NAMESPACE = "research"
PATH = re.compile(
    r"/(api|apis/(?P<group>[^/]+))/v[^/]+/namespaces/(?P<ns>[^/]+)/(?P<plural>[^/]+)(/(?P<name>[^/]+))?(?P<log>/log)?"
)
MERGE = "application/merge-patch+json"
Manifest = dict[str, Any]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


@dataclass
class Fault:
    """What goes wrong with the next requests that fit.

    `how`: a status, "before" (the connection is lost before the request is carried out), "after" (before its answer is
    sent), "cut" (in the middle of a stream, after `lines`) or "gone" (a watch's state is too old).
    """

    method: str
    path: str
    how: int | str
    times: int = 1
    lines: int = 1
    message: str = "as ordered"
    act: Callable[[], None] = lambda: None
    """What happens then."""


@dataclass
class Cluster:
    """The state of the cluster, and what was asked of it."""

    installed: set[str] = field(default_factory=lambda: {"pods", "services", "events", "jobs", "pytorchjobs"})
    forbidden: set[str] = field(default_factory=set)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    objects: dict[tuple[str, str], Manifest] = field(default_factory=dict)
    logs: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    down: bool = False
    keeps_deleted: bool = False
    """What is deleted stays until a controller has cleared it away, as with finalizers."""
    changes: list[tuple[int, str, str, Manifest]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def put(self, plural: str, manifest: Manifest, change: str = "MODIFIED") -> None:
        """Makes or changes an object; who watches is told."""
        with self.changed:
            version = next(self.versions)
            about = manifest["metadata"]
            about.setdefault("uid", f"uid-{version}")
            about.setdefault("creationTimestamp", now())
            about["resourceVersion"] = str(version)
            if change == "DELETED":
                self.objects.pop((plural, about["name"]), None)
            else:
                change = change if (plural, about["name"]) in self.objects else "ADDED"
                self.objects[plural, about["name"]] = manifest
            self.changes.append((version, change, plural, json.loads(json.dumps(manifest))))
            self.changed.notify_all()

    def remove(self, plural: str, name: str) -> None:
        with self.changed:
            if (plural, name) in self.objects:
                self.put(plural, self.objects[plural, name], "DELETED")

    def all(self, plural: str) -> list[Manifest]:
        with self.changed:
            return [found for (kind, _), found in sorted(self.objects.items()) if kind == plural]

    def say(self, pod: str, text: str) -> None:
        """A line of a pod's log."""
        with self.changed:
            self.logs.setdefault(pod, []).append((now(), text))
            self.changed.notify_all()

    def set_pod(self, name: str, phase: str, **status: Any) -> None:
        """A state of a pod of one container."""
        pod = self.objects["pods", name]
        pod["status"] = {"phase": phase, **status}
        self.put("pods", pod)

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self.changed:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    fault.act()
                    return fault
        return None

    def count(self, method: str, **query: str) -> int:
        return sum(m == method and all(q.get(k) == v for k, v in query.items()) for m, _, q, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        self.cluster.asked.append((self.command, url.path, query, body))
        fault = self.cluster.fault_of(self.command, self.path)
        if self.cluster.down or fault and fault.how == "before":
            return self._drop()
        if fault and isinstance(fault.how, int):
            return self._refuse(fault.how, "Ordered", fault.message)
        match = PATH.fullmatch(url.path)
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", f"bearer {TOKEN}"):
            return self._refuse(401, "Unauthorized", "Unauthorized")
        if match is None or match["plural"] not in self.cluster.installed:
            return self._answer(404, b"404 page not found\n", "text/plain")
        if match["ns"] in self.cluster.forbidden:
            text = f'{match["plural"]} is forbidden: User "me" cannot {self.command} in the namespace "{match["ns"]}"'
            return self._refuse(403, "Forbidden", text)
        found = self._do(match, query, body, fault)
        if found is not None:
            if fault and fault.how == "after":
                return self._drop()
            self._answer(*found)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def _do(
        self, match: re.Match[str], query: dict[str, str], body: Any, fault: Fault | None
    ) -> tuple[int, bytes, str] | None:
        plural, name = match["plural"], match["name"]
        there = self.cluster.objects.get((plural, name))
        if self.command == "POST":
            return self._create(plural, query, body)
        if name and there is None:
            return _status(404, "NotFound", f'{plural} "{name}" not found')
        if match["log"]:
            return self._log(name, query, fault)
        if self.command == "PATCH":
            assert self.headers["Content-Type"] == MERGE
            there["metadata"] |= body["metadata"]
            self.cluster.put(plural, there)
        if self.command == "DELETE":
            wanted, uid = body.get("preconditions", {}).get("uid"), there["metadata"]["uid"]
            if wanted not in (None, uid):
                text = f"the UID in the precondition ({wanted}) does not match the UID in record ({uid})"
                return _status(409, "Conflict", f'Operation cannot be fulfilled on {plural} "{name}": {text}')
            there["metadata"] |= {
                "deletionTimestamp": now(),
                "deletionGracePeriodSeconds": body.get("gracePeriodSeconds"),
            }
            self.cluster.put(plural, there)
            if not self.cluster.keeps_deleted or body.get("gracePeriodSeconds") == 0 and plural == "pods":
                self.cluster.remove(plural, name)
        if name:
            return _json(200, there)
        if query.get("watch"):
            return self._watch(plural, query, fault)
        items = [each for each in self.cluster.all(plural) if _selected(each, query)]
        version = self.cluster.changes[-1][0] if self.cluster.changes else 0
        return _json(200, {"kind": "List", "metadata": {"resourceVersion": str(version)}, "items": items})

    def _create(self, plural: str, query: dict[str, str], body: Manifest) -> tuple[int, bytes, str]:
        name = body["metadata"]["name"]
        if (plural, name) in self.cluster.objects:
            return _status(409, "AlreadyExists", f'{plural} "{name}" already exists')
        try:
            check(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                return _status(400, "BadRequest", f'strict decoding error: unknown field "{place}"')
            return _status(422, "Invalid", f'{body["kind"]} "{name}" is invalid: {place}: {first["msg"]}')
        except ValueError as error:
            return _status(422, "Invalid", f'{body["kind"]} "{name}" is invalid: {error}')
        if not query.get("dryRun"):
            self.cluster.put(plural, body)
        return _json(201, {**body, "metadata": {"uid": "dry", **body["metadata"]}})

    def _watch(self, plural: str, query: dict[str, str], fault: Fault | None) -> None:
        last, seen, sent = time.monotonic() + float(query["timeoutSeconds"]), int(query["resourceVersion"] or 0), 0
        self._begin()
        if fault and fault.how == "gone":
            gone = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
            self._chunk({"type": "ERROR", "object": gone})
            return self._end()
        while time.monotonic() < last:
            with self.cluster.changed:
                self.cluster.changed.wait(0.1)
                new = [each for each in self.cluster.changes if each[0] > seen]
            for version, change, kind, manifest in new:
                seen = version
                if kind == plural and _selected(manifest, query):
                    self._chunk({"type": change, "object": manifest})
                    sent += 1
            if fault and fault.how == "cut" and sent >= fault.lines:
                return self._drop()
        self._end()

    def _log(self, pod: str, query: dict[str, str], fault: Fault | None) -> None:
        self._begin()
        sent, since = 0, query.get("sinceSeconds")
        oldest = datetime.fromtimestamp(time.time() - int(since), UTC).isoformat() if since else ""
        while True:
            with self.cluster.changed:
                phase = self.cluster.objects.get(("pods", pod), {}).get("status", {}).get("phase")
                lines = self.cluster.logs.get(pod, [])
                over = query.get("follow") != "true" or phase in (None, "Succeeded", "Failed")
                if len(lines) == sent and not over:
                    self.cluster.changed.wait(0.1)
            for when, text in lines[sent:]:
                sent += 1
                if when >= oldest:
                    self._chunk(f"{when} {text}")
                if fault and fault.how == "cut" and sent >= fault.lines:
                    return self._drop()
            if over and sent == len(self.cluster.logs.get(pod, [])):
                return self._end()

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, content: Any) -> None:
        data = (content if isinstance(content, str) else json.dumps(content)).encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _drop(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)

    def _refuse(self, code: int, reason: str, message: str) -> None:
        self._answer(*_status(code, reason, message))

    def _answer(self, code: int, data: bytes, kind: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _json(code: int, content: Any) -> tuple[int, bytes, str]:
    return code, json.dumps(content).encode(), "application/json"


def _status(code: int, reason: str, message: str) -> tuple[int, bytes, str]:
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
    return _json(code, {**status, "message": message})


def _selected(manifest: Manifest, query: dict[str, str]) -> bool:
    labels = manifest["metadata"].get("labels") or {}
    wanted = [each.partition("=") for each in query.get("labelSelector", "").split(",") if each]
    involved = re.search(r"involvedObject\.name=([^,]+)", query.get("fieldSelector", ""))
    if involved and manifest.get("involvedObject", {}).get("name") != involved[1]:
        return False
    return all(labels.get(key) == value for key, _, value in wanted)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone
            super().handle_error(request, client_address)


@contextmanager
def api_server(cluster: Cluster) -> Iterator[str]:
    """Serves a cluster; gives its address."""
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"cluster": cluster}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        cluster.down = True
        server.shutdown()
        server.server_close()


def write_kubeconfig(file: Path, address: str, namespace: str = NAMESPACE) -> Path:
    """As kubectl has it, with a token."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": TOKEN}}],
        "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u", "namespace": namespace}}],
    }
    file.write_text(yaml.safe_dump(content))
    return file
