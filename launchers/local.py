"""This machine, in the foreground: the launcher with which a config that others will get is tried first."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress

from configs.errors import EXIT_INTERRUPTED, ConfigError, CrosstuneError
from launchers.base import node_command, with_setup
from launchers.foreground import ForegroundLauncher
from launchers.job import Job, JobFolder
from launchers.spec import ATTEMPT, MASTER, NODE, LaunchSpec, this_python
from launchers.supervise import StopSignals
from launchers.torchrun import end_with_parent

LOOK_SECONDS = 0.2
"""Between two looks whether a signal has to be passed on."""


class LocalLauncher(ForegroundLauncher):
    """See the module."""

    name = "local"

    def faults(self, spec: LaunchSpec) -> Iterator[CrosstuneError]:
        """One machine only."""
        if spec.nodes != 1:
            yield ConfigError("nodes", f"{spec.nodes}, but launcher=local is this machine", remedy="launcher=ssh")

    def render(self, spec: LaunchSpec, attempt: int) -> dict[str, str]:
        """Nothing: what is run is in job.json."""
        return {}

    def start(self, job: Job, folder: JobFolder, attempt: int, stops: StopSignals) -> int:
        """See `ForegroundLauncher.start`."""
        spec = job.spec
        command = with_setup(node_command(spec.python or this_python(), str(folder.file)), spec.setup)
        place = {NODE: "0", MASTER: "127.0.0.1", ATTEMPT: str(attempt)}
        # A session of its own: Ctrl-C reaches it once, through us.
        process = subprocess.Popen(
            command, env={**os.environ, **place}, start_new_session=True, preexec_fn=end_with_parent
        )
        passed = 0
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=LOOK_SECONDS)
                code = 128 - code if code < 0 else code
                interrupted = signal.SIGINT in stops.heard and code == 128 + signal.SIGTERM
                return EXIT_INTERRUPTED if interrupted else code
            for number in stops.heard[passed:]:
                # Means the same to it; Python itself, still at its imports, would end with a traceback upon SIGINT.
                process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)
                passed += 1
