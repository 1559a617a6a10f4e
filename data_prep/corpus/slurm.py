"""datatrove's executor for Slurm, and the jobs it submitted. Importing this imports datatrove."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor
from loguru import logger

from configs.errors import ConfigError
from configs.schema.clean import SlurmConfig
from data_prep.corpus.layout import read_json, write_json
from data_prep.corpus.steps import Step

_SCRIPT = """#!/bin/bash
{options}
set -e
cd {folder}
export PYTHONUNBUFFERED=1 PYTHONPATH={path}
exec {python} -P -m datatrove.tools.launch_pickled_pipeline {executor}
"""


class SlurmStage(SlurmPipelineExecutor):  # type: ignore[misc]
    """A stage as a job array. Its tasks run this Python, and every word of its script is quoted."""

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """The script for sbatch."""
        options = [f"#SBATCH --{key}" + (f"={shlex.quote(str(v))}" if v else "") for key, v in sbatch_args.items()]
        return _SCRIPT.format(
            options="\n".join(options),
            folder=shlex.quote(os.getcwd()),
            path=shlex.quote(os.pathsep.join(path for path in sys.path if path)),
            python=shlex.quote(sys.executable),
            executor=shlex.quote(self.logging_dir.resolve_paths("executor.pik")),
        )

    def launch_merge_stats(self) -> None:
        """Statistics are not merged: that would be a job more for every stage."""

    def get_distributed_env(self, node_rank: int = -1) -> dict[str, str]:
        """No step asks for other nodes, so Slurm is not asked for their names."""
        return {
            "datatrove_node_ips": "localhost",
            "datatrove_cpus_per_task": str(self.cpus_per_task),
            "datatrove_mem_per_cpu": str(self.mem_per_cpu_gb),
            "datatrove_gpus_on_node": "0",
            "datatrove_executor": "SLURM",
        }


def submit(cfg: SlurmConfig, stages: Sequence[tuple[Step, int]], logs: Callable[[Step], Path]) -> list[str]:
    """Submits what is missing of the stages, each to begin when the one before it is done; the jobs' numbers.

    Raises:
        ConfigError: sbatch is not there, or refuses.
    """
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        raise ConfigError("executor", "this is a task of a Slurm job array", allowed="a login node of Slurm")
    logger.remove()
    before: SlurmStage | None = None
    jobs: list[str] = []
    for step, tasks in stages:
        before = _stage(cfg, step, tasks, logs(step), before)
        try:
            before.run()
        except FileNotFoundError:
            raise ConfigError("executor", "sbatch is not on this machine", allowed="a login node of Slurm") from None
        except subprocess.CalledProcessError as error:
            raise ConfigError(
                "executor", f"sbatch refuses the job of stage {step.name}; what it says stands above"
            ) from error
        if before.job_id != -1:  # which says that all is done
            jobs.append(str(before.job_id))
    return jobs


def _stage(cfg: SlurmConfig, step: Step, tasks: int, logs: Path, before: SlurmStage | None) -> SlurmStage:
    return SlurmStage(
        [step],
        tasks=tasks,
        time=cfg.time,
        partition=cfg.partition,
        cpus_per_task=cfg.cpus_per_task,
        mem_per_cpu_gb=cfg.mem_per_cpu_gb,
        workers=min(cfg.workers, tasks),
        job_name=f"crosstune-{step.name}",
        qos=None,  # the cluster's default; another one comes with sbatch_args
        sbatch_args={"kill-on-invalid-dep": "yes", **cfg.sbatch_args},
        depends=before,
        logging_dir=str(logs),
        slurm_logs_folder=str(logs / "slurm"),
        with_srun=False,
    )


class Jobs:
    """The jobs that were submitted for a work folder.

    Args:
        path: file that remembers them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers: list[str] = read_json(path) if path.exists() else []

    def __str__(self) -> str:
        return ", ".join(self._numbers)

    def write(self, numbers: list[str]) -> None:
        """Remembers these instead."""
        self._numbers = numbers
        write_json(self._path, numbers)

    def active(self) -> bool:
        """Whether any waits or runs. If Slurm does not answer, they are taken to."""
        if not self._numbers:
            return False
        command = ["squeue", "--noheader", "--format=%A", f"--jobs={','.join(self._numbers)}"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        return bool(found.stdout.strip()) if found.returncode == 0 else "Invalid job id" not in found.stderr
