"""The launcher of Slurm."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from configs.errors import EXIT_RESUMABLE, ConfigError, CrosstuneError
from configs.files import write_whole
from configs.schema.launch import ClusterConfig
from configs.schema.launcher_slurm import Container, SlurmLauncherConfig
from launchers.base import Launcher
from launchers.job import Job, JobFolder, Report, Word
from launchers.slurm.commands import call, end, refused, signal_batch, state_of_job
from launchers.slurm.script import NAME, SWEEP_NAME, render_script
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
        """
        number, cluster = _sbatch(folder.path, NAME)
        return _handle(number, cluster, job.spec.name, folder.path)

    def submit_all(self, jobs: Sequence[tuple[Job, JobFolder]]) -> list[dict[str, Any]]:
        """See `Launcher.submit_all`: jobs of equal shape become one array, each with its own state and end.

        Raises:
            ConfigError: the jobs differ in shape, or Slurm refused them.
        """
        if len(jobs) == 1:
            return [self.submit(*jobs[0])]
        specs = [job.spec for job, _ in jobs]
        check_shape(specs)
        folder, name = Path(os.path.commonpath([spec.run_dir for spec in specs])), specs[0].name
        write_whole(folder / SWEEP_NAME, render_script(specs, jobs[0][0].attempt, self.cfg, self.cluster, array=True))
        try:
            number, cluster = _sbatch(folder, SWEEP_NAME)
        except CrosstuneError:
            (folder / SWEEP_NAME).unlink()
            raise
        tasks = [f"{number}_{index}" for index in range(len(jobs))]
        return [_handle(task, cluster, name, folder) for task in tasks]

    def report(self, job: Job, folder: JobFolder) -> Report:
        """See `Launcher.report`."""
        if not job.handle:
            return Report(Word.unknown, "not submitted")
        state = state_of_job(job.handle["job_id"], job.handle["cluster"], job.handle["name"])
        where = f"job {job.handle['job_id']}"
        if state is None:
            return Report(Word.unknown, f"{where}: Slurm does not know it, or no more")
        word = state.word
        # A script that leaves with 75, a run that saved in its last minute: Slurm calls both a failure.
        if word is Word.failed and _saved(job, folder):
            word = Word.ended
        return Report(word, f"{where}: {state}")

    def cancel(self, job: Job, folder: JobFolder, *, hard: bool) -> None:
        """Softly through the batch script, which tells the run to save; a job that waits leaves the queue."""
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
        own = Path(job.handle.get("output", ""))
        if silent and own.is_file():
            for line in own.read_text(encoding="utf-8", errors="replace").splitlines():
                label = LABEL.fullmatch(line)
                if label is None or int(label[1]) == node:
                    yield label[2] if label else line

    def is_over(self, job: Job, folder: JobFolder) -> bool:
        """See `Launcher.is_over`; a log that is followed looks often, and a controller serves many."""
        if self._asked is None or time.monotonic() - self._asked[0] >= self.cfg.poll_seconds:
            self._asked = time.monotonic(), super().is_over(job, folder)
        return self._asked[1]


def _sbatch(folder: Path, name: str) -> tuple[str, str]:
    """Number of the job, and its cluster if it was named.

    Slurm's own output goes to the working folder, so that its path is in no line of #SBATCH.
    """
    done = call(["sbatch", "--parsable", name], cwd=folder)
    if done.returncode:
        raise refused(done.stderr)
    number, _, cluster = done.stdout.strip().splitlines()[-1].partition(";")
    return number, cluster


def _saved(job: Job, folder: JobFolder) -> bool:
    codes = [mark.exit_code for mark in folder.marks()]
    return len(codes) == job.spec.nodes and set(codes) == {EXIT_RESUMABLE}


def _handle(job_id: str, cluster: str, name: str, folder: Path) -> dict[str, Any]:
    return {"job_id": job_id, "cluster": cluster, "name": name, "output": str(folder / f"slurm-{job_id}.out")}


def check_shape(specs: Sequence[LaunchSpec]) -> None:
    """Refuses jobs that one script cannot start.

    Raises:
        ConfigError: two differ in what it says for all.
    """
    for field in SHAPE:
        values = {str(getattr(spec, field)) for spec in specs}
        if len(values) > 1:
            raise ConfigError(field, f"differs between jobs of one sweep: {', '.join(sorted(values))}")
