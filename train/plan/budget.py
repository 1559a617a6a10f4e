"""How many layers compute their activations again, so that a run keeps to `activation_budget`.

Every n-th layer does (Chen et al. 2016, arXiv:1604.06174, made selective by ``every_n_layers`` of transformers): as few
as the prediction of memory (`train.plan.predict`) says are enough. What a run computes does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from configs.errors import ConfigError
from configs.schema.roots import TrainConfig
from configs.sizes import bytes_of
from train.devices.base import Device
from train.plan.predict import ESTIMATED, Forecast

EVERY = (0, 8, 4, 3, 2, 1)
"""What is tried, 0 for none: each leaves less in memory than the one before, and takes more time."""
AUTO_SHARE = 0.9
"""Of a device's memory, for `auto`: a prediction is within 10 %."""
T = TypeVar("T", bound=TrainConfig)


def budget_bytes(cfg: TrainConfig, device: Device, processes: int) -> int:
    """The budget of one process; of a CPU's memory `processes` take equal parts.

    Raises:
        ConfigError: `auto`, and the device does not tell its memory.
    """
    assert cfg.activation_budget is not None
    if cfg.activation_budget != "auto":
        return bytes_of(cfg.activation_budget) or 0
    total = device.memory().total_bytes
    if not total:
        raise ConfigError(
            "activation_budget", f"auto, but {device.name} does not tell its memory", allowed="an amount: 48GiB"
        )
    return int(AUTO_SHARE * total) // (processes if device.torch_type == "cpu" else 1)


def recomputing(cfg: T, every: int) -> T:
    """The config with one of `every` layers recomputed, 0 for none, in place of its budget."""
    return replace(
        cfg, activation_budget=None, activation_checkpointing=every > 0, activation_checkpointing_every=max(1, every)
    )


def within(cfg: T, budget: int, forecast: Callable[[T], Forecast]) -> tuple[T, Forecast, str]:
    """The config with as few recomputed layers as fit.

    Args:
        cfg: of the run, with an `activation_budget`.
        budget: bytes that a process may hold of the device's memory.
        forecast: predicts a config.

    Returns:
        the config, what is predicted of it, and a line that says what was chosen.

    Raises:
        ConfigError: even with all layers it does not fit, or nobody can tell.
    """
    tried: list[float] = []
    for every in EVERY:
        chosen = recomputing(cfg, every)
        found = forecast(chosen)
        if unknown := [text for text in found.unknown if text.startswith(ESTIMATED)]:
            raise ConfigError(
                "activation_budget",
                f"{cfg.activation_budget}, but what this model takes cannot be predicted: {unknown[0]}",
                remedy="activation_checkpointing=true, or leave both out",
            )
        tried.append(found.device_bytes / 2**30)
        if found.device_bytes <= budget:
            of = f"{tried[-1]:.2f} of {budget / 2**30:.2f} GiB predicted"
            if not every:
                return chosen, found, f"activation budget: no layer computes its activations again: {of}"
            layers = "every layer computes its" if every == 1 else f"one of {every} layers computes its"
            return chosen, found, f"activation budget: {layers} activations again: {of}, {tried[0]:.2f} without"
    raise ConfigError(
        "activation_budget",
        f"{cfg.activation_budget}, but {tried[-1]:.2f} GiB are predicted with all activations computed again",
        allowed=f"{tried[-1]:.2f} GiB or more",
        remedy="micro_batch_tokens, max_length or sharding, see `crosstune plan --fit`",
    )
