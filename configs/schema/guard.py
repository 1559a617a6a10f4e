"""The guard group: what ends, mends or watches a run that goes wrong."""

from __future__ import annotations

from dataclasses import dataclass

from configs.errors import ConfigError


@dataclass
class GuardConfig:
    """Stops, skipped steps, roll-backs, the watch over hangs. None of it changes a run in which nothing goes wrong."""

    stop_after_minutes: float = 0
    """After so many minutes of the command the run saves and stops with exit code 75; 0: no limit.

    The step under way and the save come on top: leave room for both before a scheduler's own limit.
    """
    grace_seconds: int = 120
    """Time that workers have to save and leave after a stop signal before they are killed."""
    nonfinite_limit: int = 3
    """A step whose loss or gradient is not finite is skipped; at so many of them the run stops. 1: at the first."""
    spike_zscore: float = 0
    """A loss so many robust standard deviations above the last ones is a spike: the run goes back to the last
    checkpoint and leaves the data of the offending steps out. 0: off; 6 to 10 are usual."""
    spike_window: int = 64
    """Steps that a loss is compared with; before half as many are there, nothing counts as a spike."""
    spike_skip_before: int = 1
    """Steps before the spike whose data are left out too: what was learned there shows a step later."""
    spike_limit: int = 3
    """Roll-backs after which a further spike stops the run."""
    agreement_every: int = 0
    """Steps between comparisons of the weights that ranks hold in common; 0: never. Each reads all weights once."""
    hang_timeout_seconds: float = 600
    """When no rank has advanced for so long, the late rank is named in hang_report.txt and the run ends; 0: never.

    Above the longest single phase: a large batch's forward pass, a save to a slow disk. The first step of a command may
    take three times as long, since it compiles kernels. Time-outs of the collectives are set above it.
    """

    def __post_init__(self) -> None:
        for key in ("stop_after_minutes", "spike_zscore", "hang_timeout_seconds"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigError(f"guard.{key}", str(getattr(self, key)), allowed="0 (off) or more")
        for key in ("spike_skip_before", "spike_limit", "agreement_every"):
            if getattr(self, key) < 0:
                raise ConfigError(f"guard.{key}", str(getattr(self, key)), allowed="0 or more")
        for key in ("grace_seconds", "nonfinite_limit"):
            if getattr(self, key) < 1:
                raise ConfigError(f"guard.{key}", str(getattr(self, key)), allowed="1 or more")
        if self.spike_window < 8:
            raise ConfigError("guard.spike_window", str(self.spike_window), allowed="8 or more")
