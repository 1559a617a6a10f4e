"""The stand-in for Ascend in tests: skipped with the reason where it cannot be built, a failure in CI."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from configs.errors import CrosstuneError
from configs.schema.doctor import StandinConfig
from launchers.doctor.standin.build import MARK, Standin, build
from tests.command import crosstune


class StandinKit:
    """Processes on the stand-in; `knobs` are the fields of StandinConfig."""

    def __init__(self, built: Standin) -> None:
        self.built = built

    def environment(self, **knobs: Any) -> dict[str, str]:
        """The whole environment of a process."""
        return self.built.environment(StandinConfig(**knobs), os.environ | {"OMP_NUM_THREADS": "1"})

    def run(self, words: Sequence[str], *, timeout: float = 300, **knobs: Any) -> subprocess.CompletedProcess[str]:
        """A command's end, both streams in ``stdout``."""
        return subprocess.run(
            words,
            env=self.environment(**knobs),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )

    def crosstune(self, *words: str, code: int = 0, cwd: Path | None = None, **knobs: Any) -> str:
        """Output of ``crosstune words...``; fails the test on another exit code than `code`."""
        return crosstune(*words, code=code, cwd=cwd, **self.environment(**knobs))


@pytest.fixture(scope="session")
def standin() -> StandinKit:
    """The stand-in in the user's cache, or in the folder of CROSSTUNE_STANDIN; built on first use."""
    root = os.environ.get(MARK)
    try:
        return StandinKit(build(StandinConfig(build=root, wheel=os.environ.get(f"{MARK}_WHEEL"))))
    except CrosstuneError as error:
        if "CI" in os.environ:
            pytest.fail(f"CI must have the stand-in: {error}")
        pytest.skip(f"no stand-in for Ascend: {error}")
