"""Slurm's own commands: how they are called, what they say of a job, and what their refusals mean."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError, CrosstuneError, RunFailedError, first_line
from launchers.job import Word

ANSWER_SECONDS = 120
"""A controller under load takes long; one that is away lets its commands try again for some time."""
KEPT = ("SLURM_CONF", "SLURM_JWT")
"""How to reach the cluster. Other variables of Slurm would change what is asked for or how it is answered, unseen."""
OF_SLURM = ("SBATCH_", "SLURM_", "SCANCEL_", "SACCT_", "SCONTROL_", "SQUEUE_")
UNKNOWN = re.compile(r"Invalid job id specified|Job \S+ not found", re.IGNORECASE)
OVER = re.compile("already completing or completed|Invalid job id specified", re.IGNORECASE)

WORDS: Mapping[str, Word] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"), Word.pending),
    **dict.fromkeys(("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING"), Word.running),
    **dict.fromkeys(("RESIZING", "STAGE_OUT", "POWER_UP_NODE"), Word.running),
    **dict.fromkeys(("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"), Word.failed),
    **dict.fromkeys(("PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"), Word.failed),
    "COMPLETED": Word.ended,
    "CANCELLED": Word.cancelled,
}
"""Job states of squeue(1)."""
HINTS: Mapping[str, str] = {
    "TIMEOUT": "killed at its time limit before it had saved: raise launcher.signal_lead_seconds",
    "PREEMPTED": "killed before it had saved, or it may not be requeued",
    "OUT_OF_MEMORY": "the machine's memory, not a device's: raise memory_gib",
    "NODE_FAIL": "a machine died",
    "BeginTime": "it starts again shortly",
    "PartitionTimeLimit": "the partition's time limit is below time_limit_minutes",
    "PartitionNodeLimit": "the partition has, or allows, fewer nodes",
    "PartitionConfig": "the partition cannot run such a job",
    "ReqNodeNotAvail": "nodes that it needs are down, drained or reserved",
    "BadConstraints": "no node has what launcher.constraint asks for",
    "JobHeldUser": "scontrol release JOB",
    "JobHeldAdmin": "ask the administrator",
    "launch failed requeued held": "it could not be started on a node: scontrol release JOB, once that is mended",
}
"""What a state, or the reason for which a job waits, means for the one who waits."""
REFUSALS: Sequence[tuple[str, str, str]] = (
    ("node count specification invalid", "nodes", "the partition has, or allows, fewer"),
    ("more processors requested|cpu count per node", "cpus", "fewer, as sinfo -o '%P %c' tells for the partition"),
    ("memory specification", "memory_gib", "less, as sinfo -o '%P %m' tells for the partition"),
    ("invalid generic resource", "cluster.gres", "a name that sinfo -o '%P %G' shows"),
    (
        "requested node configuration is not available",
        "nodes, nproc, cpus, memory_gib",
        "sinfo -o '%P %D %c %m %G' tells what a partition's nodes have: devices are cluster.devices_per_node, or nproc",
    ),
    ("invalid partition|partition does not|no partition specified", "launcher.partition", "one that sinfo lists"),
    ("invalid account", "launcher.account", "one that sacctmgr show associations user=$USER lists"),
    ("invalid qos", "launcher.qos", "one that sacctmgr show qos lists"),
    ("time limit", "time_limit_minutes", "the partition's is in sinfo -o '%P %l'"),
    ("feature specification", "launcher.constraint", "features that sinfo -o '%P %f' shows"),
    ("reservation", "launcher.reservation", "one that scontrol show reservation lists"),
    ("invalid node name", "launcher.nodelist, launcher.exclude", "names that sinfo -N lists"),
    ("job array", "launcher=slurm", "fewer jobs in one sweep: scontrol show config tells MaxArraySize"),
    ("violates accounting|qos.*limit|assoc", "launcher.account, launcher.qos", "less, or another account"),
    ("unrecognized option|unknown option", "launcher.extra", "an option that sbatch --help lists"),
)
"""Words of sbatch's refusals, the key that is at fault, and what to do."""


@dataclass(frozen=True)
class JobState:
    """What Slurm has of a job."""

    name: str
    """Of the state."""
    reason: str = ""
    restarts: int = 0

    @property
    def word(self) -> Word:
        """In the launchers' terms; a state that is not known here is one in which the job is still held."""
        return WORDS.get(self.name, Word.running)

    def __str__(self) -> str:
        """One line for the user."""
        waits = self.reason not in ("", "None", "(null)")
        hint = HINTS.get(self.name) or (HINTS.get(self.reason) if waits else None)
        again = f"started again {self.restarts} time(s)" if self.restarts else None
        more = "; ".join(text for text in (hint, again) if text)
        return f"{self.name}{f' ({self.reason})' if waits else ''}{f': {more}' if more else ''}"


def call(command: Sequence[str], *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one of Slurm's commands; its exit code is for the caller.

    Out of reach of the terminal, whose Ctrl-C goes to all processes of a group: sbatch would be killed by it while the
    controller takes the job, and this command would not know.

    Raises:
        ConfigError: there is no such command here.
        RunFailedError: no answer.
    """
    environment = {name: value for name, value in os.environ.items() if name in KEPT or not name.startswith(OF_SLURM)}
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_SECONDS,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise ConfigError(
            "launcher=slurm", f"no command {command[0]} here", remedy="launch on a login node of the cluster"
        ) from None
    except subprocess.TimeoutExpired:
        raise RunFailedError(
            command[0],
            f"no answer within {ANSWER_SECONDS} s",
            remedy="scontrol ping tells whether the controller is up",
        ) from None


def no_answer(done: subprocess.CompletedProcess[str]) -> RunFailedError:
    """A command of Slurm's that failed, in its own words."""
    said = first_line(done.stderr)
    number = killed_by(done.returncode)
    ending = f"ended by signal {number}" if number else f"exit code {done.returncode}"
    told = said.partition("error: ")[2] or said or f"{ending}, without a word"
    return RunFailedError(done.args[0], told, remedy="scontrol ping tells whether the controller is up")


def killed_by(code: int) -> int:
    """The signal that ended a command, or the one that a script around it tells of, as shells do; 0: none did."""
    return -code if code < 0 else code - 128 if 128 < code <= 128 + signal.NSIG else 0


def refused(stderr: str) -> CrosstuneError:
    """A job that sbatch did not take: in Slurm's words, with the key at fault where these are known."""
    lines = [line.partition("error: ")[2] or line for line in stderr.strip().splitlines()]
    said = "; ".join(dict.fromkeys(line.removeprefix("Batch job submission failed: ") for line in lines))
    for words, key, remedy in REFUSALS:
        if re.search(words, said, re.IGNORECASE):
            return ConfigError(key, f"Slurm refuses the job: {said}", remedy=remedy)
    return ConfigError("launcher=slurm", f"Slurm refuses the job: {said}")


def state_of_job(job_id: str, cluster: str, name: str) -> JobState | None:
    """What Slurm has of a job, from the controller or, once that has forgotten it, from accounting.

    Args:
        job_id: such as ``17``, or ``17_3`` of an array.
        cluster: where several are served; empty: the only one.
        name: of the job: its number may have been given out anew.

    Returns:
        None: it knows no such job, or no more.

    Raises:
        RunFailedError: Slurm cannot be asked.
    """
    done = call(["scontrol", *on_cluster(cluster), "--oneliner", "show", "job", job_id])
    if done.returncode == 0:
        return parse_job(done.stdout, name)
    if not UNKNOWN.search(done.stderr + done.stdout):  # of an array's task it says so on its standard output
        raise no_answer(done)
    asked = ["--noheader", "--allocations", "--parsable2", f"--jobs={job_id}", "--format=JobName,State,Reason"]
    try:
        told = call(["sacct", *on_cluster(cluster), *asked])
    except ConfigError:
        return None
    return parse_accounting(told.stdout, name) if told.returncode == 0 else None


def parse_job(text: str, name: str) -> JobState | None:
    """What ``scontrol --oneliner show job`` says; None where the job has another name."""
    fields = {
        key: value for key, value in re.findall(r"(?:^|\s)(\w+)=(\S*)", text.splitlines()[0] if text else "")[::-1]
    }
    if fields.get("JobName") != name or "JobState" not in fields:
        return None
    reason = re.search(r"\sReason=(.*?) Dependency=", text)  # may be several words
    return JobState(fields["JobState"], reason[1] if reason else "", int(fields.get("Restarts", "0")))


def parse_accounting(text: str, name: str) -> JobState | None:
    """What sacct says; ``CANCELLED by 1000`` is CANCELLED."""
    for line in reversed(text.splitlines()):  # a job that was requeued has several, the newest last
        job, _, rest = line.partition("|")
        state, _, reason = rest.partition("|")
        if job == name and state:
            return JobState(state.split()[0], reason)
    return None


def signal_batch(job_id: str, cluster: str) -> None:
    """Has the batch script tell the run to save, and not start it again.

    Raises:
        RunFailedError: Slurm cannot be asked.
    """
    _cancel([*on_cluster(cluster), "--batch", "--signal=USR2", job_id])


def end(job_id: str, cluster: str) -> None:
    """Ends a job: out of the queue, or SIGTERM and, after the cluster's KillWait, SIGKILL.

    Raises:
        RunFailedError: Slurm cannot be asked.
    """
    _cancel([*on_cluster(cluster), job_id])


def _cancel(words: Sequence[str]) -> None:
    done = call(["scancel", *words])
    if done.returncode and not OVER.search(done.stderr):
        raise no_answer(done)


def on_cluster(cluster: str) -> list[str]:
    """The option that names a cluster, or several; empty: the only one."""
    return [f"--clusters={cluster}"] if cluster else []
