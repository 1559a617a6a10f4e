"""The log of a pod, to its end, wherever the connection to the server is lost."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime

from launchers.kubernetes import Manifest
from launchers.kubernetes import pods as told
from launchers.kubernetes.api import PODS, Api
from launchers.kubernetes.connection import LostError

OVERLAP_SECONDS = 5
"""By so much a log that is read on begins before where it was lost: clocks differ."""
LOSSES, LOSS_SECONDS = 5, 0.5
"""So often, and after such a pause, is a log read on that was lost; one that is followed as often as it takes."""
FRACTION = re.compile(r"\.(\d+)")


def lines_of(api: Api, pod: Manifest, container: str, *, follow: bool) -> Iterator[str]:
    """Of a pod to its end, each line once, wherever the connection is lost."""
    name, uid, last, losses = pod["metadata"]["name"], pod["metadata"]["uid"], "", 0
    while True:
        before = losses
        try:
            for line in api.log(name, container, follow=follow, since_seconds=_age(last) if last else None):
                when, _, text = line.partition(" ")
                if (now := _moment(when)) > last:
                    last = now
                    yield text
        except ConnectionError as error:
            losses += 1
            if not follow and losses > LOSSES:
                raise LostError(f"the log of {name}", str(error)) from None
            time.sleep(LOSS_SECONDS)
        there = api.get(PODS, name)
        if there is None or there["metadata"]["uid"] != uid:
            return
        if losses == before and not (follow and told.phase(there) == "Running"):
            return  # read to its end; after a loss there may be more, though the pod has ended


def _moment(text: str) -> str:
    """A time of a log line, so that later ones sort behind: Kubernetes leaves out trailing zeros."""
    return FRACTION.sub(lambda match: f".{match[1]:0<9}", text) if "." in text else text.replace("Z", ".000000000Z")


def _age(moment: str) -> int:
    began = datetime.fromisoformat(FRACTION.sub(lambda match: f".{match[1][:6]}", moment).replace("Z", "+00:00"))
    return max(1, int(time.time() - began.timestamp()) + OVERLAP_SECONDS)
