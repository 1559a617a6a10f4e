"""The API server through the official client: plain values in and out, refusals in its own words, lost connections.

A request that got no answer is sent again, for a bounded time. That a POST of which the answer was lost is not carried
out twice follows from the object's name, which is ours to choose: the second one meets the first one's object.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import ConfigError
from configs.schema.launcher_kubernetes import KubernetesLauncherConfig
from launchers.kubernetes import Manifest
from launchers.kubernetes.connection import ExistsError, LostError, NotThereError, connect, refused, words_of
from launchers.kubernetes.pod import RUN

TIMEOUT = (5, 30)
"""Seconds to connect, and to wait for an answer."""
STREAM_TIMEOUT = (5, 300)
"""The same of a stream, which may be silent for long."""
TRY_AGAIN = (429, 500, 502, 503, 504)
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 10.0


@dataclass(frozen=True)
class Resource:
    """A kind of object."""

    group: str
    """Empty for the core group."""
    version: str
    plural: str
    kind: str

    @property
    def path(self) -> str:
        """Of the collection, with the namespace open."""
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        return f"{root}/namespaces/{{namespace}}/{self.plural}"


PODS, SERVICES, EVENTS = (
    Resource("", "v1", plural, kind) for plural, kind in (("pods", "Pod"), ("services", "Service"), ("events", "Event"))
)


class Api:
    """One cluster, one namespace.

    Args:
        cfg: how it is reached.
        namespace: null: that of the config's context.

    Raises:
        ConfigError: the client is not installed, or nothing says where the cluster is.
    """

    def __init__(self, cfg: KubernetesLauncherConfig, namespace: str | None = None) -> None:
        self.patience, (self.client, default) = cfg.patience_seconds, connect(cfg)
        self.namespace = namespace or cfg.namespace or default

    def create(self, kind: Resource, manifest: Manifest, *, dry_run: bool = False) -> Manifest:
        """Makes an object, or with `dry_run` has it checked by the server; fields that it does not know are refused.

        Raises:
            ExistsError: there is one of this name, and it is not ours.
            CrosstuneError: it was refused.
        """
        query = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        name, lost = manifest["metadata"]["name"], 0

        def note() -> None:
            nonlocal lost
            lost += 1

        try:
            made = self._ask("POST", kind, query=query, body=manifest, on_lost=note, where=f"{kind.kind} {name}")
        except ExistsError as error:
            there = self.get(kind, name)
            if lost and there is not None and _same(there, manifest):
                return there  # by the request whose answer was lost
            raise _taken(error, there, manifest) from None
        except NotThereError as error:
            raise ConfigError(
                "launcher",
                f"the cluster does not know {kind.kind} of {kind.group or 'the core'}/{kind.version} in namespace "
                f"{self.namespace}: {error.found}",
                remedy="another launcher=..., or have its controller installed",
            ) from None
        return dict(made)

    def get(self, kind: Resource, name: str) -> Manifest | None:
        """An object; None: there is none."""
        try:
            return dict(self._ask("GET", kind, name))
        except NotThereError:
            return None

    def patch(self, kind: Resource, name: str, change: Manifest) -> None:
        """Changes an object: keys that are named get new values (RFC 7396)."""
        self._ask("PATCH", kind, name, body=change)

    def delete(self, kind: Resource, name: str, *, uid: str = "", at_once: bool = False) -> None:
        """Deletes an object with what belongs to it; one that is gone is no fault.

        Args:
            kind: of the object.
            name: its name.
            uid: of the very object: another one that has its name by now is left alone. Empty: whichever has the name.
            at_once: without the time that its pods have to end.

        Raises:
            LostError: no answer: it is not known whether the object has been deleted.
            CrosstuneError: it was refused; the object is there.
        """
        body: Manifest = {"kind": "DeleteOptions", "apiVersion": "v1"}
        body |= {"preconditions": {"uid": uid}} if uid else {}
        body |= {"gracePeriodSeconds": 0, "propagationPolicy": "Background"} if at_once else {}
        try:
            self._ask("DELETE", kind, name, body=body if at_once else {**body, "propagationPolicy": "Foreground"})
        except NotThereError:
            pass
        except ExistsError:  # a precondition that does not hold is a conflict; there are others
            there = self.get(kind, name)
            if there is not None and uid in ("", there["metadata"]["uid"]):
                raise

    def select(self, kind: Resource, **selectors: str) -> tuple[list[Manifest], str]:
        """Objects, and the state of the collection that they are of."""
        found = self._ask("GET", kind, query=selectors)
        return list(found.get("items") or []), found["metadata"].get("resourceVersion", "")

    def wait_for_pods(self, label: str, test: Callable[[list[Manifest]], bool], seconds: float) -> list[Manifest]:
        """Pods with a label once they pass a test, or as they are after a time. Watches; lists anew after a loss."""
        last = time.monotonic() + seconds
        while True:
            pods, version = self.select(PODS, labelSelector=label)
            now = {pod["metadata"]["uid"]: pod for pod in pods}
            left = last - time.monotonic()
            if test(pods) or left <= 0:
                return pods
            for event in self._watch(PODS, label, version, left):
                pod = event["object"]
                if event["type"] == "DELETED":
                    now.pop(pod["metadata"]["uid"], None)
                else:
                    now[pod["metadata"]["uid"]] = pod
                if test(list(now.values())):
                    return list(now.values())
            time.sleep(FIRST_PAUSE_SECONDS)

    def _watch(self, kind: Resource, label: str, version: str, seconds: float) -> Iterator[Manifest]:
        """Changes since a state, until the time is over or the server, or the connection, ends it."""
        query = {
            "watch": "true",
            "labelSelector": label,
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, int(seconds))),
        }
        try:
            for line in _lines(self._stream(kind, "", query)):
                event = json.loads(line)
                if event.get("type") == "ERROR":
                    return  # 410: the state is too old for the server; the caller lists anew
                if event.get("type") != "BOOKMARK":
                    yield event
        except (ConnectionError, json.JSONDecodeError):
            return

    def log(self, pod: str, container: str, *, follow: bool, since_seconds: int | None) -> Iterator[str]:
        """Lines that a container printed, each behind the time when it did.

        Raises:
            ConnectionError: the connection was lost before the end.
            CrosstuneError: the server refused.
        """
        query = {"container": container, "timestamps": "true", "follow": str(follow).lower()}
        if since_seconds is not None:
            query["sinceSeconds"] = str(since_seconds)
        yield from _lines(self._stream(PODS, f"{pod}/log", query))

    def _stream(self, kind: Resource, name: str, query: Mapping[str, str]) -> Iterator[bytes]:
        import urllib3
        from kubernetes.client import ApiException

        response = None
        try:
            response = self._send("GET", kind, name, query, None, STREAM_TIMEOUT)
            if response.status in TRY_AGAIN:
                raise ConnectionError(f"{response.status} {words_of(ApiException(http_resp=response))}")
            if response.status >= 400:
                raise refused(ApiException(http_resp=response), f"{kind.kind} {name}")
            yield from response.stream(amt=None, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise ConnectionError(str(error)) from None
        finally:
            if response is not None:
                response.close()

    def _ask(
        self,
        method: str,
        kind: Resource,
        name: str = "",
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        on_lost: Callable[[], None] = lambda: None,
        where: str = "",
    ) -> Manifest:
        """The answer to a request, which is sent again while none comes and patience lasts."""
        import urllib3
        from kubernetes.client import ApiException

        pause, last = FIRST_PAUSE_SECONDS, time.monotonic() + self.patience
        where = where or f"{kind.kind} {name}".strip()
        while True:
            try:
                response = self._send(method, kind, name, query or {}, body, TIMEOUT)
                data = response.data
                if response.status < 400:
                    return dict(json.loads(data))
                refusal = ApiException(http_resp=response)
                if response.status not in TRY_AGAIN:
                    raise refused(refusal, where)
                reason, wait = f"{response.status} {words_of(refusal)}", response.headers.get("Retry-After", "")
                wait_seconds = float(wait) if wait.isdecimal() else 0.0
            except (urllib3.exceptions.HTTPError, json.JSONDecodeError) as error:
                reason, wait_seconds = str(error), 0.0
            on_lost()
            if time.monotonic() + max(pause, wait_seconds) > last:
                raise LostError(
                    f"Kubernetes at {self.client.configuration.host}",
                    f"no answer to {method} {where} for {self.patience} s: {reason}",
                    remedy="kubectl cluster-info; launcher.patience_seconds=... waits longer",
                )
            time.sleep(max(pause, wait_seconds))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _send(
        self,
        method: str,
        kind: Resource,
        name: str,
        query: Mapping[str, str],
        body: Manifest | None,
        timeout: tuple[int, int],
    ) -> Any:
        """The response, unread: of urllib3, whose own retries are off."""
        from kubernetes.client import ApiException

        content = "application/merge-patch+json" if method == "PATCH" else "application/json"
        request = self.client.param_serialize(
            method,
            kind.path + (f"/{name}" if name else ""),
            path_params={"namespace": self.namespace},
            query_params=list(query.items()),
            header_params={"Accept": "application/json", "Content-Type": content},
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            return self.client.call_api(*request, _request_timeout=timeout).response
        except ApiException as error:  # how the client tells a certificate that does not fit
            raise ConfigError(self.client.configuration.host, str(error.reason), remedy="see the kubeconfig") from None


def _same(there: Manifest, ours: Manifest) -> bool:
    """Whether an object is the one that we asked for."""
    notes = [each["metadata"].get("annotations") or {} for each in (there, ours)]
    return all(notes[0].get(key) == value for key, value in notes[1].items())


def _taken(error: ExistsError, there: Manifest | None, ours: Manifest) -> ExistsError:
    """A refusal, with whose object has the name."""
    if there is None:
        return error
    runs = [(each["metadata"].get("annotations") or {}).get(RUN) for each in (there, ours)]
    if runs[0] == runs[1]:
        return ExistsError(error.where, error.found, remedy="it is this run's: crosstune status RUN")
    found = f"{error.found}: " + (f"of the run {runs[0]}" if runs[0] else "of no run of crosstune's")
    return ExistsError(error.where, found, remedy="launch once more: the job's name is then another one")


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Lines of a stream; the last one may lack its end."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode("utf-8", errors="replace") for line in lines)
    if rest:
        yield rest.decode("utf-8", errors="replace")
