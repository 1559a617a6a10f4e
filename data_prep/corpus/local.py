"""datatrove's executor for one machine. Importing this imports datatrove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from loguru import logger


class QuietLocal(LocalPipelineExecutor):  # type: ignore[misc]
    """Writes its logs to files, and not to the user's terminal.

    Args:
        pipeline: steps.
        tasks: their number.
        workers: processes.
        logs: folder of logs and of what is done.
    """

    def __init__(self, pipeline: Sequence[Callable[..., Any]], tasks: int, workers: int, logs: Path) -> None:
        super().__init__(list(pipeline), tasks=tasks, workers=workers, logging_dir=str(logs))
        self._logs = logs / "logs"

    def run(self) -> Any:
        """See `PipelineExecutor.run`."""
        logger.remove()
        return super().run()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"task_{rank:05d}.err").open("w") as file, redirect_stderr(file):
            try:
                return super()._run_for_rank(rank, local_rank, node_rank)
            finally:
                logger.remove()  # what datatrove sets up again after each task
