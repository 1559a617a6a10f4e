"""The roots of `crosstune prove` and its parts: a training run's config, and what a proof makes of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from configs.errors import ConfigError
from configs.schema.roots import TrainConfig

T = TypeVar("T", bound=TrainConfig)

LAYOUT = re.compile(r"(\w+)x([1-9]\d*)")
"""``zero3x4``: an option of the sharding group, and processes."""
SHORT_KEYS = {"from": "layout_from", "to": "layouts_to"}
"""As they are typed: ``from`` is a word of Python's."""
OF_ONE_COMMAND: dict[str, Any] = {"out": None, "overwrite": False, "run_dir": None}
"""Keys that mean something else to a proof than to a run, at their defaults."""


@dataclass
class ProveConfig(TrainConfig):
    """What every proof has. Its runs are its own: no run of yours is touched."""

    out: str | None = None
    """Folder of the report; null: ``runs/prove-<what>-<date>-<time>``."""
    overwrite: bool = False
    """Replace an earlier proof in `out`."""
    run_dir: str | None = None
    """Not for a proof, whose runs are in `out`."""
    max_steps: int = 0
    """Not for a proof, whose runs are short whatever this says."""
    shrink: bool = False
    """Take only `layers` layers of the model, with its weights, and small batches. What is changed is listed."""
    layers: int = 2
    """Layers that `shrink` keeps, at least one of each kind where that many are kept."""
    keep_runs: bool = False
    """Leave the proof's runs in ``<out>/runs`` also where it succeeds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ConfigError("layers", str(self.layers), allowed="1 or more")


@dataclass
class ProveResumeConfig(ProveConfig):
    """`crosstune prove resume`: killed at random moments and resumed, a run ends as if nothing had happened."""

    steps: int = 12
    """Steps of the run."""
    kills: int = 3
    """kill -9 of all its processes, at so many random moments; every second one inside a save."""
    kill_seed: int | None = None
    """Draws the moments; null: drawn anew, and told, so that it can be given again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 4:
            raise ConfigError("steps", str(self.steps), allowed="4 or more")
        if not 1 <= self.kills <= self.steps // 2:
            raise ConfigError("kills", str(self.kills), allowed=f"1 to half of steps={self.steps}")


@dataclass
class ProveReshardConfig(ProveConfig):
    """`crosstune prove reshard`: saved by one engine on so many ranks, resumed by others on other numbers."""

    steps: int = 8
    """Steps of the run; the checkpoint is of the step in the middle."""
    layout_from: str | None = None
    """Typed as ``from=zero3x4``: sharding and processes that save; null: those of the config."""
    layouts_to: list[str] = field(default_factory=lambda: ["plainx1"])
    """Typed as ``to=zero1x2,plainx1``: each of these resumes the same checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 2:
            raise ConfigError("steps", str(self.steps), allowed="2 or more")
        if self.layout_from is not None:
            check_layout("layout_from", self.layout_from)
        if not self.layouts_to:
            raise ConfigError("layouts_to", "empty", remedy="to=zero1x2,plainx1")
        for name in self.layouts_to:
            check_layout("layouts_to", name)


@dataclass
class ProveLayoutConfig(ProveConfig):
    """`crosstune prove layout`: one global step has one gradient, however its samples are laid out."""

    layouts_to: list[str] = field(default_factory=list)
    """Typed as ``to=zero3x4,zero2x2``: engines to compare besides that of the config."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.layouts_to:
            check_layout("layouts_to", name)


def check_layout(key: str, name: str) -> None:
    """Refuses a name that is not of the form ``zero3x4``.

    Raises:
        ConfigError: with what is allowed.
    """
    if not LAYOUT.fullmatch(name):
        raise ConfigError(key, f"'{name}'", allowed="SHARDINGxPROCESSES, such as zero3x4 or plainx1")


def as_config_of(root: type[T], cfg: TrainConfig, **changes: Any) -> T:
    """What a config says about training, as that of another command; `OF_ONE_COMMAND` is not carried over."""
    values = {f.name: getattr(cfg, f.name) for f in fields(TrainConfig)}
    return root(**(values | OF_ONE_COMMAND | changes))


def with_full_keys(command: str, texts: list[str]) -> list[str]:
    """Overrides with ``from=`` and ``to=a,b`` of the proofs about layouts written out.

    Args:
        command: a key of `configs.groups.ROOTS`.
        texts: as typed.
    """
    if command not in ("prove_reshard", "prove_layout"):
        return texts
    full = []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key in SHORT_KEYS:
            listed = key == "to" and not value.startswith("[")
            full.append(f"{SHORT_KEYS[key]}={f'[{value}]' if listed else value}")
        else:
            full.append(text)
    return full
