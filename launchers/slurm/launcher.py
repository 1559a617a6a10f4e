"""The launcher of Slurm."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import EXIT_RESUMABLE, ConfigError, CrosstuneError
from configs.files import write_whole
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_slurm import Container, SlurmLauncherConfig
from launchers.base import Launcher, UnknownOutcomeError, last_lines
from launchers.job import Job, JobFolder, Report, Word
from launchers.slurm.commands import end, signal_batch, state_of_job
from launchers.slurm.script import NAME, SWEEP_NAME, render_script
from launchers.slurm.submission import Place, Submitted, clusters_of, find, note_array, place_of, submit_script
from launchers.spec import LaunchSpec

GRES = re.compile(r"[A-Za-z][\w.-]*(:[A-Za-z][\w.-]*)?")
LABEL = re.compile(r"\s*0*(\d+): ?(.*)")
"""What ``srun --label`` puts before each line: the machine's number."""
SHAPE = (
    *("nodes", "nproc", "cpus", "memory_gib", "devices", "time_limit_minutes", "restarts", "grace_seconds"),
    *("secrets", "setup", "python", "working_dir"),
)
"""Fields that one script has for all jobs of an array."""


class SlurmLauncher(Launcher):
    """See the package."""

    name = "slurm"
    cfg: SlurmLauncherConfig

    def __init__(self, cfg: SlurmLauncherConfig, cluster: ClusterConfig) -> None:
        super().__init__(cfg, cluster)
        self._asked: tuple[float, bool] | None = None

    def faults(self, spec: LaunchSpec) -> Iterator[CrosstuneError]:
        """Times that leave no room for a save, and names that cannot stand where Slurm reads them."""
        lead = self.cfg.signal_lead_seconds
        if lead <= spec.grace_seconds:
            yield ConfigError(
                "launcher.signal_lead_seconds",
                f"{lead}, but a save may take guard.grace_seconds={spec.grace_seconds}",
                allowed=f"{spec.grace_seconds + 1} or more, and the length of a step besides",
            )
        if 0 < 60 * spec.time_limit_minutes <= lead:
            yield ConfigError(
                "time_limit_minutes",
                f"{spec.time_limit_minutes}, but the run is told to save launcher.signal_lead_seconds={lead} before",
                remedy="a longer limit, or a shorter lead with a shorter guard.grace_seconds",
            )
        if set(spec.run_dir) & set("%\\"):
            remedy = "another run_dir: Slurm takes both for its own in the path of its output"
            yield ConfigError("run_dir", f"'{spec.run_dir}'", allowed="no percent sign or backslash", remedy=remedy)
        gres = self.cluster.gres
        if gres is not None and not GRES.fullmatch(gres):
            yield ConfigError("cluster.gres", f"'{gres}'", allowed="name or name:type, without a number")
        if unset := [name for name in self.cfg.export if name not in os.environ]:
            yield ConfigError("launcher.export", f"not set in this environment: {', '.join(unset)}")
        if self.cfg.container is not Container.none:
            for key, path in (("run_dir", spec.run_dir), ("the working folder", spec.working_dir)):
                if set(path) & set(",:"):
                    yield ConfigError(
                        key, f"'{path}'", allowed="no comma or colon, which separate a container's mounts"
                    )

    def render(self, spec: LaunchSpec, attempt: int) -> dict[str, str]:
        """See `Launcher.render`."""
        return {NAME: render_script([spec], attempt, self.cfg, self.cluster)}

    def submit(self, job: Job, folder: JobFolder) -> dict[str, Any]:
        """See `Launcher.submit`.

        Raises:
            ConfigError: Slurm refused the job: its words, and what to change.
            RunFailedError: Slurm was not reached, or says that it does not have the job.
            UnknownOutcomeError: Slurm does not say whether it has the job.
        """
        place = Place(job.spec.name, str(folder.path))
        return _handle(submit_script(NAME, place, clusters_of(self.cfg.extra)), place)

    def render_sweep(self, specs: Sequence[LaunchSpec], attempt: int) -> dict[str, str]:
        """See `Launcher.render_sweep`: an array.

        Raises:
            ConfigError: the jobs differ in shape.
        """
        check_shape(specs)
        return {SWEEP_NAME: render_script(specs, attempt, self.cfg, self.cluster, array=True)}

    def submit_all(self, jobs: Sequence[tuple[Job, JobFolder]]) -> list[dict[str, Any]]:
        """See `Launcher.submit_all`: jobs of equal shape become one array, each with its own state and end.

        Raises:
            ConfigError: the jobs differ in shape, or Slurm refused them.
            RunFailedError: Slurm was not reached, or says that it does not have the jobs.
            UnknownOutcomeError: Slurm does not say whether it has the jobs.
        """
        if len(jobs) == 1:
            return [self.submit(*jobs[0])]
        specs = [job.spec for job, _ in jobs]
        [text] = self.render_sweep(specs, jobs[0][0].attempt).values()
        folder = Path(os.path.commonpath([spec.run_dir for spec in specs]))
        write_whole(folder / SWEEP_NAME, text)
        try:
            note_array(jobs, folder)
            submitted = submit_script(SWEEP_NAME, place_of(*jobs[0]), clusters_of(self.cfg.extra))
        except UnknownOutcomeError:
            raise
        except CrosstuneError:
            (folder / SWEEP_NAME).unlink()
            raise
        return [_handle(submitted, place_of(job, own)) for job, own in jobs]

    def report(self, job: Job, folder: JobFolder) -> Report:
        """See `Launcher.report`. Of a job that is over, the last that its script said: why it was not started again."""
        job = self._known(job, folder)
        if not job.handle:
            # It must have been there to leave marks: Slurm forgets a job some minutes after its end.
            begun = bool(folder.marks(job.attempt))
            return Report(Word.unknown, "Slurm does not know it any more" if begun else "it was not submitted")
        state = state_of_job(job.handle["job_id"], job.handle["cluster"], job.handle["name"])
        where = f"job {job.handle['job_id']}"
        said = last_words(Path(job.handle["output"]))
        if state is None:
            return Report(Word.unknown, f"{where}: Slurm does not know it, or no more{said}")
        word = state.word
        if word in (Word.pending, Word.running) or state.name == "COMPLETED":
            said = ""
        # A script that leaves with 75, a run that saved in its last minute: Slurm calls both a failure.
        if word is Word.failed and _saved(job, folder, state.restarts):
            word = Word.ended
        return Report(word, f"{where}: {state}{said}")

    def _known(self, job: Job, folder: JobFolder) -> Job:
        """The job with its handle: one that Slurm took without a word is found by its name, and noted.

        Raises:
            RunFailedError: Slurm cannot be asked.
        """
        if job.handle:
            return job
        place = place_of(job, folder)
        if (found := find(place, clusters_of(self.cfg.extra))) is None:
            return job
        known = replace(job, handle=_handle(found, place))
        with suppress(CrosstuneError):  # whoever asks may not be allowed to write there, and is told all the same
            if folder.read() == job:
                folder.write(known)
        return known

    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        """Softly through the batch script, which tells the run to save; a job that waits leaves the queue."""
        job = self._known(job, folder)
        if not job.handle:
            return
        job_id, cluster = job.handle["job_id"], job.handle["cluster"]
        if hard or self.report(job, folder).word is Word.pending:
            end(job_id, cluster)
        else:
            signal_batch(job_id, cluster)

    def log(self, job: Job, folder: JobFolder, node: int, *, follow: bool) -> Iterator[str]:
        """See `Launcher.log`. Of a machine that wrote nothing in the run's folder: what Slurm kept of it."""
        silent = True
        for line in super().log(job, folder, node, follow=follow):
            silent = False
            yield line
        own = Path(self._known(job, folder).handle.get("output", "")) if silent else Path()
        if own.is_file():
            for line in own.read_text(encoding="utf-8", errors="replace").splitlines():
                label = LABEL.fullmatch(line)
                if label is None or int(label[1]) == node:
                    yield label[2] if label else line

    def is_over(self, job: Job, folder: JobFolder) -> bool:
        """See `Launcher.is_over`; a log that is followed looks often, and a controller serves many."""
        if self._asked is None or time.monotonic() - self._asked[0] >= self.cfg.poll_seconds:
            self._asked = time.monotonic(), False  # until Slurm says so, also where it does not answer
            self._asked = time.monotonic(), super().is_over(job, folder)
        return self._asked[1]


def last_words(output: Path) -> str:
    """The batch script's own last line in what Slurm kept of a job, behind a semicolon; empty where there is none."""
    try:
        lines = last_lines(output)
    except OSError:
        return ""
    return next((f"; {line}" for line in reversed(lines) if line.startswith("crosstune: ")), "")


def _saved(job: Job, folder: JobFolder, restarts: int) -> bool:
    """Whether all machines saved in the attempt that Slurm tells of; an earlier one's marks say nothing of it."""
    codes = [mark.exit_code for mark in folder.marks(since=job.attempt + restarts)]
    return len(codes) == job.spec.nodes and set(codes) == {EXIT_RESUMABLE}


def _handle(submitted: Submitted, place: Place) -> dict[str, Any]:
    job_id = submitted.number if place.task is None else f"{submitted.number}_{place.task}"
    output = str(Path(place.folder) / f"slurm-{job_id}.out")
    return {"job_id": job_id, "cluster": submitted.cluster, "name": place.name, "output": output}


def check_shape(specs: Sequence[LaunchSpec]) -> None:
    """Refuses jobs that one script cannot start.

    Raises:
        ConfigError: two differ in what it says for all.
    """
    for field in SHAPE:
        values = {str(getattr(spec, field)) for spec in specs}
        if len(values) > 1:
            raise ConfigError(field, f"differs between jobs of one sweep: {', '.join(sorted(values))}")
